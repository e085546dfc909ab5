"""Keys of the server: `python -m jobs.serve_keys add --keys FILE --name NAME`."""

import sys
from collections.abc import Sequence

from jobs import runtime
from jobs.configs.serve_keys import ServeKeysJob
from pipelines.sampling.keys import add_key, read_keys, remove_key


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 refused."""
    return runtime.run_look("serve_keys", ServeKeysJob, serve_keys, argv)


def serve_keys(job: ServeKeysJob) -> int:
    """Print a new key, once; or the names; or nothing."""
    if job.action == "add":
        print(add_key(job.keys, job.name))
        print(f"the key of {job.name}; it is shown this once", file=sys.stderr)
    elif job.action == "remove":
        remove_key(job.keys, job.name)
    else:
        print("\n".join(read_keys(job.keys)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

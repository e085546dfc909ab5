"""Enter a trained sampler in MLflow's registry: `python -m jobs.register_model --prior FILE …`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from jobs import runtime
from jobs.configs.register_model import RegisterModelJob
from pipelines.sampling.loading import ModelFiles, check_files
from pipelines.training import model_registry


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 MLflow is away, 2 refused."""
    return runtime.run_look("register_model", RegisterModelJob, register, argv)


def register(job: RegisterModelJob) -> int:
    """Check that the files belong together, copy them, print the address."""
    checked = check_files(ModelFiles(tokenizer=job.tokenizer, dvae=job.dvae, prior=job.prior))
    version = model_registry.register(
        runtime.tracking_uri(),
        asdict(checked.files),
        checked.digests,
        name=job.name,
        alias=job.alias,
    )
    print(f"models:/{job.name}@{job.alias} is version {version} now")
    return 0


if __name__ == "__main__":
    sys.exit(main())

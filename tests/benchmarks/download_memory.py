"""Does the memory of jobs.download_pairs grow with its list?

`python -m tests.benchmarks.download_memory` prints for each number of rows the peak resident set of
the driver and of the largest worker, in MB;
many minutes.
"""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.download import our_line, web
from tests.fixtures.processes import descendants

ROWS = (10_000, 100_000)
ROWS_PER_SHARD = 2_000
SIDE = (24, 32)
SECONDS_BETWEEN_LOOKS = 0.2


def main(rows: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder, web(Path(folder), SIDE) as port:
        for count in rows:
            urls = Path(folder) / f"{count}.parquet"
            addresses = [f"http://127.0.0.1:{port}/{number}" for number in range(count)]
            pq.write_table(pa.table({"url": addresses, "caption": ["a photo"] * count}), urls)
            driver, worker = peaks(
                our_line(urls, Path(folder) / str(count), ROWS_PER_SHARD), folder
            )
            print(f"{count} rows: driver {driver} MB, largest worker {worker} MB", flush=True)


def peaks(line: list[str], folder: str) -> tuple[int, int]:
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    most = {"driver": 0, "worker": 0}
    look_again = threading.Event()
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL) as job:
        while job.poll() is None:
            most["driver"] = max(most["driver"], high_water(job.pid))
            for worker in descendants(job.pid):
                if is_worker(name_of(worker)):
                    most["worker"] = max(most["worker"], high_water(worker))
            look_again.wait(SECONDS_BETWEEN_LOOKS)
    if job.returncode:
        raise RuntimeError(f"the job ended with {job.returncode}")
    if not most["worker"]:
        raise RuntimeError("no process of the job was one of Ray's workers")
    return most["driver"], most["worker"]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (OSError, ProcessLookupError):
        return ""


def is_worker(name: str) -> bool:
    """Ray's workers are named after what they do just now, and so are its agents."""
    return name.startswith("ray::") and "Agent" not in name


def high_water(pid: int) -> int:
    """The largest resident set that a process ever had, in MB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return max(
        (int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), default=0
    )


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or ROWS)

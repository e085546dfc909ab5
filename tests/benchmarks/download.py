"""jobs.download_pairs against img2dataset: same server, pictures, cores and shard size.

Both run as a user runs them, in a process of their own from start to end; minutes on two cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.stage import Manifest
from tests.benchmarks.measure import Effort, Row, significant, versions
from tests.benchmarks.pictures import jpeg, photo

ROWS = {"download-2000": (2000, 64), "download-10000-shard": (20_000, 10_000)}
MOST_REPEATS = 3
PICTURES = 64  # different ones; every URL differs
SIDE = (288, 384)
SHORT_SIDE = 256
THEIRS = """
from img2dataset import download
import sys
if __name__ == "__main__":
    urls, output, side, shard = sys.argv[1:]
    download(url_list=urls, input_format="parquet", url_col="url", caption_col="caption",
             output_folder=output, output_format="parquet", image_size=int(side),
             resize_mode="keep_ratio", resize_only_if_bigger=True, processes_count=2,
             number_sample_per_shard=int(shard), enable_wandb=False)
"""
SERVER = """
import asyncio, pathlib, sys
bodies = [p.read_bytes() for p in sorted(pathlib.Path(sys.argv[1]).glob("*.jpg"))]
async def answer(reader, writer):
    try:
        while line := await reader.readline():
            head = line
            while (more := await reader.readline()) not in (b"\\r\\n", b""):
                head += more
            body = bodies[int(line.split()[1][1:]) % len(bodies)]
            close = b"onnection: close" in head
            last = b"Connection: close\\r\\n" if close else b""
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: image/jpeg\\r\\n" + last
                         + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
            await writer.drain()
            if close:
                break
    except ConnectionError:
        pass
    writer.close()
async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def rows(effort: Effort) -> list[Row]:
    """Both rows; ours and theirs in turn. `effort.rows` bounds the pictures."""
    with tempfile.TemporaryDirectory() as folder, web(Path(folder)) as port:
        return [
            compare(name, Path(folder), port, min(count, effort.rows), shard, effort.repeats)
            for name, (count, shard) in ROWS.items()
        ]


def compare(name: str, folder: Path, port: int, count: int, shard: int, repeats: int) -> Row:
    urls = folder / f"{name}.parquet"
    addresses = [f"http://127.0.0.1:{port}/{number}" for number in range(count)]
    pq.write_table(pa.table({"url": addresses, "caption": ["a photo"] * count}), urls)
    ours, theirs = [], []
    for number in range(min(repeats, MOST_REPEATS)):
        output = folder / f"{name}-{number}"
        ours.append(count / seconds(our_line(urls, output / "ours", shard), folder))
        assert Manifest.load(output / "ours").rows_out == count
        script = folder / "theirs.py"
        script.write_text(THEIRS)
        line = [sys.executable, str(script), str(urls), str(output / "theirs")]
        theirs.append(count / seconds([*line, str(SHORT_SIDE), str(shard)], folder))
        assert their_pictures(output / "theirs") == count
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Row(
        row=name,
        peer="img2dataset, multiprocessing",
        precision="uint8",
        ours=significant(statistics.median(ours)),
        theirs=significant(statistics.median(theirs)),
        unit="images/s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(("img2dataset", "ray", "aiohttp", "opencv-python-headless", "pillow")),
        note=f"{count} pictures, {shard} a shard, wall seconds from start to end",
    )


def our_line(urls: Path, output: Path, shard: int) -> list[str]:
    return [
        *(sys.executable, "-m", "jobs.download_pairs", "paper"),
        *("--urls", str(urls), "--output", str(output)),
        *("--download.rows-per-shard", str(shard)),
        *("--download.resize.short-side", str(SHORT_SIDE)),
        "--download.fetch.allow-loopback",
        *("--download.fetch.per-host", "64"),
    ]


def seconds(line: list[str], folder: Path) -> float:
    environment = os.environ | {
        "RAY_ADDRESS": "local",
        # Ray's workers yield to everybody (15), which is no equal share on a machine that is used.
        "RAY_worker_niceness": "0",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }
    started = time.monotonic()
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{line[1:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - started


def their_pictures(output: Path) -> int:
    tables = [pq.read_table(file, columns=["status"]) for file in output.glob("*.parquet")]
    return sum(table["status"].to_pylist().count("success") for table in tables)


@contextmanager
def web(folder: Path, side: tuple[int, int] = SIDE) -> Iterator[int]:
    """The pictures, served by a process of its own; gives its port."""
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        (folder / f"{number:03d}.jpg").write_bytes(jpeg(photo(*side, rng)))
    line = [sys.executable, "-c", SERVER, str(folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.terminate()

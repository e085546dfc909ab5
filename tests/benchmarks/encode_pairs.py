"""jobs.encode_pairs end to end against its encoder alone: what decoding, Ray and committing cost.

`python -m tests.benchmarks.encode_pairs` prints the row; it takes minutes, so that `make bench`
does not run it unless asked to.
"""

import json
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from jobs import encode_pairs
from jobs.encoding_actors import thread_environment
from models.dvae import DVAE, DVAEConfig
from pipelines.data.block_encoder import BlockEncoder
from pipelines.data.encoding import EncodingPlan, plan_encoding
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.picture_blocks import picture_blocks
from pipelines.data.schema import FILTERED
from pipelines.data.storage import replace_file
from pipelines.data.tokenizer import TokenizerConfig, train_tokenizer
from pipelines.training.weights import save_model
from tests.benchmarks.measure import Effort, Row, significant, versions
from tests.fixtures.datasets import CORPUS, filtered_row, write_dataset

MOST_PICTURES = 1536
MOST_REPEATS = 1
ALONE_SHARDS = 2  # their rate is known sooner than the job's, which counts its start
ROWS_PER_SHARD = 128
THREADS = 2
MODEL = DVAEConfig(image_size=128, vocab_size=1024, n_hid=64, n_init=8)
CONFIG = EncodingConfig(batch_samples=32, precision="fp32")


def rows(effort: Effort) -> list[Row]:
    """The job with its start and without; an idle machine is needed.

    With its start, it counts from the making of the actors to the last commit. The encoder alone,
    on the same squares in memory, is measured before and after, without its start.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        plan = make_inputs(Path(folder), min(effort.rows, MOST_PICTURES))
        ray.init(num_cpus=THREADS, include_dashboard=False, log_to_driver=False)
        try:
            theirs, ours = [alone(plan)], []
            for number in range(min(effort.repeats, MOST_REPEATS)):
                ours.append(job(Path(folder), f"tokens-{number}"))
                theirs.append(alone(plan))
        finally:
            ray.shutdown()
    return [
        row(name, [figures[key] for figures in ours], theirs)
        for name, key in (("encode-pairs", "whole"), ("encode-pairs-steady", "steady"))
    ]


def row(name: str, ours: list[float], theirs: list[float]) -> Row:
    ratios = [mine / statistics.mean(theirs[i : i + 2]) for i, mine in enumerate(ours)]
    return Row(
        row=name,
        peer="the encoder alone",
        precision=CONFIG.precision,
        ours=significant(statistics.median(ours)),
        theirs=significant(statistics.median(theirs)),
        unit="images/s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(("ray", "torch", "pyarrow")),
        note="wall seconds, as several processes take part",
    )


def make_inputs(path: Path, count: int) -> EncodingPlan:
    """Pictures of 128 px from the corpus, an untrained dVAE and a tokenizer."""
    corpus = pq.read_table(CORPUS, columns=["caption", "image"]).to_pylist()
    pairs = [corpus[index % len(corpus)] for index in range(count)]
    table = pa.Table.from_pylist(
        [filtered_row(f"{i} {row['caption']}", row["image"]) for i, row in enumerate(pairs)],
        schema=FILTERED,
    )
    write_dataset(
        path / "filtered",
        "filter_pairs",
        table,
        inputs={"raw": "0" * 64},
        rows_per_shard=ROWS_PER_SHARD,
    )
    captions = [row["caption"] for row in pairs]
    data = train_tokenizer(captions, TokenizerConfig(vocab_size=512))
    replace_file(path / "tokenizer.json", data)
    torch.manual_seed(0)
    state = DVAE(MODEL).state_dict()
    save_model(path / "dvae.safetensors", kind="dvae", config=MODEL, state=state, metadata={})
    return plan_encoding(
        path / "filtered",
        path / "tokenizer.json",
        path / "dvae.safetensors",
        path / "tokens",
        CONFIG,
    )


def alone(plan: EncodingPlan) -> float:
    """Images a second of the encoder, in a process like the pipeline's, on squares in memory."""
    environment = {"env_vars": thread_environment(THREADS)}
    measured = ray.remote(num_cpus=THREADS, runtime_env=environment)(encode_squares).remote(plan)
    return float(ray.get(measured))


def encode_squares(plan: EncodingPlan) -> float:
    side = plan.model.image_size
    blocks = [
        np.frombuffer(block["pixels"][0].as_buffer(), np.uint8).reshape(-1, side, side, 3)
        for row in plan.files(plan.writer.shards[:ALONE_SHARDS])
        for block in picture_blocks(row["shard"], Path(row["file"]), CONFIG, side)
    ]
    sha256 = plan.writer.inputs["dvae"]
    encoder = BlockEncoder(plan.dvae, sha256, CONFIG, "cpu", THREADS, calls=1)
    encoder.encode(blocks[0])
    started = time.monotonic()
    for block in blocks:
        encoder.encode(block)
    return sum(map(len, blocks)) / (time.monotonic() - started)


def job(folder: Path, output: str) -> dict[str, float]:
    """Images a second of the job: with its start, and after its first batch."""
    arguments = [
        "paper",
        f"--filtered={folder / 'filtered'}",
        f"--tokenizer={folder / 'tokenizer.json'}",
        f"--dvae={folder / 'dvae.safetensors'}",
        f"--output={folder / output}",
        f"--encoding.batch-samples={CONFIG.batch_samples}",
        f"--encoding.precision={CONFIG.precision}",
        *("--encoders=1", "--decoders=1", "--device=cpu"),
    ]
    said = StringIO()
    with redirect_stdout(said):
        code = encode_pairs.main(arguments)
    if code:
        raise RuntimeError(f"encode_pairs ended with {code}")
    summary = json.loads(said.getvalue().splitlines()[-1])
    images, rate = summary["rows_out"], summary["images_per_second"]
    seconds = images / rate - summary["seconds_to_first_block"]
    return {"whole": rate, "steady": (images - CONFIG.batch_samples) / seconds}


if __name__ == "__main__":
    print(json.dumps([asdict(made) for made in rows(Effort())], indent=1))

"""Learn the caption tokenizer: filtered dataset → OUTPUT/tokenizer.json."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from jobs import runtime
from jobs.claimed_output import make_once
from jobs.configs.train_tokenizer import PRESETS, TrainTokenizerJob
from pipelines.data.split import TRAIN, read_split
from pipelines.data.stage import Manifest
from pipelines.data.storage import replace_file
from pipelines.data.tokenizer import CaptionTokenizer, length_statistics, train_tokenizer
from pipelines.training import tracking
from pipelines.training.run_directory import read_result, run_tags, write_result

STAGE = "train_tokenizer"
TOKENIZER = "tokenizer.json"


def main(argv: Sequence[str] | None = None) -> int:
    return runtime.run_job(STAGE, PRESETS, train, argv, describe)


def describe(job: TrainTokenizerJob) -> list[str]:
    """The lines below the config of a dry run."""
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    there = (job.output / TOKENIZER).exists()
    return [
        f"read {manifest.rows_out} captions of {job.filtered} ({manifest.digest[:12]})",
        f"learn at most {job.tokenizer.vocab_size} ids",
        f"write {job.output / TOKENIZER}" + (" (it is there already)" if there else ""),
    ]


def train(job: TrainTokenizerJob) -> dict[str, Any]:
    """Write the tokenizer once; a finished output with the same settings is left alone."""
    manifest = Manifest.load(job.filtered, stage="filter_pairs")
    settings = {"tokenizer": asdict(job.tokenizer), "text_len": job.text_len}
    inputs = {"filtered": manifest.digest}
    path = job.output / TOKENIZER
    make_once(
        path,
        stage=STAGE,
        settings=settings,
        inputs=inputs,
        make=lambda: _train(job, manifest, settings),
    )
    digest = CaptionTokenizer.from_file(path).digest
    return {"tokenizer": path, "sha256": digest} | read_result(job.output)


def _train(job: TrainTokenizerJob, manifest: Manifest, settings: dict[str, Any]) -> None:
    path = job.output / TOKENIZER
    with tracking.open_run(
        job.tracking,
        stage=STAGE,
        settings=settings,
        tags=run_tags({"filtered": manifest.digest}, {"filtered": job.filtered}),
        directory=job.output,
        uri=runtime.tracking_uri(),
    ) as tracker:
        data = train_tokenizer(captions(manifest), job.tokenizer)
        tokenizer = CaptionTokenizer(data, str(path))
        statistics = length_statistics(tokenizer, captions(manifest), job.text_len)
        statistics["vocab_size"] = tokenizer.vocab_size
        tracker.log_metrics(statistics, step=0)
        write_result(job.output, statistics)
        replace_file(path, data)  # last: it says that the job is done


def captions(manifest: Manifest) -> Iterator[str]:
    """The captions of the pictures that are trained on."""
    for part in manifest.shards:
        table = read_split(manifest, part.shard, ["caption"], TRAIN)
        yield from table["caption"].to_pylist()


if __name__ == "__main__":
    sys.exit(main())

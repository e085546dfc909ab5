"""Saving, verifying and loading a checkpoint against the disk's own rate, and what a training sees.

Wall time, not CPU time: the disk is what is measured. Reads come from the disk: the pages that the
system has kept of a file are given back before.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from models.prior import PriorConfig
from pipelines.data.storage import CHUNK_BYTES
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.checkpoint_files import attempts
from pipelines.training.prior_trainer import PriorTrainer
from pipelines.training.prior_training import PriorTraining
from pipelines.training.token_loader import TokenBatch
from tests.benchmarks.measure import Effort, Row, significant, versions
from tests.benchmarks.prior import tokens

STATE_BYTES = 1_000_000_000
TENSORS = 40
DISK = Path("runs/bench")  # the disk that trainings write to; /tmp may be memory
MODEL = PriorConfig(
    n_layers=6,
    n_heads=8,
    d_model=512,
    text_len=32,
    text_vocab_size=1024,
    grid=8,
    image_vocab_size=1024,
    conv_kernel=5,
)
INTERVAL = 1000  # updates between two checkpoints, as planned for the paper's run


def rows(effort: Effort) -> list[Row]:
    """A state of 1 GB; with less than the usual effort, of a hundredth."""
    size = STATE_BYTES if effort.rows >= Effort().rows else STATE_BYTES // 100
    DISK.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=DISK) as folder:
        return [*_disk_rows(Path(folder), size, effort.repeats), _blocking_row(Path(folder))]


def _disk_rows(folder: Path, size: int, repeats: int) -> list[Row]:
    each = size // TENSORS // 4
    state = {"model": {str(index): torch.randn(each) for index in range(TENSORS)}}
    content = torch.cat(list(state["model"].values())).numpy().tobytes()
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, settings={})
    plain = folder / "plain"
    pairs: dict[str, list[tuple[float, float]]] = {"save": [], "verify": []}
    for repeat in range(repeats + 1):

        def save(step: int = repeat + 1) -> None:
            checkpoints.save(step, state, {})
            checkpoints.wait()

        timed = [(_seconds(save), _seconds(lambda: _write(plain, content)))]
        files = [plain, *attempts(folder / "checkpoints")[0].iterdir()]
        _forget(files)
        timed.append((_seconds(lambda: _verify(checkpoints)), _seconds(lambda: _read(plain))))
        if repeat:  # the first allocates the buffers
            for found, pair in zip(pairs.values(), timed, strict=True):
                found.append(pair)
    note = f"{size / 1e9:g} GB, {os.cpu_count()} processors"
    return [_row(f"checkpoint-{name}", timed, size, note) for name, timed in pairs.items()]


def _row(name: str, pairs: list[tuple[float, float]], size: int, note: str) -> Row:
    ratios = [theirs / ours for ours, theirs in pairs]
    return Row(
        row=name,
        peer="a plain write and fsync, or a plain read, of as many bytes",
        precision="bytes",
        ours=significant(size / 1e6 / statistics.median(ours for ours, _ in pairs)),
        theirs=significant(size / 1e6 / statistics.median(theirs for _, theirs in pairs)),
        unit="MB/s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(("torch",)),
        note=note,
    )


def _blocking_row(folder: Path) -> Row:
    """Updates while a checkpoint is written, and what `save` kept waiting, over an interval."""
    training = PriorTraining(steps=1_000_000, batch_samples=8, precision="fp32", recompute="none")
    trainer = PriorTrainer(MODEL, training, torch.device("cpu"))
    batch = TokenBatch(*(part.expand(8, -1) for part in tokens(MODEL)))
    trainer.update(batch)
    with Checkpoints(folder / "training", keep=2, settings={}) as checkpoints:
        trainer.save(checkpoints)  # allocates the buffers
        checkpoints.wait()
        alone = statistics.median(_seconds(lambda: trainer.update(batch)) for _ in range(9))
        checkpoints.blocked_seconds = 0.0
        trainer.save(checkpoints)
        beside = []
        while checkpoints.is_writing:
            beside.append(_seconds(lambda: trainer.update(batch)))
    lost = checkpoints.blocked_seconds + sum(seconds - alone for seconds in beside)
    interval = INTERVAL * alone + lost
    size = sum(file.stat().st_size for file in attempts(folder / "training")[0].iterdir())
    return Row(
        row="checkpoint-blocks",
        peer=f"{INTERVAL} updates without a checkpoint",
        precision="fp32",
        ours=significant(interval),
        theirs=significant(INTERVAL * alone),
        unit="seconds",
        ratio_median=significant(interval / (INTERVAL * alone)),
        ratio_min=significant((interval - lost + checkpoints.blocked_seconds) / (INTERVAL * alone)),
        ratio_max=significant(interval / (INTERVAL * alone)),
        versions=versions(("torch",)),
        note=f"{size / 1e9:.2g} GB; an update takes {alone:.3g} s, copying the state "
        f"{checkpoints.blocked_seconds:.2g} s (the lowest ratio), the {len(beside)} updates while "
        f"it is written {lost - checkpoints.blocked_seconds:.2g} s more than alone",
    )


def _verify(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest_valid()[1] == []


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(CHUNK_BYTES):
            pass


def _forget(files: list[Path]) -> None:
    """Have the next read come from the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

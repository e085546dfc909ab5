"""Comparing two ways of doing the same work on a machine that others use too."""

import gc
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType


class MissingPeer(Exception):
    """A package to compare with is not installed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of runs/bench/TOPIC.json."""

    row: str
    """What is compared; a stable name."""
    peer: str
    """Whose way `theirs` is."""
    precision: str
    ours: float
    theirs: float
    unit: str
    """Of `ours` and `theirs`. More is better for what ends in /cpu-s, less for bytes."""
    ratio_median: float
    """ours / theirs, of repeats that ran side by side."""
    ratio_min: float
    ratio_max: float
    versions: dict[str, str]
    note: str = ""
    """What a reader must know to judge the ratio."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much work a benchmark does."""

    rows: int = 20_000
    """Rows of data that each way works through per repeat."""
    repeats: int = 7
    """Times that each way runs, in turn."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.repeats < 1:
            raise ValueError(f"rows and repeats must be at least 1, got {self}")


def compare_speed(
    row: str,
    *,
    peer: str,
    precision: str,
    work: int,
    what: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    packages: tuple[str, ...],
    note: str = "",
) -> Row:
    """Run both in turn; rates are `work` per CPU second, the unit is ``WHAT/cpu-s``.

    CPU seconds, because they hardly change when somebody else uses the other core; in turn, because
    what still changes (clock, caches) then changes for both. The first run of each is thrown away.
    """
    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats + 1)][1:]
    ratios = [their_seconds / our_seconds for our_seconds, their_seconds in pairs]
    return Row(
        row=row,
        peer=peer,
        precision=precision,
        ours=significant(work / statistics.median(mine for mine, _ in pairs)),
        theirs=significant(work / statistics.median(other for _, other in pairs)),
        unit=f"{what}/cpu-s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(packages),
        note=note,
    )


def compare_size(
    row: str,
    *,
    peer: str,
    precision: str,
    ours: float,
    theirs: float,
    unit: str,
    packages: tuple[str, ...],
) -> Row:
    """A row of two sizes, which no repeat changes."""
    ratio = significant(ours / theirs)
    return Row(
        row=row,
        peer=peer,
        precision=precision,
        ours=significant(ours),
        theirs=significant(theirs),
        unit=unit,
        ratio_median=ratio,
        ratio_min=ratio,
        ratio_max=ratio,
        versions=versions(packages),
    )


def peer_package(module: str, distribution: str) -> ModuleType:
    """A package that is no dependency."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPeer(f"{distribution} is not installed: make peers ({error})") from error


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all threads, with the collector out of the way."""
    gc.collect()
    gc.disable()
    try:
        started = time.process_time()
        work()
        return time.process_time() - started
    finally:
        gc.enable()


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: version(package) for package in packages}


def significant(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")

"""Seeded schedules: a line that is killed, or whose store fails, run again until it ends.

`Schedule.of(seed)` says what happens, and is the same for the same seed; `Range.run` makes it
happen and says what is wrong with the dataset that came out: nothing, it must be.
"""

import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.data.storage import Location
from tests.chaos import evidence, line
from tests.chaos.doom import NEVER, Doom
from tests.chaos.fault_proxy import KINDS, FaultPlan, FaultProxy
from tests.chaos.line import Line
from tests.fixtures.s3_server import S3Server

MOST_LINES = 12  # of one schedule; most need two
STAGES = {
    "download_pairs": ["download_pairs"],
    "filter_pairs": ["fingerprint_pictures", "filter_pairs"],
}
QUICK_KINDS = tuple(kind for kind in KINDS if kind not in ("stall", "late"))
BUSY = 2  # exit code of a line that finds another's lease
SHARDS = 3


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What happens to one line."""

    seed: int
    where: str
    """disk or s3."""
    verb: str
    victim: str
    """driver, worker, both, or nobody."""
    stage: str
    """In which the worker dies."""
    shard: str
    fractions: tuple[float, float]
    """At which of its steps the driver dies, and the worker: of all that an undisturbed one has."""
    cut: float
    """What is left of the file that was being written."""
    faults: Mapping[str, float] = field(default_factory=dict)
    """Rates of the proxy's faults."""
    outage: float = 1.0
    """Part of an undisturbed run's requests after which the store is away; 1: it stays."""
    rival: bool = False
    """A second line is started at once, and the lease, which would refuse it, expires at once."""

    @property
    def leaves_garbage(self) -> bool:
        """Something may still be written, and by nobody be removed, after the line has ended."""
        return self.rival or "late" in self.faults or self.victim == "both"

    @classmethod
    def of(cls, seed: int) -> "Schedule":
        rng = random.Random(f"schedule {seed}")
        where = ("disk", "s3")[seed % 2]
        verb = rng.choice(list(STAGES))
        made = cls(
            seed=seed,
            where=where,
            verb=verb,
            victim=rng.choice(["driver", "driver", "worker", "both"]),
            stage=rng.choice(STAGES[verb]),
            shard=f"{rng.randrange(SHARDS):05d}",
            fractions=(rng.random(), rng.random()),
            cut=rng.choice([0.0, 0.5, 1.0]),
        )
        if where == "disk":
            return made
        match seed // 2 % 5:
            case 0:
                return made
            case 1:
                return replace(made, faults=dict.fromkeys(QUICK_KINDS, 0.04))
            case 2:
                heavy = dict.fromkeys(rng.sample(QUICK_KINDS, 3), 0.15)
                return replace(made, victim="nobody", faults=heavy)
            case 3:
                slow = {"stall": 0.01, "late": 0.03, "lost_answer": 0.1}
                return replace(made, faults=slow, rival=rng.random() < 0.5)
        return replace(made, victim="nobody", outage=rng.random())


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What an undisturbed line gives."""

    digest: str
    keys: list[str]
    steps: dict[str, int]
    """By `driver` and `worker-STAGE`."""
    requests: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a schedule."""

    faults: list[str]
    """What is wrong; empty if nothing is."""
    deaths: int
    lines: int
    did: Counter[str]
    """Requests by what the proxy did to them."""


class Range:
    """A place in which schedules run: inputs, a directory, an S3 server behind a fault proxy."""

    def __init__(
        self, folder: Path, server: S3Server, proxy: FaultProxy, inputs: dict[str, list[str]]
    ) -> None:
        """`inputs` are the arguments of each verb without the output."""
        self.folder, self.server, self.proxy, self.inputs = folder, server, proxy, inputs
        self.calm: dict[tuple[str, str], Undisturbed] = {}

    def make_raw(self, output: Path) -> None:
        """An undisturbed download, which filter_pairs then reads."""
        with self._place("disk") as (folder, _):
            made = self._line(folder, Location(output), "download_pairs")
            assert self._run(made) == 0, made.log.read_text()

    def undisturbed(self, where: str, verb: str) -> Undisturbed:
        """Run it once, and count its steps."""
        if (where, verb) not in self.calm:
            with self._place(where) as (folder, output):
                self.proxy.forget(FaultPlan())
                made = self._line(folder, output, verb)
                assert self._run(made) == 0, made.log.read_text()
                found = evidence.of(output)
                assert not found.faults, found.faults
                steps = {
                    file.name: int(file.read_text())
                    for file in made.counts.iterdir()
                    if not file.name.startswith("pid-")
                }
                self.calm[where, verb] = Undisturbed(
                    digest=found.digest,
                    keys=found.keys,
                    steps=steps,
                    requests=self.proxy.counts.total(),
                )
        return self.calm[where, verb]

    def run(self, schedule: Schedule, *, wrong: str = "") -> Outcome:
        """Make it happen; the same line again until it ends well."""
        calm = self.undisturbed(schedule.where, schedule.verb)
        with self._place(schedule.where) as (folder, output):
            self.proxy.forget(self._plan(schedule, calm))
            made = self._doomed(schedule, calm, self._line(folder, output, schedule.verb, wrong))
            rival = (
                line.start(replace(made, driver=self._calm_doom(output)))
                if schedule.rival
                else None
            )
            lines, code = 0, -1
            while code != 0 and lines < MOST_LINES:
                code = self._run(made)
                lines += 1
                if schedule.outage < 1:
                    self.proxy.plan = FaultPlan()
                if code == BUSY:
                    time.sleep(0.5)  # as it says: wait for the other one
            if rival is not None:
                rival.join()
            while any(line.late_workers(made.counts)):
                time.sleep(0.05)
            did = Counter(self.proxy.counts)
            self.proxy.forget(FaultPlan())
            faults = [] if code == 0 else [f"the line ends with {code}:\n{made.log.read_text()}"]
            found = evidence.of(output)
            faults += found.faults
            if found.left and not schedule.leaves_garbage:
                faults.append(f"files were left: {found.left}")
            if found.digest != calm.digest:
                faults.append(f"digest {found.digest}, undisturbed {calm.digest}")
            if found.keys != calm.keys:
                faults.append("rows were lost, or are there twice")
            deaths = sum((folder / name).exists() for name in ("driver.grave", "worker.grave"))
            return Outcome(faults=faults, deaths=deaths, lines=lines, did=did)

    def _plan(self, schedule: Schedule, calm: Undisturbed) -> FaultPlan:
        if schedule.outage < 1:
            return FaultPlan(
                rates={"slow_down": 1.0},
                in_a_row=NEVER,
                after=int(schedule.outage * calm.requests),
            )
        return FaultPlan(seed=schedule.seed, rates=schedule.faults)

    def _line(self, folder: Path, output: Location, verb: str, wrong: str = "") -> Line:
        counts = folder / "counts"
        counts.mkdir()
        never = self._calm_doom(output)
        return Line(
            verb=verb,
            arguments=[*self.inputs[verb], "--output", str(output)],
            environment=self.server.environment
            | {
                "AWS_ENDPOINT_URL": self.proxy.url,
                "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db",
            },
            log=folder / "log",
            counts=counts,
            driver=never,
            worker=never,
            wrong=wrong,
        )

    def _calm_doom(self, output: Location) -> Doom:
        return Doom(place=f":{self.proxy.port}" if output.is_s3 else str(output))

    def _doomed(self, schedule: Schedule, calm: Undisturbed, made: Line) -> Line:
        driver_at, worker_at = (
            1 + int(fraction * calm.steps[who])
            for fraction, who in zip(
                schedule.fractions, ("driver", f"worker-{schedule.stage}"), strict=True
            )
        )
        folder = made.log.parent
        doom = replace(made.driver, cut=schedule.cut)
        if schedule.victim in ("driver", "both"):
            made = replace(
                made, driver=replace(doom, at=driver_at, grave=str(folder / "driver.grave"))
            )
        if schedule.victim in ("worker", "both"):
            made = replace(
                made, worker=replace(doom, at=worker_at, grave=str(folder / "worker.grave"))
            )
        return replace(
            made,
            stage=schedule.stage,
            shard=schedule.shard,
            lease_s=0.0 if schedule.rival else made.lease_s,
        )

    @staticmethod
    def _run(made: Line) -> int:
        process = line.start(made)
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"the line does not end:\n{made.log.read_text()[-2000:]}")
        return int(process.exitcode)

    @contextlib.contextmanager
    def _place(self, where: str) -> Iterator[tuple[Path, Location]]:
        """A folder for notes, and a place for the dataset."""
        name = uuid.uuid4().hex[:12]
        folder = self.folder / name
        folder.mkdir()
        if where == "disk":
            yield folder, Location(folder / "out")
            return
        self.server.client().create_bucket(Bucket=f"chaos-{name}")
        yield folder, Location(f"s3://chaos-{name}/out")


def describe(schedule: Schedule, outcome: Outcome) -> dict[str, Any]:
    """One line of a table."""
    return {
        "seed": schedule.seed,
        "where": schedule.where,
        "verb": schedule.verb,
        "victim": schedule.victim,
        "deaths": outcome.deaths,
        "lines": outcome.lines,
        "requests": {kind: count for kind, count in outcome.did.items() if kind != "passed"},
        "faults": outcome.faults,
    }

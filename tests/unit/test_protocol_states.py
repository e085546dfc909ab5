"""The commit protocol under every order of steps that hypothesis can think of.

Drivers and workers run the real code on a real directory, one storage step at a time; any of them
may stop for long, go on after its driver is dead and another has taken over, or die between any
two steps. Whatever happens: no row twice, none lost, no record changed, nothing named that is not
whole, and the same digest as of an undisturbed run.
"""

import hashlib
import json
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipelines.data import garbage, plan, stage, storage
from pipelines.data.schema import DROPPED
from pipelines.data.stage import DatasetWriter, Manifest, ShardCommit
from pipelines.data.storage import Location
from tests.chaos.actors import Actor

SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False)])
SHARDS = ["00000", "00001", "00002"]
ROWS = 3  # of a shard; the last one is dropped
KEYS = sorted(f"{shard}-{row}" for shard in SHARDS for row in range(ROWS))
FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a real disk waits for every fsync
MOST_ALIVE = 6
MOST_STEPS = 4000  # a whole run takes about 100

QUICK = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
# That it fails is all that is asked: no smaller example is looked for.
FINDING = settings(QUICK, max_examples=200, phases=[Phase.generate], report_multiple_bugs=False)
LONG = settings(QUICK, max_examples=100, stateful_step_count=60)


def rows_of(shard: str) -> tuple[pa.Table, pa.Table]:
    keys = [f"{shard}-{row}" for row in range(ROWS)]
    bad = [{"key": keys[-1], "url": None, "caption": None, "reason": "last", "detail": None}]
    return pa.table({"key": keys[:-1]}, schema=SCHEMA), pa.Table.from_pylist(bad, schema=DROPPED)


class Protocol(RuleBasedStateMachine):
    """Processes, a directory, and what must always be true of it."""

    writer_class: type[DatasetWriter] = DatasetWriter

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="states", dir=FAST))
        self.root = self.folder / "out"
        self.writer = self.writer_class(
            path=self.root,
            stage="count_keys",
            config={},
            inputs={"raw": "abc"},
            sources={},
            shards=SHARDS,
        )
        self.alive: list[Actor] = []
        self.fixed: dict[str, bytes] = {}  # files that may never change, as they were first seen
        self.started = 0
        # Names decide in which order files are listed: the same steps must be the same again.
        names = random.Random(0)
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(uuid, "uuid4", lambda: uuid.UUID(int=names.getrandbits(128)))

    @initialize()
    def begin(self) -> None:
        self.start("driver", self.drive)

    def start(self, name: str, body: Callable[[Actor], object]) -> Actor:
        self.started += 1
        actor = Actor(f"{name}-{self.started}", self.root, body)
        self.alive.append(actor)
        return actor

    # --- what the processes do: as jobs.shards does it, Ray being `start` ---

    def drive(self, me: Actor) -> None:
        try:
            with plan.lease(self.root):
                self.writer.claim()
                if self.writer.finished():
                    Manifest.load(self.root, stage="count_keys")
                    return
                mine: dict[str, Actor] = {}
                while pending := self.writer.pending():
                    for shard in pending:
                        if shard not in mine or mine[shard].ended:
                            mine[shard] = self.work_on(shard)
                    me.pause()
                self.writer.seal()
                garbage.collect(Location(self.root))
        except plan.OutputBusy:
            pass

    def collect(self, me: Actor) -> None:
        """As jobs.check_shards: no driver is at work then, but workers of a dead one may be."""
        try:
            with plan.lease(self.root):
                garbage.collect(Location(self.root))
        except plan.OutputBusy:
            pass

    def work_on(self, shard: str) -> Actor:
        def work(me: Actor) -> None:
            kept, dropped = rows_of(shard)
            self.writer.commit(shard, kept, dropped, rows_in=ROWS, schema=SCHEMA)

        return self.start(f"worker-of-{shard}", work)

    # --- what may happen ---

    @precondition(lambda self: len(self.alive) < MOST_ALIVE)
    @rule()
    def another_driver_starts(self) -> None:
        self.start("driver", self.drive)

    @precondition(lambda self: len(self.alive) < MOST_ALIVE and self.planned)
    @rule(shard=st.sampled_from(SHARDS))
    def a_second_worker_gets_a_shard(self, shard: str) -> None:
        self.work_on(shard)

    @precondition(lambda self: len(self.alive) < MOST_ALIVE and self.planned)
    @rule()
    def somebody_collects_garbage(self) -> None:
        self.start("collector", self.collect)

    @precondition(lambda self: self.alive)
    @rule(who=st.integers(0, 99), steps=st.integers(1, 12))
    def somebody_goes_on(self, who: int, steps: int) -> None:
        self.go_on(self.alive[who % len(self.alive)], steps)

    @precondition(lambda self: self.alive)
    @rule(who=st.integers(0, 99), cut=st.sampled_from([0.0, 0.5, 1.0]))
    def somebody_dies(self, who: int, cut: float) -> None:
        actor = self.alive[who % len(self.alive)]
        actor.kill(cut=cut)
        self.bury()

    def go_on(self, actor: Actor, steps: int) -> None:
        for _ in range(steps):
            actor.step()
        self.bury()

    def bury(self) -> None:
        for actor in [actor for actor in self.alive if actor.ended]:
            self.alive.remove(actor)
            if actor.error is not None and not self.lost_its_spare(actor):
                raise AssertionError(f"{actor.name} failed") from actor.error

    def lost_its_spare(self, actor: Actor) -> bool:
        """A late worker may find its attempt collected, if another one's is committed."""
        _, _, shard = actor.name.rpartition("-")[0].partition("worker-of-")
        committed = bool(shard) and (self.root / "commits" / f"{shard}.json").exists()
        return committed and isinstance(actor.error, (FileNotFoundError, ValueError))

    # --- what must be true ---

    @property
    def planned(self) -> bool:
        return (self.root / plan.PLAN).exists()

    @invariant()
    def what_is_written_stays(self) -> None:
        records = [self.root / plan.PLAN, self.root / stage.MANIFEST]
        for file in [*records, *(self.root / "commits").glob("[!.]*.json")]:
            if file.exists():
                data = file.read_bytes()
                assert self.fixed.setdefault(file.name, data) == data, f"{file.name} has changed"
        for name in self.fixed:
            assert (self.root / name).exists() or (self.root / "commits" / name).exists(), name

    @invariant()
    def what_a_record_names_is_whole(self) -> None:
        for file in (self.root / "commits").glob("[!.]*.json"):
            self.check(ShardCommit(**json.loads(file.read_bytes())))

    @invariant()
    def a_manifest_has_every_row_once(self) -> None:
        if not (self.root / stage.MANIFEST).exists():
            return
        manifest = Manifest.load(self.root)
        assert [shard.shard for shard in manifest.shards] == SHARDS
        assert sorted(key for commit in manifest.shards for key in self.check(commit)) == KEYS

    def check(self, commit: ShardCommit) -> list[str]:
        """The keys of a shard, read with other eyes than the protocol's."""
        found: list[str] = []
        for name, sha256 in (
            (commit.file, commit.sha256),
            (commit.dropped_file, commit.dropped_sha256),
        ):
            assert (self.root / name).exists(), f"{name} is named, but not there"
            data = (self.root / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == sha256, f"{name} is not what was committed"
            found += pq.read_table(pa.BufferReader(data))["key"].to_pylist()
        assert len(found) == commit.rows_in == ROWS
        return found

    # --- the end: everybody who can still go on does, and the same line is run again ---

    def teardown(self) -> None:
        try:
            if self.started:
                self.run_to_the_end()
        finally:
            for actor in self.alive:
                actor.kill()
            self.patched.undo()
            shutil.rmtree(self.folder, ignore_errors=True)

    def run_to_the_end(self) -> None:
        sleepers = [actor for actor in self.alive if actor.name.startswith("worker")]
        for actor in [actor for actor in self.alive if actor not in sleepers]:
            actor.kill()
        self.bury()
        self.run_a_driver(asleep=sleepers)
        assert Manifest.load(self.root).digest == DIGEST
        for late in sleepers:
            while not late.ended:
                self.go_on(late, 1)
        self.look()
        before = (self.root / stage.MANIFEST).read_bytes()
        self.run_a_driver(asleep=[])
        assert (self.root / stage.MANIFEST).read_bytes() == before
        assert Manifest.load(self.root).digest == DIGEST

    def run_a_driver(self, *, asleep: list[Actor]) -> None:
        self.start("driver", self.drive)
        for _ in range(MOST_STEPS):
            if not (awake := [actor for actor in self.alive if actor not in asleep]):
                break
            for actor in awake:
                if actor in self.alive:
                    self.go_on(actor, 1)
        assert not [actor for actor in self.alive if actor not in asleep], "a driver does not end"
        self.look()

    def look(self) -> None:
        self.what_is_written_stays()
        self.what_a_record_names_is_whole()
        self.a_manifest_has_every_row_once()


def undisturbed() -> str:
    path = Path(tempfile.mkdtemp(prefix="calm")) / "out"
    writer = DatasetWriter(
        path=path, stage="count_keys", config={}, inputs={"raw": "abc"}, sources={}, shards=SHARDS
    )
    writer.claim()
    for shard in SHARDS:
        kept, dropped = rows_of(shard)
        writer.commit(shard, kept, dropped, rows_in=ROWS, schema=SCHEMA)
    digest = writer.seal().digest
    shutil.rmtree(path.parent)
    return digest


DIGEST = undisturbed()


def test_no_order_of_steps_and_deaths_loses_or_doubles_a_row() -> None:
    run_state_machine_as_test(Protocol, settings=QUICK)


@pytest.mark.chaos
def test_no_long_order_of_steps_and_deaths_loses_or_doubles_a_row() -> None:
    run_state_machine_as_test(Protocol, settings=LONG)


# --- the machine finds what it is for: protocols with one thing wrong ---


class CommitsFirst(DatasetWriter):
    """The record is there before what it names."""

    def commit(self, shard: str, *tables: pa.Table, **known: Any) -> ShardCommit:
        record = ShardCommit(
            shard=shard,
            file="attempts/made.parquet",
            sha256="",
            dropped_file="attempts/made.parquet",
            dropped_sha256="",
            rows_in=ROWS,
            rows_out=ROWS,
            dropped={},
        )
        Location(self.path / f"commits/{shard}.json").create_once(json_of(record))
        return super().commit(shard, *tables, **known)


class SealsEarly(DatasetWriter):
    """One shard is enough."""

    def seal(self) -> Manifest:
        return DatasetWriter(**(vars(self) | {"shards": self.shards[:1]})).seal()

    def pending(self) -> list[str]:
        return super().pending() if len(super().pending()) == len(self.shards) else []


class LoserDeletesTheWinner(DatasetWriter):
    """The second worker on a shard removes the attempt that counts."""

    def commit(self, shard: str, *tables: pa.Table, **known: Any) -> ShardCommit:
        was_first = shard in self.pending()
        record = super().commit(shard, *tables, **known)
        if not was_first:
            Location(self.path / record.file).delete()
        return record


def json_of(commit: ShardCommit) -> bytes:
    return storage.canonical_json(asdict(commit))


def replace(path: Path, data: bytes) -> bool:
    storage.replace_file(path, data)
    return True


def write_in_place(path: Path, data: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return False
    path.write_bytes(data)
    return True


def collects_what_has_no_record(place: Location) -> None:
    """As if an attempt without a record were abandoned."""
    files = [entry.name for entry in place.list()]
    commits = [name for name in files if name.startswith("commits/") and name.endswith(".json")]
    named = [json.loads((place / name).read()) for name in commits if "/." not in name]
    kept = {name for commit in named for name in (commit["file"], commit["dropped_file"])}
    for name in files:
        if name.startswith("attempts/") and name not in kept:
            (place / name).delete()


def finds(machine: type[Protocol]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=FINDING)


@pytest.mark.parametrize(
    "wrong",
    [CommitsFirst, SealsEarly, pytest.param(LoserDeletesTheWinner, marks=pytest.mark.chaos)],
)
def test_the_machine_finds_a_wrong_writer(wrong: type[DatasetWriter]) -> None:
    finds(type("Wrong", (Protocol,), {"writer_class": wrong}))


@pytest.mark.chaos
@pytest.mark.parametrize("wrong", [replace, write_in_place])
def test_the_machine_finds_a_wrong_create_once(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Path, bytes], bool]
) -> None:
    for module in (stage, storage, plan):
        monkeypatch.setattr(module, "create_once", wrong, raising=False)
    finds(type("Wrong", (Protocol,), {}))


@pytest.mark.chaos
def test_the_machine_finds_a_wrong_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "collect", collects_what_has_no_record)
    finds(type("Wrong", (Protocol,), {}))

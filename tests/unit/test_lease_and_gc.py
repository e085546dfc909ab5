"""Who may write an output in S3, and what may be removed from one anywhere."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import garbage, plan, s3, s3_lease
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location
from tests.unit.test_stage import SCHEMA, commit, tables, writer


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "local":
        yield Location(tmp_path / "out")
    else:
        yield Location(f"s3://{request.getfixturevalue('bucket')}/out")


class LateWorker:
    """A worker that was held up between its attempt and its commit record."""

    def __init__(self, made: DatasetWriter, shard: str, kept: int) -> None:
        self.made, self.shard, self.kept = made, shard, kept
        self.work = self.steps()
        next(self.work)

    def steps(self) -> Iterator[None]:
        good, bad = tables(self.kept)
        name = f"attempts/{self.shard}.{'f' * 32}"
        other = DatasetWriter(**{**vars(self.made), "path": self.made.place / "elsewhere"})
        found = other.commit(self.shard, good, bad, rows_in=self.kept + 1, schema=SCHEMA)
        for kind, old in ((".parquet", found.file), (".dropped.parquet", found.dropped_file)):
            (self.made.place / f"{name}{kind}").put((other.place / old).read())
        record = (other.place / f"commits/{self.shard}.json").read()
        for entry in other.place.list():
            (other.place / entry.name).delete()
        yield
        moved = record.replace(found.file.removesuffix(".parquet").encode(), name.encode())
        (self.made.place / f"commits/{self.shard}.json").create_once(moved)

    def wakes(self) -> None:
        next(self.work, None)


def readable(place: Location) -> Manifest:
    manifest = Manifest.load(place)
    for part in manifest.shards:
        assert manifest.read(part.shard).num_rows == part.rows_out
        assert manifest.read_dropped(part.shard).num_rows == sum(part.dropped.values())
    return manifest


def test_a_dataset_is_the_same_on_disk_and_in_s3(bucket: str, tmp_path: Path) -> None:
    digests = set()
    for place in (Location(tmp_path / "out"), Location(f"s3://{bucket}/out")):
        made = DatasetWriter(**{**vars(writer(tmp_path / "out")), "path": place})
        with plan.lease(place):
            made.claim()
            for shard in made.pending():
                commit(made, shard)
            assert made.pending() == []
            digests.add(made.seal().digest)
        digests.add(readable(place).digest)
    assert len(digests) == 1


def test_another_plan_and_strangers_files_are_refused_in_s3(bucket: str) -> None:
    place = Location(f"s3://{bucket}/out")
    plan.claim(place, stage="a", config={"x": 1}, inputs={})
    with pytest.raises(plan.OutputConflict, match='\\+  "x": 2'):
        plan.claim(place, stage="a", config={"x": 2}, inputs={})
    Location(f"s3://{bucket}/mine/thesis.tex").put(b"mine")
    with pytest.raises(plan.OutputConflict, match=r"thesis\.tex"):
        plan.claim(Location(f"s3://{bucket}/mine"), stage="a", config={}, inputs={})


def unclaimed(place: Location, shards: list[str]) -> DatasetWriter:
    return DatasetWriter(
        path=place, stage="count_keys", config={}, inputs={}, sources={}, shards=shards
    )


def test_what_a_late_worker_commits_is_never_removed(place: Location) -> None:
    made = unclaimed(place, ["00000", "00001"])
    late = LateWorker(made, "00000", kept=4)
    commit(made, "00001")
    assert garbage.collect(place).files == 0  # its shard has no record: it may still count
    late.wakes()
    commit(made, "00000", kept=2)
    garbage.collect(place)
    made.seal()
    assert readable(place).rows_out == 4 + 2


def test_an_attempt_that_lost_is_removed_and_its_worker_changes_nothing(place: Location) -> None:
    made = unclaimed(place, ["00000"])
    late = LateWorker(made, "00000", kept=4)
    commit(made, "00000", kept=2)
    removed = garbage.collect(place)
    assert (removed.files, removed.bytes > 0) == (2, True)
    late.wakes()
    made.seal()
    assert readable(place).rows_out == 2
    assert garbage.collect(place).files == 0


EVENTS = st.lists(st.sampled_from(["work", "late", "wake", "gc"]), max_size=12)


@settings(max_examples=40)
@given(EVENTS)
def test_no_order_of_workers_and_collections_loses_a_named_file(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    place = Location(tmp_path_factory.mktemp("gc") / "out")
    made = writer(place.path, shards=2)
    late: list[LateWorker] = []
    for event, shard in zip(events, itertools.cycle(made.shards), strict=False):
        if event == "work":
            commit(made, shard)
        elif event == "late" and not late:
            late.append(LateWorker(made, shard, kept=4))
        elif event == "wake" and late:
            late[0].wakes()
        elif event == "gc":
            garbage.collect(place)
    for shard in made.pending():
        commit(made, shard)
    made.seal()
    garbage.collect(place)
    for worker in late:
        worker.wakes()
    readable(place)


def test_temporary_files_are_removed_once_the_dataset_is_sealed(tmp_path: Path) -> None:
    made = writer(tmp_path / "out", shards=1)
    half = tmp_path / "out" / "commits" / ".00000.json.abc.tmp"
    half.parent.mkdir()
    half.write_bytes(b"{")
    garbage.collect(made.place)
    assert half.exists()
    commit(made, "00000")
    made.seal()
    assert garbage.collect(made.place).files == 1
    assert not half.exists()


@pytest.mark.parametrize("content", [b'{"shard": ', b"\xff\xfe", b"[]", b'{"shard": "00000"}'])
def test_nothing_is_removed_beside_a_damaged_record(tmp_path: Path, content: bytes) -> None:
    made = writer(tmp_path / "out", shards=1)
    LateWorker(made, "00000", kept=2)
    (tmp_path / "out" / "commits" / "00000.json").parent.mkdir(exist_ok=True)
    (tmp_path / "out" / "commits" / "00000.json").write_bytes(content)
    before = made.place.list()
    with pytest.raises(plan.DamagedFile, match=r"00000\.json"):
        garbage.collect(made.place)
    with pytest.raises(plan.DamagedFile, match=r"00000\.json"):
        made.seal()
    assert made.place.list() == before


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    writer(tmp_path / "out")
    (tmp_path / "out" / "plan.json").write_bytes(b'{"stage": "count')
    with pytest.raises(plan.DamagedFile, match=r"plan\.json must be JSON.*char 10"):
        writer(tmp_path / "out")


def test_a_lease_in_s3_has_one_holder_and_is_given_back(bucket: str) -> None:
    place = Location(f"s3://{bucket}/out")
    busy = pytest.raises(plan.OutputBusy, match=r"process \d+ on .* holds it")
    with plan.lease(place), busy, plan.lease(place):
        pass
    with plan.lease(place):
        pass


def test_the_lease_of_a_dead_driver_expires_and_that_of_a_living_one_does_not(bucket: str) -> None:
    lease = Location(f"s3://{bucket}/out") / s3_lease.LEASE
    dead = b'{"holder": "process 1 on gone", "owner": "x", "expires_after_s": 1.0}'
    lease.replace(dead)
    with s3_lease.hold(lease) as holder:
        assert holder == "process 1 on gone"
    wait_for(lambda: s3.get(*lease.object_name()).age_s > 1)
    with s3_lease.hold(lease, expires_after_s=2.0) as holder:
        assert holder is None
        first = lease.read()
        wait_for(lambda: lease.read() != first)  # a sign of life
        with s3_lease.hold(lease) as other:
            assert other is not None


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)

"""Exactly once: seeded schedules that kill a job or its workers between any two steps of the commit
protocol, or make S3 fail, and run the same line again until it ends.

A part runs always, all 200, and 40 on a real Ray, with `make chaos`. A schedule is a function of
its seed: to see one again, `pytest tests/integration/test_chaos.py -m chaos -k "117]"`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from pipelines.corpus.web import CorpusWeb
from pipelines.data import s3
from tests.chaos.fault_proxy import FaultPlan, FaultProxy
from tests.chaos.ray_schedules import RayRange, RaySchedule, ray_of_three_nodes
from tests.chaos.schedules import Range, Schedule, describe
from tests.fixtures.s3_server import S3Server

PICTURES = 15  # and nine bad rows: three shards of eight
SCHEDULES = 200
RAY_SCHEDULES = 40
ALWAYS = (0, 1, 3, 5, 9)  # on disk; in S3 without faults, with some, with many, with an outage
FINDS = [  # which schedule is the end of which wrong protocol
    ("loser_deletes", 3),
    pytest.param("names_first", 4, marks=pytest.mark.chaos),
    pytest.param("one_name_a_shard", 150, marks=pytest.mark.chaos),
]


@pytest.fixture(scope="module")
def ground(
    s3_server: S3Server, private_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Range]:
    folder = tmp_path_factory.mktemp("chaos")
    raw = folder / "raw"
    with (
        CorpusWeb(0, PICTURES) as web,
        FaultProxy(s3_server.url, FaultPlan()) as proxy,
        pytest.MonkeyPatch.context() as patched,
    ):
        for name, value in s3_server.environment.items():
            patched.setenv(name, value)
        s3.client.cache_clear()
        urls = web.url_list(folder / "urls.parquet")
        inputs = {
            "download_pairs": [
                *("tiny", "--urls", str(urls), "--download.rows-per-shard", "8"),
            ],
            "filter_pairs": ["tiny", "--raw", str(raw), "--validation-fraction", "0.2"],
        }
        ground = Range(folder, s3_server, proxy, inputs)
        ground.make_raw(raw)
        yield ground
    s3.client.cache_clear()


@pytest.fixture(scope="module")
def ray_ground(ground: Range) -> Iterator[RayRange]:
    with ray_of_three_nodes(ground.folder) as cluster:
        yield RayRange(ground.folder, cluster, ground.inputs["filter_pairs"])


def check(ground: Range, schedule: Schedule) -> None:
    outcome = ground.run(schedule)
    print(json.dumps(describe(schedule, outcome)))
    assert not outcome.faults, f"{schedule}: {outcome.faults}"
    assert outcome.deaths or schedule.victim == "nobody", "nobody died"


@pytest.mark.parametrize("seed", ALWAYS)
def test_every_row_is_there_exactly_once(ground: Range, seed: int) -> None:
    check(ground, Schedule.of(seed))


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [seed for seed in range(SCHEDULES) if seed not in ALWAYS])
def test_every_row_is_there_exactly_once_whatever_happens(ground: Range, seed: int) -> None:
    check(ground, Schedule.of(seed))


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(RAY_SCHEDULES))
def test_every_row_is_there_exactly_once_on_ray(
    ground: Range, ray_ground: RayRange, seed: int
) -> None:
    schedule = RaySchedule.of(seed)
    faults = ray_ground.run(schedule, ground.undisturbed("disk", "filter_pairs"))
    print(json.dumps(asdict(schedule) | {"faults": faults}))
    assert not faults


@pytest.mark.parametrize(("wrong", "seed"), FINDS)
def test_a_wrong_protocol_is_found(ground: Range, wrong: str, seed: int) -> None:
    faults = ground.run(Schedule.of(seed), wrong=wrong).faults
    print(json.dumps({"wrong": wrong, "seed": seed, "faults": faults}))
    assert faults

"""Schedules on a real Ray of three nodes: a worker dies, a node with it, or the driver."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.data.storage import Location, canonical_json
from tests.chaos import evidence
from tests.chaos.doom import Doom, write_doom
from tests.chaos.schedules import Undisturbed

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
OBJECT_STORE_BYTES = 100 * 1024 * 1024
LINE_S = 150.0
WORKER_STEPS = 13  # of one shard's commit; the test asserts that somebody died


@dataclass(frozen=True, kw_only=True)
class RaySchedule:
    """What happens to `filter_pairs`."""

    seed: int
    victim: str
    """worker, driver or node."""
    stage: str
    fraction: float
    cut: float

    @classmethod
    def of(cls, seed: int) -> "RaySchedule":
        """Of ten seeds, five kill a worker, four the driver, and one a node."""
        rng = random.Random(f"ray schedule {seed}")
        return cls(
            seed=seed,
            victim=("worker", "driver", "worker", "driver", "node")[seed % 5]
            if seed % 10 != 9
            else "worker",
            stage=rng.choice(["fingerprint_pictures", "filter_pairs"]),
            fraction=rng.random(),
            cut=rng.choice([0.0, 0.5, 1.0]),
        )


class RayRange:
    """A cluster on this machine, and the line that runs on it."""

    def __init__(self, folder: Path, cluster: Any, arguments: list[str]) -> None:
        self.folder, self.cluster, self.arguments = folder, cluster, arguments

    def run(self, schedule: RaySchedule, calm: Undisturbed) -> list[str]:
        """Make it happen, the same line again if the driver died; what is wrong then."""
        name = f"ray-{schedule.seed}-{time.monotonic_ns()}"
        folder = self.folder / name
        folder.mkdir()
        output, grave = Location(folder / "out"), folder / "grave"
        doom = self._doom(schedule, calm, str(output), str(grave))
        mine = schedule.victim == "driver"
        write_doom(self.folder / "doom.json", Doom(place="/nowhere") if mine else doom)
        codes: list[int] = []
        for _ in range(3):
            driver = self._start(folder, output, doom if mine else None)
            if schedule.victim == "node" and not codes:
                self._take_the_node(grave, driver)
            codes.append(driver.wait(LINE_S))
            if codes[-1] == 0:
                break
        if not grave.exists():
            return [f"nobody died: {schedule}"]
        if codes != ([-signal.SIGKILL, 0] if mine else [0]):
            return [f"the lines end with {codes}:\n{(folder / 'log').read_text()[-4000:]}"]
        found = evidence.of(output)
        faults = list(found.faults)
        if found.digest != calm.digest:
            faults.append(f"digest {found.digest}, undisturbed {calm.digest}")
        if found.keys != calm.keys:
            faults.append("rows were lost, or are there twice")
        return faults

    def _doom(self, schedule: RaySchedule, calm: Undisturbed, output: str, grave: str) -> Doom:
        if schedule.victim == "driver":
            at = 1 + int(schedule.fraction * calm.steps["driver"])
            return Doom(place=output, at=at, cut=schedule.cut, grave=grave)
        prints = f"{output}/fingerprints"
        first = schedule.stage == "fingerprint_pictures"
        return Doom(
            place=prints if first else output,
            beside="" if first else prints,
            at=1 + int(schedule.fraction * WORKER_STEPS),
            cut=schedule.cut,
            grave=grave,
            waits=schedule.victim == "node",
        )

    def _start(self, folder: Path, output: Location, doom: Doom | None) -> subprocess.Popen[bytes]:
        told = {} if doom is None else {"CHAOS_DRIVER": canonical_json(asdict(doom)).decode()}
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "jobs.filter_pairs"),
                    *(*self.arguments, "--output", str(output)),
                ],
                cwd=ROOT,
                env=os.environ | {"RAY_ADDRESS": self.cluster.address} | told,
                stdout=log,
                stderr=log,
            )

    def _take_the_node(self, grave: Path, driver: "subprocess.Popen[bytes]") -> None:
        """Remove the node whose worker stands still, and add another."""
        end = time.monotonic() + LINE_S
        while not (grave.exists() and grave.stat().st_size):
            assert driver.poll() is None, "the line ended before a worker came so far"
            assert time.monotonic() < end, "no worker came so far"
            time.sleep(0.05)
        said = json.loads(grave.read_text())
        (node,) = (
            node
            for node in self.cluster.worker_nodes
            if node.all_processes["raylet"][0].process.pid == said["parent"]
        )
        self.cluster.remove_node(node, allow_graceful=False)
        with suppress(ProcessLookupError):  # it has noticed that its node is gone
            os.kill(said["pid"], signal.SIGKILL)
        add_node(self.cluster)


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)


@contextmanager
def ray_of_three_nodes(folder: Path) -> Iterator[Any]:
    """A head without processors, and two nodes of two; `folder/doom.json` dooms their workers."""
    from ray.cluster_utils import Cluster

    os.environ["CHAOS_WORKERS"] = str(folder / "doom.json")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{SITE}:{ROOT}"
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        add_node(cluster)
        add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()
        del os.environ["CHAOS_WORKERS"]
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before

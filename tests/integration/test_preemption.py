"""A node that is about to be taken away: a checkpoint at once, and on from there elsewhere.

A real Ray of a head and a worker node, `ray drain-node` as an autoscaler does it, and a node that
then ends without a word.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipelines.training.checkpoint_files import attempts, is_complete
from tests.fixtures.datasets import TinyTokens, tiny_tokens
from tests.fixtures.waiting import until

RAY = Path(sys.executable).parent / "ray"
EVERY, ASKED, STEPS = 200, 7, 600  # updates: planned checkpoints, questions, all
PATIENCE = 240.0  # seconds; a slow machine needs a minute for the processes alone

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster(private_directory: Path) -> Iterator[Cluster]:
    head = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        add_node(made)
        yield made
    finally:
        made.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyTokens:
    return tiny_tokens(tmp_path_factory.mktemp("tokens"), rows=40)


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=2, object_store_memory=100 << 20)


def start(cluster: Cluster, tiny: TinyTokens, output: Path) -> "subprocess.Popen[bytes]":
    line = [
        *(sys.executable, "-m", "jobs.train_prior", "tiny"),
        *(f"--tokens={tiny.tokens}", f"--tokenizer={tiny.tokenizer}", f"--dvae={tiny.dvae}"),
        *(f"--output={output}", "--workers.num-workers=1", "--prior.n-layers=2"),
        *("--prior.d-model=48", f"--training.steps={STEPS}", "--training.batch-samples=8"),
        *(f"--cadence.checkpoint-every={EVERY}", f"--cadence.ask-every={ASKED}"),
        *(f"--cadence.log-every={EVERY}", f"--cadence.sample-every={STEPS}"),
    ]
    told = {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.1"}
    output.mkdir()
    with (output.parent / f"{output.name}.log").open("wb") as log:
        return subprocess.Popen(line, env=os.environ | told, stdout=log, stderr=log)


def complete_steps(output: Path) -> list[int]:
    """Of the whole checkpoints, ascending."""
    found = attempts(output / "checkpoints")
    return sorted(int(path.name[5:13]) for path in found if is_complete(path))


def wait_for(job: "subprocess.Popen[bytes]", happened: Callable[[], bool], log: Path) -> None:
    def said() -> str:
        return f"the job ended with {job.poll()}, None: not yet:\n{log.read_text()[-4000:]}"

    until(lambda: happened() or job.poll() is not None, PATIENCE, said)
    assert job.poll() is None, said()


def test_a_drained_node_costs_no_update_that_was_made_before_it_was_known(
    cluster: Cluster, tiny: TinyTokens, tmp_path: Path
) -> None:
    output, log = tmp_path / "prior", tmp_path / "prior.log"
    job = start(cluster, tiny, output)
    wait_for(job, lambda: EVERY in complete_steps(output), log)
    (node,) = cluster.worker_nodes
    drain = [
        *(RAY, "drain-node", "--address", cluster.address, "--node-id", node.node_id),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a better bid"),
        *("--deadline-remaining-seconds", "60"),
    ]
    subprocess.run(drain, check=True, capture_output=True, timeout=60)
    add_node(cluster)
    wait_for(job, lambda: any(step % EVERY for step in complete_steps(output)), log)
    (unplanned,) = (step for step in complete_steps(output) if step % EVERY)
    assert unplanned % ASKED == 0
    cluster.remove_node(node, allow_graceful=False)
    assert job.wait(PATIENCE) == 0, log.read_text()[-4000:]
    assert f"step {unplanned}" in log.read_text()  # where it went on from
    assert (output / "prior.safetensors").exists()

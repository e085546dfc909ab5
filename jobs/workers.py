"""Running one training loop on many Ray Train workers."""

import os
import signal
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.training.stopping import StopRequest

WORKER_ENVIRONMENT = {
    # Threads that spin while they wait take the processor from another worker's.
    "OMP_WAIT_POLICY": "passive",
    # glibc gives freed memory back to the kernel, and an update frees most of what the next one
    # allocates: thousands of page faults, up to a twentieth of an update's time.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest that glibc itself would go to
}


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The processes that train together."""

    num_workers: int = 1
    """Processes, one GPU or one CPU each."""
    device: str = "cpu_or_gpu"
    """"cpu", "gpu", or "cpu_or_gpu": GPUs if the cluster has enough of them."""
    max_failures: int = 3
    """Times that the group is started anew from its newest checkpoint when a worker dies."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.device not in ("cpu", "gpu", "cpu_or_gpu"):
            raise ValueError(f"device must be cpu, gpu or cpu_or_gpu, got {self.device!r}")


def train_on_workers(
    loop: Callable[[dict[str, Any]], None],
    argument: dict[str, Any],
    workers: WorkersConfig,
    output: Path,
    *,
    loaders_per_worker: int = 0,
) -> None:
    """Run `loop(argument)` on every worker, in one process group; raises what a worker raised.

    `loaders_per_worker` processes of one CPU each will be started by the loop beside each worker.
    SIGTERM becomes a `StopRequest(output)`, which the loop heeds; it then ends as if it were done.

    Checkpoints are the loop's own affair (pipelines.training.checkpoint): Ray Train 2.60 refuses to
    go on from a run whose snapshot file was cut off, so every attempt is a new Ray Train run to it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    use_gpu = _use_gpus(workers, loaders_per_worker)
    trainer = TorchTrainer(
        loop,
        train_loop_config=argument,
        scaling_config=ScalingConfig(num_workers=workers.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str((output / ".ray_train").resolve()),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    request = StopRequest(output)
    request.forget()
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        with request.on_sigterm() if in_main_thread else nullcontext():
            trainer.fit()
    except SystemExit as end:
        # Ray Train 2.60 answers Ctrl-C with an abort and sys.exit(0), as if all were done.
        raise KeyboardInterrupt from end
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _use_gpus(workers: WorkersConfig, loaders_per_worker: int) -> bool:
    """Whether each worker has a GPU; ValueError if the cluster has too little of either kind."""
    import ray

    resources = ray.cluster_resources()
    use_gpu = workers.device == "gpu" or (
        workers.device == "cpu_or_gpu" and resources.get("GPU", 0) >= workers.num_workers
    )
    kind, have = ("GPU", resources.get("GPU", 0)) if use_gpu else ("CPU", resources.get("CPU", 0))
    if have < workers.num_workers:
        raise ValueError(
            f"the cluster must have a {kind} for each of the {workers.num_workers} workers, "
            f"it has {have:.0f}: ask for fewer with --workers.num-workers"
        )
    cpus = workers.num_workers * (loaders_per_worker + (not use_gpu))
    if resources.get("CPU", 0) < cpus:
        raise ValueError(
            f"the cluster must have {cpus} CPUs for {workers.num_workers} workers and "
            f"{loaders_per_worker} loaders beside each, it has {resources.get('CPU', 0):.0f}: ask "
            "for fewer with --workers.num-workers or --loaders.per-worker"
        )
    return use_gpu


@dataclass(frozen=True)
class Worker:
    """Who the calling process is in its group."""

    device: torch.device
    rank: int
    world_size: int


def this_worker() -> Worker:
    """The calling worker; on a CPU it takes its fair share of the threads."""
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    device: torch.device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    return Worker(device, context.get_world_rank(), context.get_world_size())


class PreemptionNotices:
    """Whether the cluster has said, since the last time, that a worker's node is going away.

    A checkpoint at once then, and the training goes on: it loses what it does from there to the
    node's end, when Ray Train starts the group anew. That does not count as one of `max_failures`.
    All workers must ask at the same time: Ray makes them wait for each other.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self) -> bool:
        from ray import train

        notice = train.get_preemption_info()
        leaving = set(notice.preempted_node_ids) if notice else set()
        is_news = not leaving <= self._known
        self._known |= leaving
        return is_news

"""The Ray Data pipeline of jobs.encode_pairs: decoders feed encoders, the driver commits.

The driver commits, not an actor: an actor that dies takes the blocks it gathered with it, and Ray
Data does not send again what was delivered; a driver that dies ends the run anyway, and loses the
shards that are not committed yet. It has 2 kB a row to handle.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.configs.encode_pairs import EncodePairsJob
from jobs.progress import Progress
from pipelines.data.block_encoder import BlockEncoder
from pipelines.data.encoding import STAGE, EncodingPlan
from pipelines.data.picture_blocks import ShardDecoder
from pipelines.data.token_commits import TokenBlock, TokenCommitter

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

MOST_DECODERS_PER_CPU = 4
SHARE_OF_OBJECT_STORE = 0.5  # what Ray Data 2.60 uses of it at most
BLOCKS_PER_DECODER = 2
"""Ray Data lets a generator run ahead by so many blocks."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """The processes of the pipeline and what each takes of the cluster."""

    encoders: int
    decoders: int
    gpus_per_encoder: float
    """0: on CPUs."""
    cpus_per_encoder: float
    cpus_per_decoder: float

    @property
    def calls_per_encoder(self) -> int:
        """Batches that are under way in one encoder, see BlockEncoder."""
        return 2 if self.gpus_per_encoder else 1

    @property
    def blocks(self) -> int:
        """Blocks of pictures that keep everybody busy: in work, and one waiting each."""
        return (self.calls_per_encoder + 1) * self.encoders + BLOCKS_PER_DECODER * self.decoders


def plan_actors(
    job: EncodePairsJob,
    nodes: Sequence[Mapping[str, float]],
    *,
    image_size: int,
    shards: int,
    blocks: int,
) -> Actors:
    """Who runs, given the resources of the cluster's nodes and the work that there is.

    Raises ValueError if the cluster is too small: Ray would wait for more of it for ever.
    """
    encoders, decoders = min(job.encoders, blocks), min(job.decoders, shards)
    use_gpu = _on_gpus(job, nodes, encoders)
    # On GPUs no CPU is asked for: decoders could take all those of the nodes that have the GPUs.
    cpus_per_encoder = 0 if use_gpu else 1
    cpus = sum(int(node.get("CPU", 0)) for node in nodes)
    left = cpus - encoders * cpus_per_encoder
    if left * MOST_DECODERS_PER_CPU < decoders:
        raise ValueError(
            f"the cluster must have {'' if use_gpu else 'a CPU for each encoder and '}a CPU for "
            f"every {MOST_DECODERS_PER_CPU} decoders, it has {cpus} CPUs for {encoders} encoders "
            f"and {decoders} decoders: ask for fewer with --encoders or --decoders"
        )
    actors = Actors(
        encoders=encoders,
        decoders=decoders,
        gpus_per_encoder=job.gpus_per_encoder if use_gpu else 0,
        cpus_per_encoder=cpus_per_encoder,
        # Rounded down, so that they fit.
        cpus_per_decoder=min(1.0, math.floor(100 * left / decoders) / 100),
    )
    store = SHARE_OF_OBJECT_STORE * sum(node.get("object_store_memory", 0) for node in nodes)
    needed = actors.blocks * job.encoding.block_bytes(image_size)
    if needed > store:
        raise ValueError(
            f"half of the cluster's object stores must hold {needed / 1e6:,.0f} MB of pictures for "
            f"{encoders} encoders and {decoders} decoders, it is {store / 1e6:,.0f} MB: "
            "ask for fewer decoders or a smaller --encoding.batch-samples"
        )
    return actors


def _on_gpus(job: EncodePairsJob, nodes: Sequence[Mapping[str, float]], encoders: int) -> bool:
    # Place by place: an encoder cannot take half a GPU of two nodes each.
    places = sum(int(node.get("GPU", 0) / job.gpus_per_encoder + 1e-6) for node in nodes)
    if job.device == "gpu" and places < encoders:
        raise ValueError(
            f"the cluster must have {job.gpus_per_encoder:g} GPU for each of the {encoders} "
            f"encoders, it has places for {places}: ask for fewer with --encoders"
        )
    use_gpu = job.device != "cpu" and places >= encoders
    if not use_gpu and job.encoding.precision == "fp16":
        raise ValueError(
            "precision must be fp32 or bf16 on CPUs, got fp16, and the cluster has GPUs for "
            f"{places} of {encoders} encoders: ask for another with --encoding.precision, or for "
            "fewer with --encoders"
        )
    return use_gpu


def encode_shards(job: EncodePairsJob, plan: EncodingPlan, pending: list[str]) -> dict[str, float]:
    """Encode and commit these shards; figures for the summary."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actors = plan_actors(
        job,
        nodes,
        image_size=plan.model.image_size,
        shards=len(pending),
        blocks=plan.blocks(pending),
    )
    _quiet_ray_data()
    with _bounded_memory(plan, actors):
        blocks = _pipeline(plan, actors, pending)
    batches = blocks.iter_batches(batch_size=None, batch_format="pyarrow")
    return _commit_all(plan, pending, batches)


def _one_block_each(rows: list[dict[str, Any]]) -> "Dataset":
    """A dataset whose rows are worked on apart.

    Ray Data would pack small rows into one block, and run them in one task.
    """
    import ray.data

    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _quiet_ray_data() -> None:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # ours suits logs too
    # It tells of every start and end, and warns that its bars are off.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def _pipeline(plan: EncodingPlan, actors: Actors, pending: list[str]) -> "Dataset":
    """From the pending shards to their blocks of codes, in any order."""
    from ray.data import ActorPoolStrategy

    calls = actors.calls_per_encoder
    device = "cuda" if actors.gpus_per_encoder else "cpu"
    threads = max(1, (os.cpu_count() or 1) // actors.encoders)
    sha256 = plan.writer.inputs["dvae"]
    return (
        _one_block_each(plan.files(pending))
        .map_batches(
            ShardDecoder,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(plan.config, plan.model.image_size),
            # A shard waits for whoever is free next, not behind another one.
            compute=ActorPoolStrategy(size=actors.decoders, max_tasks_in_flight_per_actor=1),
            num_cpus=actors.cpus_per_decoder,
        )
        .map_batches(
            BlockEncoder,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(plan.dvae, sha256, plan.config, device, threads, calls),
            compute=ActorPoolStrategy(
                size=actors.encoders,
                # One more than it works on: its pixels are there when it is done.
                max_tasks_in_flight_per_actor=calls + 1,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=calls > 1,
            ),
            num_cpus=actors.cpus_per_encoder,
            num_gpus=actors.gpus_per_encoder,
            runtime_env={"env_vars": thread_environment(threads)},
        )
    )


def thread_environment(threads: int) -> dict[str, str]:
    """What OpenMP reads when a process starts.

    Its threads wait for each other actively, unless told not to; where decoders and others take
    their turns on the same cores, that made an encoder of two threads six times as slow.
    """
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


@contextmanager
def _bounded_memory(plan: EncodingPlan, actors: Actors) -> Iterator[None]:
    """Within it, decoders of a pipeline that is made wait when enough blocks are ready.

    Ray Data 2.60 grants the decoders half of the limit and keeps the rest for what encoders give.
    """
    import ray.data
    from ray.data import ExecutionResources

    block_bytes = plan.config.block_bytes(plan.model.image_size)
    context = ray.data.DataContext.get_current().copy()
    # A block of squares is larger than this, by its captions: each is handed on at once, alone.
    context.target_max_block_size = block_bytes
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=2 * actors.blocks * block_bytes
    )
    with ray.data.DataContext.current(context):
        yield


def _commit_all(
    plan: EncodingPlan, pending: Sequence[str], batches: Iterable["pa.Table"]
) -> dict[str, float]:
    """Commit the shards whose blocks these are.

    The figures: images a second from the making of the actors to the last commit, how much of that
    went before the first block was there (processes started, models loaded), and the share of the
    encoders' time, from ready to their last block each, in which they encoded.
    """
    committer = TokenCommitter(plan)
    clocks: dict[str, tuple[float, float]] = {}
    started = time.monotonic()
    before = plan.filtered.rows_out - plan.pictures(pending)
    rows = images = 0
    first_block = 0.0
    total, commits = len(plan.writer.shards), len(plan.writer.shards) - len(pending)
    with Progress(STAGE, plan.filtered.rows_out, "pictures") as progress:
        progress.set(before)
        for batch in batches:
            first_block = first_block or time.monotonic() - started
            for place in range(len(batch)):
                row = batch.slice(place, 1)
                block = TokenBlock.from_row(row)
                commits += committer.add(block) is not None
                rows += len(block.kept) + len(block.dropped)
                images += len(block.kept)
                _read_clocks(row, clocks)
            rate = images / (time.monotonic() - started)
            done = before + rows // plan.config.crops_per_picture
            progress.set(done, f"{commits}/{total} shards, {rate:.1f} images/s")
    committer.close()
    busy, seconds = (sum(clock[side] for clock in clocks.values()) for side in (0, 1))
    return {
        "images_per_second": round(images / (time.monotonic() - started), 2),
        "seconds_to_first_block": round(first_block, 1),
        "encoder_busy": round(busy / seconds, 3),
    }


def _read_clocks(row: "pa.Table", clocks: dict[str, tuple[float, float]]) -> None:
    """Keep the latest (busy seconds, seconds) of each encoder; blocks may overtake each other."""
    name, *clock = (row[column][0].as_py() for column in ("encoder", "busy_seconds", "seconds"))
    clocks[name] = max(clocks.get(name, (0.0, 0.0)), (clock[0], clock[1]), key=lambda c: c[1])

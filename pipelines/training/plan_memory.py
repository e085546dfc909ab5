"""The memory that a worker needs to train the prior, counted from the settings.

One update is followed moment by moment: what is kept for the backward pass shrinks while gradients
grow, and the largest moment counts. All terms are arithmetic on the code's own tensors; a test
holds them against what torch allocates on a CPU. Those of a GPU differ in attention and GELU only,
and are not measured.

Letters: B pictures at once, T stream length, C model width, N = B · T · C, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from models.attention import LayerKind, MaskedAttention
from models.prior import PriorConfig
from pipelines.training.plan_network import compressed_shapes
from pipelines.training.prior_training import PriorTraining

Device = Literal["cpu", "cuda"]
FP32 = 4

Kinds = dict[str, float]
"""Bytes by kind: weights, lower bits, moments, average, PowerSGD, gradients, gathered weights,
16-bit weights, activations, logits, working space."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training on so many workers, and the sizes that everything is made of."""

    model: PriorConfig
    training: PriorTraining
    workers: int
    device: Device = "cuda"
    shards: int = field(init=False)
    pictures: int = field(init=False)
    """At once on a worker."""

    def __post_init__(self) -> None:
        training = self.training
        together = self.workers * training.micro_batches
        if training.batch_samples % together:
            raise ValueError(
                "batch_samples must divide by workers · micro_batches, "
                f"got {training.batch_samples}, {self.workers} · {training.micro_batches}"
            )
        training.check_workers(self.workers)
        object.__setattr__(self, "shards", training.sharding.shards(self.workers))
        object.__setattr__(self, "pictures", training.batch_samples // together)

    @property
    def stream(self) -> float:
        """N, the numbers of the residual stream."""
        return self.pictures * self.model.stream_len * self.model.d_model

    @property
    def branch(self) -> int:
        """Bytes of a number in a resblock's branch."""
        return FP32 if self.training.precision == "fp32" else 2

    @property
    def split(self) -> bool:
        return self.training.optimizer.master == "split"

    @property
    def in_backward(self) -> bool:
        return self.training.optimizer.step == "in_backward"

    @property
    def casts_weights(self) -> bool:
        """Whether a worker makes 16-bit copies of whole fp32 matrices."""
        return self.branch < FP32 and self.shards == 1 and not self.split


@dataclass(frozen=True)
class Block:
    """A resblock: its parameters, and bytes of what it makes."""

    matrices: float
    """Numbers of its matrices; its gains and biases are `vectors`."""
    vectors: float
    kept: float
    """For the backward pass, without recomputation: beyond the stream."""
    products: float
    """Of it or in its place, what selective recomputation keeps."""
    working: float
    """Made and dropped in its backward pass, beyond the stream's gradient."""


def blocks_of(setting: Setting) -> Iterator[Block]:
    """In the order of the forward pass."""
    model, n, a = setting.model, setting.stream, setting.branch
    width = model.d_model
    for kind in model.kinds:
        yield Block(
            matrices=4 * width**2,
            vectors=6 * width,
            kept=a * (1 + 3 + 1) * n + _attention_kept(setting, kind),
            products=a * 3 * n,
            working=a * 6 * n + max(_attention_kept(setting, kind), a * 3 * n),
        )
        yield Block(
            matrices=8 * width**2,
            vectors=7 * width,
            # The second factor's input, and GELU's input or slope.
            kept=a * (1 + 4 + 4) * n,
            products=a * 4 * n,
            working=a * 5 * n,
        )


def state_of(setting: Setting) -> Kinds:
    """What lies in memory the whole time."""
    optimizer = setting.training.optimizer
    matrices, vectors, root = parameter_counts(setting.model)
    s = setting.shards
    fp32 = vectors + root / s  # numbers that are in fp32 whatever is chosen
    moment = FP32 if optimizer.moments == "fp32" else 2
    kinds: Kinds = {
        "weights": (2 if setting.split else FP32) * matrices / s + FP32 * fp32,
        "moments": 2 * (moment * matrices / s + FP32 * fp32),
    }
    if setting.split:
        kinds["lower bits"] = 2 * matrices / s
    if setting.training.averaging.keep_on == "device":
        kinds["average"] = FP32 * (matrices / s + fp32)
    if setting.training.sharding.power_sgd.enabled and setting.workers > s:
        kinds["PowerSGD"] = _power_sgd(setting)
    return kinds


def peak_memory(setting: Setting) -> Kinds:
    """Bytes by kind at the moment that needs the most."""
    state = state_of(setting)
    moments = [state | moment for moment in _moments(setting)]
    return max(moments, key=lambda kinds: sum(kinds.values()))


def parameter_counts(model: PriorConfig) -> tuple[float, float, float]:
    """Numbers of the resblocks' matrices, of their gains and biases, and of all else."""
    width = model.d_model
    vocabularies = model.text_vocab_size + model.image_vocab_size
    root = 2 * vocabularies * width + vocabularies + 2 * width  # embeddings, heads, last LayerNorm
    root += (2 * model.text_len + 2 * model.grid) * width
    return 12 * model.n_layers * width**2, 13 * model.n_layers * width, root


def _moments(setting: Setting) -> Iterator[Kinds]:
    """From the heads' backward pass to the update: all but the state."""
    n = setting.stream
    blocks = list(blocks_of(setting))
    kept = [_kept(setting, block) for block in blocks]
    copies = [2 * block.matrices if _keeps_copies(setting) else 0.0 for block in blocks]
    before = _accumulated(setting)
    heads = _head_gradients(setting)
    # The last LayerNorm's input and output, what the heads read, and gradients of all three.
    yield {
        "activations": sum(kept) + 3 * FP32 * n,
        "16-bit weights": sum(copies),
        "logits": _logits(setting),
        "gradients": max(before, heads),
        "gathered weights": _gathered(setting, blocks),
        "working space": FP32 * n,
    }
    done = heads / setting.shards
    for index in reversed(range(len(blocks))):
        block = blocks[index]
        own = FP32 * (block.matrices + block.vectors)
        made = block.working + _made_again(setting, block)
        if setting.shards > 1:
            own += FP32 * block.matrices / setting.shards + setting.branch * block.matrices
        if not _keeps_copies(setting) and setting.casts_weights:
            made += 2 * block.matrices
        yield {
            "activations": sum(kept[: index + 1]),
            "16-bit weights": sum(copies[: index + 1]),
            "gradients": max(before, 0 if setting.in_backward else done) + own,
            "gathered weights": _gathered(setting, blocks[: index + 1]),
            "working space": made + 2 * FP32 * n,
        }
        done += FP32 * (block.matrices / setting.shards + block.vectors)
    if not setting.in_backward:
        yield {"gradients": _all_gradients(setting) / setting.shards}


def _kept(setting: Setting, block: Block) -> float:
    """For a resblock's backward pass: the stream before it, in fp32, and what is not recomputed."""
    stream = FP32 * setting.stream
    if setting.training.recompute == "full":
        return stream
    if setting.training.recompute == "selective":
        return stream + block.products
    return stream + block.kept


def _made_again(setting: Setting, block: Block) -> float:
    if setting.training.recompute == "none":
        return 0.0
    if setting.training.recompute == "full":
        return block.kept
    return block.kept - setting.branch * setting.stream  # one of its halves at a time


def _keeps_copies(setting: Setting) -> bool:
    return setting.casts_weights and setting.training.recompute == "none"


def _attention_kept(setting: Setting, kind: LayerKind) -> float:
    """Beyond queries, keys, values and outcome."""
    model = setting.model
    heads = setting.pictures * model.n_heads
    if setting.device == "cuda" or kind == "full":
        # The outcome is copied where heads come side by side; a sum's logarithm for each query.
        return setting.branch * setting.stream + FP32 * heads * model.stream_len
    attend = MaskedAttention(model.text_len, model.grid, model.conv_kernel)
    keys = attend.keys_of(kind)
    numbers = heads * (model.text_len**2 + model.image_len * keys)
    return setting.branch * numbers


def _logits(setting: Setting) -> float:
    model = setting.model
    text = (model.text_len - 1) * model.text_vocab_size
    return FP32 * setting.pictures * (text + model.image_len * model.image_vocab_size)


def _head_gradients(setting: Setting) -> float:
    model = setting.model
    return FP32 * (model.text_vocab_size + model.image_vocab_size) * model.d_model


def _all_gradients(setting: Setting) -> float:
    return FP32 * sum(parameter_counts(setting.model))


def _accumulated(setting: Setting) -> float:
    """Gradients of earlier micro-batches: FSDP adds them up before it shards them."""
    return _all_gradients(setting) if setting.training.micro_batches > 1 else 0.0


def _gathered(setting: Setting, blocks: list[Block]) -> float:
    """When the last of these resblocks is at work: its weights, the next one's and the buffer that
    they come in; in fp32 what is no resblock's."""
    if setting.shards == 1:
        return 0.0
    *_, root = parameter_counts(setting.model)
    largest = max(block.matrices for block in blocks)
    held = 3 * largest
    if setting.training.sharding.keep_gathered:
        held = sum(block.matrices for block in blocks)
    return setting.branch * held + FP32 * root


def _power_sgd(setting: Setting) -> float:
    """Errors, sketches, and what a resblock's compression works with."""
    config = setting.training.sharding.power_sgd
    shapes = list(compressed_shapes(setting.model, setting.training.sharding, setting.shards))
    errors = sum(rows * columns for rows, columns in shapes)
    sketches = {(max(shape), config.rank(*shape)) for shape in shapes}
    largest = max((rows * columns for rows, columns in shapes), default=0)
    # Two matrices of an MLP at once: M, what is sent of it and a new error.
    return FP32 * (errors + sum(n * r for n, r in sketches) + 2 * 3 * largest)

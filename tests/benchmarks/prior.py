"""One update of the prior against other people's models, and its attention against torch's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import MaskedAttention, stream_mask
from models.flexible_attention import SparseKind
from models.prior import Prior, PriorConfig
from pipelines.training.optimizer import build_optimizer
from pipelines.training.prior_training import PriorOptimizerConfig
from tests.benchmarks import peers
from tests.benchmarks.measure import Effort, Row, compare_speed

# The paper's stream of 256 + 1,024 tokens, in a model that a core updates in a second.
LONG = PriorConfig(n_layers=8, n_heads=4, d_model=256, text_vocab_size=1280, image_vocab_size=512)
SHORT = replace(LONG, n_layers=4, d_model=64, text_len=16, text_vocab_size=128, grid=8)
KINDS: tuple[SparseKind, ...] = ("row", "column", "conv")
HEADS, HEAD_DIM = 4, 64
LARGEST_ERROR = 1e-5  # of the norm, fp32
LARGEST_DIFFERENCE = 0.03  # of the parameters
LESSONS = 5  # updates in which a model must have learned something of its one batch
LR = 1e-3

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Learner:
    """A model and how it makes the loss of a batch that is always the same."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    packages: tuple[str, ...]
    about: str = ""

    @property
    def millions(self) -> float:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6

    def update(self, precision: Precision) -> float:
        """Forward, backward, AdamW; the loss before it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def rows(effort: Effort) -> list[Row]:
    """At the paper's lengths; with less than the usual effort, at short ones."""
    config = LONG if effort.rows >= Effort().rows else SHORT
    made = [attention_row(kind, config, effort.repeats) for kind in KINDS]
    for peer, suffix in ((dalle_pytorch, ""), (gpt2, "-gpt2")):
        made += [
            training_row(f"train-step-fp32{suffix}", config, peer, "fp32", "fp32", effort),
            training_row(f"train-step-bf16{suffix}", config, peer, "bf16", "fp32", effort),
            training_row(f"train-step-both-bf16{suffix}", config, peer, "bf16", "bf16", effort),
        ]
    return made


def attention_row(kind: SparseKind, config: PriorConfig, repeats: int) -> Row:
    """Forward and all three gradients of one layer's attention."""
    torch.manual_seed(0)
    length = config.stream_len
    qkv = torch.randn(3, 1, HEADS, length, HEAD_DIM, requires_grad=True)
    q, k, v = (part.detach().clone().requires_grad_() for part in qkv)
    gradient = torch.randn(1, HEADS, length, HEAD_DIM)
    attend = MaskedAttention(config.text_len, config.grid, config.conv_kernel)
    mask = stream_mask(kind, config.text_len, config.grid, config.conv_kernel)

    def ours() -> tuple[Tensor, ...]:
        y = attend(kind, qkv)
        return y, *torch.autograd.grad(y, qkv, gradient)[0]

    def theirs() -> tuple[Tensor, ...]:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y, *torch.autograd.grad(y, (q, k, v), gradient)

    for mine, other in zip(ours(), theirs(), strict=True):
        assert ((mine - other).norm() / other.norm()).item() <= LARGEST_ERROR
    return compare_speed(
        f"sparse-attention-fp32-{kind}",
        peer="torch SDPA, bool mask",
        precision="fp32",
        work=length,
        what="tokens",
        ours=ours,
        theirs=theirs,
        repeats=repeats,
        packages=("torch",),
        note=f"forward and backward, {HEADS} heads of {HEAD_DIM}, {lengths(config)}",
    )


def training_row(
    row: str,
    config: PriorConfig,
    peer: Callable[[PriorConfig], Learner],
    our_precision: Precision,
    their_precision: Precision,
    effort: Effort,
) -> Row:
    """Whole updates of models of one size; both must learn."""
    mine, other = manray(config), peer(config)
    assert abs(mine.millions / other.millions - 1) <= LARGEST_DIFFERENCE
    for learner, precision in ((mine, our_precision), (other, their_precision)):
        losses = [learner.update(precision) for _ in range(LESSONS)]
        assert math.isfinite(losses[0])
        assert losses[-1] < losses[0], f"{learner.name} learned nothing"
    same = our_precision == their_precision
    return compare_speed(
        row,
        peer=other.name,
        precision=our_precision if same else f"{our_precision}, theirs {their_precision}",
        work=config.stream_len,
        what="tokens",
        ours=lambda: mine.update(our_precision),
        theirs=lambda: other.update(their_precision),
        repeats=effort.repeats,
        packages=other.packages,
        note=f"{mine.millions:.2f} M parameters, theirs {other.millions:.2f} M: {other.about}; "
        f"{lengths(config)}, one picture",
    )


def manray(config: PriorConfig) -> Learner:
    prior = Prior(config)
    prior.init_weights(0)
    text, image = tokens(config)
    optimizer = build_optimizer(prior, PriorOptimizerConfig(peak_lr=LR, moments="fp32"))
    return Learner("manray", prior, optimizer, lambda: prior(text, image).total, ("torch",))


def dalle_pytorch(config: PriorConfig) -> Learner:
    torch.manual_seed(0)
    model = peers.dalle_pytorch(config)
    text, image = tokens(config)
    return Learner(
        "dalle-pytorch 1.6.6, row/column/conv",
        model,
        fused_adamw(model),
        lambda: model(text, image, return_loss=True),
        ("torch", "dalle-pytorch"),
        f"{peers.geglu_layers(config)} layers to our {config.n_layers}, "
        "because its GEGLU has a third more weights a layer",
    )


def gpt2(config: PriorConfig) -> Learner:
    torch.manual_seed(0)
    model = peers.gpt2(config)
    text, image = tokens(config)
    stream = torch.cat((text, image + config.text_vocab_size), dim=1)
    return Learner(
        "transformers GPT-2, SDPA",
        model,
        fused_adamw(model),
        lambda: model(input_ids=stream, labels=stream).loss,
        ("torch", "transformers"),
        "the same layers, dense causal attention, one vocabulary",
    )


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What ours uses: the comparison is of the models."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def tokens(config: PriorConfig) -> tuple[Tensor, Tensor]:
    """A caption without padding, which would spare ours some work, and a picture."""
    generator = torch.Generator().manual_seed(0)
    words = config.text_vocab_size - config.text_len  # dalle-pytorch keeps the rest for padding
    text = torch.randint(2, words, (1, config.text_len), generator=generator)
    codes = (1, config.image_len)
    return text, torch.randint(0, config.image_vocab_size, codes, generator=generator)


def lengths(config: PriorConfig) -> str:
    return f"{config.text_len} + {config.image_len} tokens"

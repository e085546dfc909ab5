"""The autoregressive prior: a sparse transformer over one stream of text and image tokens.

Decisions where the paper is silent (fact sheet A9), kept stable because checkpoints depend on them:
pre-LayerNorm resblocks with GELU (tanh form) and biases, no dropout, untied embeddings. Text slot 0
holds the start token. A caption of n tokens is followed by padding; the first padding slot is
predicted like a token and so ends the caption, later ones carry no loss. The output at a token
predicts the next one; the output at the last text slot predicts image token 0, which makes it the
paper's start-of-image token.

Letters: B batch, T stream length, C model width.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import LayerKind, MaskedAttention, SelfAttention, layer_kinds
from models.head_loss import mean_cross_entropy
from models.linear import Linear, gelu
from models.resblock_scaling import ScaleGradient, UnscaleGradient

PAD_ID = 0
START_ID = 1


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Sizes of the autoregressive prior. The defaults are the paper's 12B model (appendix B.1)."""

    n_layers: int = 64
    """Transformer layers, of two resblocks each: attention and MLP."""
    n_heads: int = 62
    d_model: int = 3968
    """Width of the residual stream; must divide by n_heads."""
    text_len: int = 256
    """Text slots: the start token and up to text_len - 1 caption tokens, the rest padding."""
    text_vocab_size: int = 16384
    grid: int = 32
    """Image tokens a side."""
    image_vocab_size: int = 8192
    conv_kernel: int = 11
    """Extent of the last layer's convolutional attention."""
    attention: Literal["sparse", "full"] = "sparse"
    """The paper's masks, or dense causal attention in every layer, for comparison."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "d_model", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must divide by n_heads, got {self.d_model}, {self.n_heads}")
        if self.text_len < 2:
            raise ValueError(
                f"text_len must be at least 2 (start and one token), got {self.text_len}"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def image_len(self) -> int:
        return self.grid * self.grid

    @property
    def stream_len(self) -> int:
        return self.text_len + self.image_len

    @property
    def n_resblocks(self) -> int:
        """Units of gradient scaling, of activation checkpointing and of sharding."""
        return 2 * self.n_layers

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The mask of every layer."""
        if self.attention == "sparse":
            return layer_kinds(self.n_layers)
        full: LayerKind = "full"
        return (full,) * self.n_layers


class PriorLosses(NamedTuple):
    """Cross-entropies in nats per token."""

    text: Tensor
    image: Tensor

    @property
    def total(self) -> Tensor:
        """What is trained: the picture is what matters (paper, appendix B.1)."""
        return self.text / 8 + self.image * 7 / 8


def counted(text_tokens: Tensor) -> Tensor:
    """Which slots 1 … of captions (B, T) have a loss, (B, T - 1): not padding behind padding."""
    return (text_tokens[:, 1:] != PAD_ID) | (text_tokens[:, :-1] != PAD_ID)


class Resblock(nn.Module):
    """x + branch(LayerNorm(x)), the stream in fp32 and the branch in the autocast precision.

    `gradient_scale` is None (off) or this block's scale, a 0-d view of `ResblockScales.values`.
    `recomputes` keeps only what large products made: see `kept`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)
        self.gradient_scale: Tensor | None = None
        self.recomputes = False

    def enter(self, x: Tensor) -> Tensor:
        scale = self.gradient_scale
        normed: Tensor = self.ln(x if scale is None else UnscaleGradient.apply(x, scale))
        return normed

    def leave(self, x: Tensor, branch: Tensor) -> Tensor:
        scale = self.gradient_scale
        return x + (branch.float() if scale is None else ScaleGradient.apply(branch, scale))

    def kept(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x); with `recomputes`, only x outlives it, and the rest is made again backwards.

        A product at the function's end is not made again: autograd asks for its factors, and has
        them before it would start. The oneDNN path of fp32 on a CPU does make it again.
        """
        if not self.recomputes:
            return function(x)
        # There is no dropout, so no generator's state to bring back.
        y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
        return y


class AttentionResblock(Resblock):
    """Attention under the layer's mask."""

    def __init__(self, config: PriorConfig, kind: LayerKind, attend: MaskedAttention) -> None:
        super().__init__(config.d_model)
        self.kind, self.attend = kind, attend
        self.attn = SelfAttention(config.d_model, config.n_heads)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        qkv = self.kept(lambda stream: self.attn.stack(self.enter(stream)), x)
        branch = self.kept(lambda qkv: self.attn.merge(self.attend(self.kind, qkv)), qkv)
        return self.leave(x, branch)


class MLPResblock(Resblock):
    """Two linear layers, four times as wide between them (paper, table 2)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config.d_model)
        self.c_fc: nn.Linear = Linear(config.d_model, 4 * config.d_model)
        self.c_proj: nn.Linear = Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        h = self.kept(lambda stream: self.c_fc(self.enter(stream)), x)  # (B, T, 4C)
        return self.leave(x, self.kept(lambda h: self.c_proj(gelu(h)), h))


def count_parameters(config: PriorConfig) -> int:
    """Parameters of a prior, counted without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Prior(config).parameters())


def initial_values(
    parameters: Mapping[str, Tensor], config: PriorConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and initial value on the CPU, one at a time (the paper is silent, A9).

    | parameter                               | distribution                |
    |-----------------------------------------|-----------------------------|
    | embeddings, positions, padding, Linear  | N(0, 0.02²)                 |
    | c_proj, the last Linear of a branch     | N(0, 0.02² / n_resblocks)   |
    | biases                                  | 0                           |
    | LayerNorm                               | gain 1, bias 0              |

    A value depends on the seed and the name alone: not on how the model is sharded, nor on its
    depth.
    """
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            yield name, torch.zeros(parameter.shape)
        elif ".ln." in name or name.startswith("ln_final"):
            yield name, torch.ones(parameter.shape)
        else:
            deviation = 0.02 / (config.n_resblocks**0.5 if "c_proj" in name else 1.0)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            yield name, torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)


class Prior(nn.Module):
    """p(text, image tokens)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.text_embedding = nn.Embedding(config.text_vocab_size, width)
        self.text_position = nn.Parameter(torch.empty(config.text_len, width))
        self.pad_embedding = nn.Parameter(torch.empty(config.text_len, width))
        self.image_embedding = nn.Embedding(config.image_vocab_size, width)
        self.row_position = nn.Parameter(torch.empty(config.grid, width))
        self.column_position = nn.Parameter(torch.empty(config.grid, width))
        self.resblocks = nn.ModuleList()  # attention, MLP, attention, MLP …
        attend = MaskedAttention(config.text_len, config.grid, config.conv_kernel)
        for kind in config.kinds:
            self.resblocks.append(AttentionResblock(config, kind, attend))
            self.resblocks.append(MLPResblock(config))
        self.ln_final = nn.LayerNorm(width)
        self.text_head = Linear(width, config.text_vocab_size)
        self.image_head = Linear(width, config.image_vocab_size)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise every parameter, see `initial_values`."""
        parameters = dict(self.named_parameters())
        for name, value in initial_values(parameters, self.config, seed):
            parameters[name].copy_(value)

    def forward(self, text_tokens: Tensor, image_tokens: Tensor) -> PriorLosses:
        """Means over the tokens of captions (B, text_len) and their pictures (B, grid²), int64."""
        x = self.encode(text_tokens, image_tokens)
        text_x, image_x = x[:, : self.config.text_len - 1], x[:, self.config.text_len - 1 : -1]
        counts = counted(text_tokens)
        text = mean_cross_entropy(text_x[counts], self.text_head, text_tokens[:, 1:][counts])
        image = mean_cross_entropy(image_x.flatten(0, 1), self.image_head, image_tokens.flatten())
        return PriorLosses(text=text, image=image)

    def logits(self, text_tokens: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 logits of text slots 1… (B, text_len - 1, V) and of the image tokens (B, grid², K).

        Separate heads: a text position never scores image tokens, nor the other way round.
        """
        x = self.encode(text_tokens, image_tokens)
        text_len = self.config.text_len
        return self.score_text(x[:, : text_len - 1]), self.score_image(x[:, text_len - 1 : -1])

    def encode(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """(B, T, C): what scores the token after each."""
        self.check_tokens(text_tokens, image_tokens)
        x = torch.cat((self.embed_text(text_tokens), self.embed_image(image_tokens)), dim=1)
        for resblock in self.resblocks:
            x = resblock(x)
        x = self.ln_final(x)
        return x

    def embed_text(self, text_tokens: Tensor) -> Tensor:
        """(B, text_len) -> (B, text_len, C) fp32; each padding slot has an embedding of its own."""
        tokens = self.text_embedding(text_tokens)
        tokens = torch.where(text_tokens[..., None] == PAD_ID, self.pad_embedding, tokens)
        return tokens + self.text_position

    def embed_image(self, image_tokens: Tensor, start: int = 0) -> Tensor:
        """(B, n) tokens at raster positions start … start + n - 1 -> (B, n, C) fp32."""
        index = torch.arange(start, start + image_tokens.shape[1], device=image_tokens.device)
        position = F.embedding(index // self.config.grid, self.row_position)
        position = position + F.embedding(index % self.config.grid, self.column_position)
        embedded: Tensor = self.image_embedding(image_tokens) + position
        return embedded

    def score_text(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, V) in fp32: 16-bit logits moved the paper's loss curve (appendix D.2)."""
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.text_head(x.float())
        return logits

    def score_image(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, K) in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.image_head(x.float())
        return logits

    def check_tokens(self, text_tokens: Tensor, image_tokens: Tensor) -> None:
        """Refuse what an embedding would answer with a crash, or worse, with another row."""
        config = self.config
        for name, tokens, length, vocab_size in (
            ("text_tokens", text_tokens, config.text_len, config.text_vocab_size),
            ("image_tokens", image_tokens, config.image_len, config.image_vocab_size),
        ):
            if tokens.ndim != 2 or tokens.shape[1] != length or tokens.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be int64 (B, {length}), got {tokens.dtype} {tuple(tokens.shape)}"
                )
            # On a GPU the look would wait for the device in every step; there the loader's check
            # stands.
            if tokens.device.type == "cpu" and tokens.numel():
                low, high = int(tokens.min()), int(tokens.max())
                if low < 0 or high >= vocab_size:
                    raise ValueError(f"{name} must be in [0, {vocab_size}), got {low} … {high}")

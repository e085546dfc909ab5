"""The contrastive model that ranks pictures by how well they fit a caption (Radford et al., 2021).

"CLIP" below is that paper, arXiv:2103.00020. DALL·E's paper reranks with "a pretrained contrastive
model" (section 2.6) and says no more about it; the sizes are CLIP's ViT-B/32.

Letters: B batch, S picture side, P patches, T text slots, C width of a tower, E shared width.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import SelfAttention
from models.linear import Linear

# Of the pictures that CLIP was trained on, by channel; its released code, and open_clip's default.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
FIRST_SCALE = 1 / 0.07  # CLIP, section 2.5
LARGEST_SCALE = 100.0  # CLIP, section 2.5 and table 18

Gather = Callable[[Tensor], Tensor]
"""This rank's rows (B, F) to those of all ranks in their order (world · B, F), differentiable."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of both towers. The defaults are CLIP's ViT-B/32 (tables 19 and 20) with its 77 slots.

    The picture side and the vocabulary are ours: 256 and 16,384 in place of 224 and 49,408.
    """

    image_size: int = 256
    patch_size: int = 32
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    text_len: int = 77
    """Slots of a caption; longer ones are cut off."""
    vocab_size: int = 16_384
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    embed_width: int = 512
    """Width of what pictures and captions have in common."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Between the layers of an MLP; OpenAI's released weights want quick_gelu, x·σ(1.702·x)."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.patch_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and "
                f"{self.patch_size}"
            )
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if heads < 1 or width < 1 or width % heads:
                raise ValueError(
                    f"{tower}_width must be a multiple of {tower}_heads, got {width} and {heads}"
                )
        for name, least in (
            ("image_layers", 1),
            ("text_layers", 1),
            ("text_len", 2),
            ("vocab_size", 2),
            ("embed_width", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation must be gelu or quick_gelu, got {self.activation!r}")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Resblock(nn.Module):
    """Attention, then two linear layers four times as wide between them, each on what it gets."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)
        self.is_quick = activation == "quick_gelu"

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:  # (B, T, C)
        q, k, v = self.attn.project(self.ln_1(x))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        x = x + self.attn.merge(attended)
        hidden = self.c_fc(self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.is_quick else F.gelu(hidden)
        return x + self.c_proj(hidden)


class ImageTower(nn.Module):
    """A vision transformer; the class token's last state stands for the picture."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.image_width
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(1 + config.patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.resblocks = nn.ModuleList(
            Resblock(width, config.image_heads, config.activation)
            for _ in range(config.image_layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_width, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 3, S, S) normalised -> (B, E)
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, C)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat((first, x), dim=1) + self.position)
        for resblock in self.resblocks:
            x = resblock(x, is_causal=False)
        features: Tensor = self.projection(self.ln_post(x[:, 0]))
        return features


class TextTower(nn.Module):
    """A causal transformer; the state at a caption's end stands for the caption."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.text_width
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.position = nn.Parameter(torch.empty(config.text_len, width))
        self.resblocks = nn.ModuleList(
            Resblock(width, config.text_heads, config.activation) for _ in range(config.text_layers)
        )
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.embed_width, bias=False)

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:  # (B, T), (B,) -> (B, E)
        x = self.embedding(tokens) + self.position
        for resblock in self.resblocks:
            x = resblock(x, is_causal=True)
        last = self.ln_final(x[torch.arange(len(x), device=x.device), ends])
        features: Tensor = self.projection(last)
        return features


class Clip(nn.Module):
    """Two towers whose unit vectors are near each other where picture and caption are a pair."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.image, self.text = ImageTower(config), TextTower(config)
        self.logit_scale = nn.Parameter(torch.empty(()))
        """ln of the factor of the cosines, the inverse temperature."""

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise every parameter, see `initial_values`."""
        parameters = dict(self.named_parameters())
        for name, value in initial_values(parameters, self.config, seed):
            parameters[name].copy_(value)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors (B, E) fp32 of pictures (B, 3, S, S) with values in [0, 1]."""
        side = self.config.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixels must be (B, 3, {side}, {side}), got {tuple(pixels.shape)}: scale them"
            )
        mean, deviation = (
            torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(3, 1, 1)
            for values in (PIXEL_MEAN, PIXEL_DEVIATION)
        )
        return F.normalize(self.image((pixels - mean) / deviation).float(), dim=-1)

    def encode_texts(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Unit vectors (B, E) fp32 of captions (B, T) int64, whose last slots are `ends` (B,)."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.text_len:
            raise ValueError(
                f"tokens must be (B, {self.config.text_len}), got {tuple(tokens.shape)}"
            )
        return F.normalize(self.text(tokens, ends).float(), dim=-1)

    def scale(self) -> Tensor:
        """The factor of the cosines."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the factor at 100 or less; to be called after every update."""
        self.logit_scale.clamp_(max=math.log(LARGEST_SCALE))


def count_parameters(config: ClipConfig) -> int:
    """Parameters of a model, counted without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Clip(config).parameters())


class Matching(NamedTuple):
    """How well a batch's pictures and captions found each other."""

    loss: Tensor
    """Mean of this rank's cross-entropies, pictures among captions and captions among pictures."""
    accuracy: Tensor
    """Share of this rank's pictures that are nearest to their own caption of the whole batch."""


def own_batch(features: Tensor) -> Tensor:
    """The `Gather` of a single process."""
    return features


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, *, gather: Gather = own_batch, rank: int = 0
) -> Matching:
    """Symmetric cross-entropy over the batch of all ranks (CLIP, figure 3), unit vectors (B, E).

    A rank scores its own pictures with everybody's captions and its own captions with everybody's
    pictures: the mean of the ranks' losses, and of its gradients, is that of the whole batch in one
    process. A pair belongs together by its place, so two equal captions are taken for different.
    """
    with torch.autocast(images.device.type, enabled=False):
        # One gather for both: its backward pass is a reduction over the ranks.
        everyone = gather(torch.cat((images, texts), dim=1)).chunk(2, dim=1)
        image_logits = scale * images @ everyone[1].T  # (B, world · B)
        text_logits = scale * texts @ everyone[0].T
    targets = torch.arange(len(images), device=images.device) + rank * len(images)
    losses = [F.cross_entropy(logits, targets) for logits in (image_logits, text_logits)]
    hits = image_logits.detach().argmax(dim=1) == targets
    return Matching(loss=(losses[0] + losses[1]) / 2, accuracy=hits.float().mean())


def initial_values(
    parameters: Mapping[str, Tensor], config: ClipConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name and initial value on the CPU (CLIP's released code).

    | parameter                              | distribution                              |
    |----------------------------------------|-------------------------------------------|
    | text embedding, text positions         | N(0, 0.02²), N(0, 0.01²)                  |
    | patches, class, image positions        | N(0, 1 / C)                               |
    | attn.c_attn                            | N(0, 1 / C)                               |
    | attn.c_proj, c_proj                    | N(0, 1 / (2 · C · layers))                |
    | c_fc                                   | N(0, 1 / (2 · C))                         |
    | projections                            | N(0, 1 / C)                               |
    | biases, LayerNorm                      | 0; gain 1, bias 0                         |
    | logit_scale                            | ln(1 / 0.07)                              |

    The patches' and the image tower's inner distributions are torch's defaults there; ours are the
    text tower's, which are written down. A value depends on the seed and the name alone.
    """
    for name, parameter in parameters.items():
        if name == "logit_scale":
            yield name, torch.tensor(math.log(FIRST_SCALE))
        elif name.endswith("bias"):
            yield name, torch.zeros(parameter.shape)
        elif ".ln_" in name:
            yield name, torch.ones(parameter.shape)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            deviation = _deviation(name, config)
            yield name, torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)


def _deviation(name: str, config: ClipConfig) -> float:
    tower, _, rest = name.partition(".")
    if tower == "text" and rest in ("embedding.weight", "position"):
        return 0.02 if rest == "embedding.weight" else 0.01
    width = getattr(config, f"{tower}_width")
    deviation: float = width**-0.5
    if "c_fc" in rest:
        return deviation * 2**-0.5
    if "c_proj" in rest:
        return deviation * float((2 * getattr(config, f"{tower}_layers")) ** -0.5)
    return deviation

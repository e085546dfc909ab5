"""Stage one: pictures to a grid of codes and back. What the dVAE and the VQ-VAE have in common.

Architecture and parameter names are those of the released openai/DALL-E code, so that its state
dicts load strictly. Letters: B batch, H and W picture sides, K codes, g grid side, C channels.
"""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.likelihood import display_pixels, map_pixels

PICTURE_CHANNELS = 3
LIKELIHOOD_PARAMETERS = 2  # mu and ln b for every channel
INPUT_KERNEL = 7


@dataclass(frozen=True, kw_only=True)
class StageOneConfig:
    """Sizes of encoder and decoder. The defaults are the paper's: 256 px to 32x32 of 8192 codes."""

    image_size: int = 256
    """Side of the square pictures, in pixels."""
    vocab_size: int = 8192
    """Number of codes in the codebook."""
    n_hid: int = 256
    """Width of the outermost group; each group further in is twice as wide."""
    n_init: int = 128
    """Width of a code's vector where it enters the decoder."""
    group_count: int = 4
    """Groups of blocks; between two groups the picture's side is halved."""
    n_blk_per_group: int = 2
    """Residual blocks in a group."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_hid", "n_init", "group_count", "n_blk_per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vocab_size < 2 or self.vocab_size > 1 << 16:  # codes are stored as uint16
            raise ValueError(f"vocab_size must be 2 to 65536, got {self.vocab_size}")
        if self.n_hid % 4:
            raise ValueError(f"n_hid must divide by 4, got {self.n_hid}")
        if self.image_size < self.downsampling or self.image_size % self.downsampling:
            raise ValueError(
                f"image_size must be a multiple of {self.downsampling} (2 to the power of "
                f"group_count - 1), got {self.image_size}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels along the side of one code's square: 8 in the paper."""
        return 1 << (self.group_count - 1)

    @property
    def grid(self) -> int:
        """Codes along one side of the picture."""
        return self.image_size // self.downsampling

    @property
    def widths(self) -> list[int]:
        """Channels of each group, from the pixels inwards."""
        return [self.n_hid << group for group in range(self.group_count)]

    @property
    def residual_gain(self) -> float:
        """Factor on each residual path: 1 / n_layers squared, as in the released code."""
        return 1 / (self.group_count * self.n_blk_per_group) ** 2


class Conv2d(nn.Module):
    """A "same" convolution with the released code's parameter names `w` and `b`."""

    def __init__(self, n_in: int, n_out: int, kernel: int, *, keep_fp32: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.empty(n_out))
        self.keep_fp32 = keep_fp32
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """w: N(0, 1 / fan_in); b: 0 (released code)."""
        nn.init.normal_(self.w, std=1 / math.sqrt(self.w[0].numel()))
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor) -> Tensor:  # (B, n_in, H, W) -> (B, n_out, H, W)
        padding = self.w.shape[-1] // 2
        if not self.keep_fp32:
            return F.conv2d(x, self.w, self.b, padding=padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=padding)


class ResBlock(nn.Module):
    """Four pre-activated convolutions, `n_out / 4` channels wide inside, beside a skip path.

    With `upsample` the picture's side is doubled on the way. The released code doubles it before
    the block; what it runs next on both paths is a 1x1 convolution, which gives the same on the
    picture before doubling for a quarter of the work and memory.
    """

    def __init__(
        self, n_in: int, n_out: int, kernels: tuple[int, ...], gain: float, upsample: bool
    ) -> None:
        super().__init__()
        assert not upsample or kernels[0] == 1
        n_hid = n_out // 4
        sizes = [n_in, n_hid, n_hid, n_hid, n_out]
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Conv2d(sizes[i], sizes[i + 1], kernel)
        self.res_path = nn.Sequential(path)
        self.gain = gain
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        if not self.upsample:
            skip: Tensor = self.id_path(x)
            return skip + self.gain * self.res_path(x)
        narrow: Tensor = self.res_path[:2](x)  # relu_1 and conv_1
        return _double(self.id_path(x)) + self.gain * self.res_path[2:](_double(narrow))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) mapped to [0.1, 0.9] to features (B, feature_width, g, g) in fp32."""

    def __init__(self, config: StageOneConfig, feature_width: int) -> None:
        super().__init__()
        widths = config.widths
        n_ins = [widths[0], *widths[:-1]]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        blocks["input"] = Conv2d(PICTURE_CHANNELS, widths[0], INPUT_KERNEL)
        for i, (n_in, n_out) in enumerate(zip(n_ins, widths, strict=True)):
            group = _blocks(config, n_in, n_out, (3, 3, 3, 1), upsample=False)
            if i + 1 < config.group_count:
                group["pool"] = nn.MaxPool2d(2)
            blocks[f"group_{i + 1}"] = nn.Sequential(group)
        # The convolutions at the codes stay in fp32 under autocast, as in the released code.
        head = Conv2d(widths[-1], feature_width, 1, keep_fp32=True)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
        self.blocks = nn.Sequential(blocks)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(x)
        return features


class Decoder(nn.Module):
    """Codes' vectors (B, code_width, g, g) to mu and ln b of the pixels (B, 6, H, W)."""

    def __init__(self, config: StageOneConfig, code_width: int) -> None:
        super().__init__()
        widths = config.widths[::-1]
        n_ins = [config.n_init, *widths[:-1]]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        blocks["input"] = Conv2d(code_width, config.n_init, 1, keep_fp32=True)
        for i, (n_in, n_out) in enumerate(zip(n_ins, widths, strict=True)):
            group = _blocks(config, n_in, n_out, (1, 3, 3, 3), upsample=i > 0)
            blocks[f"group_{i + 1}"] = nn.Sequential(group)
        head = Conv2d(widths[-1], LIKELIHOOD_PARAMETERS * PICTURE_CHANNELS, 1)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
        self.blocks = nn.Sequential(blocks)

    def forward(self, codes: Tensor) -> Tensor:
        stats: Tensor = self.blocks(codes)
        return stats


class StageOne(nn.Module, ABC):
    """Encoder, codebook and decoder, with the checks and the pixel map that callers want."""

    def __init__(self, config: StageOneConfig, *, feature_width: int, code_width: int) -> None:
        """`feature_width` channels leave the encoder, `code_width` enter the decoder."""
        super().__init__()
        self.config = config
        self.encoder: nn.Module = Encoder(config, feature_width)
        self.decoder = Decoder(config, code_width)

    @abstractmethod
    def tokens_of(self, features: Tensor) -> Tensor:  # (B, C, g, g) -> (B, g, g) int64
        """The codes that the encoder's output stands for, without noise."""

    @abstractmethod
    def stats(self, tokens: Tensor) -> Tensor:  # (B, g, g) int64 -> (B, 6, H, W)
        """mu and ln b of the pixels of a grid of codes."""

    def features(self, pixels: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1] -> (B, C, g, g)
        """The encoder's output, in fp32."""
        self._check_pixels(pixels)
        features: Tensor = self.encoder(map_pixels(pixels))
        return features

    def encode(self, pixels: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1] -> (B, g, g) int64
        """The codes of pictures: what the prior is trained on."""
        return self.tokens_of(self.features(pixels))

    def decode(self, tokens: Tensor) -> Tensor:  # (B, g, g) int64 -> (B, 3, H, W) in [0, 1]
        """The pictures of a grid of codes, fit to be shown."""
        self._check_tokens(tokens)
        return display_pixels(self.stats(tokens).float())

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != PICTURE_CHANNELS:
            raise ValueError(f"pixels must be (B, 3, H, W), got {tuple(pixels.shape)}")
        if pixels.dtype != torch.float32:
            raise ValueError(f"pixels must be float32 in [0, 1], got {pixels.dtype}")
        step = self.config.downsampling
        if pixels.shape[2] % step or pixels.shape[3] % step:
            raise ValueError(
                f"pixels' height and width must be multiples of {step}, got {tuple(pixels.shape)}"
            )

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 3 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 (B, g, g), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        last = self.config.vocab_size - 1
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= last:
            raise ValueError(
                f"tokens must be 0 to {last}, got {int(tokens.min())} to {int(tokens.max())}"
            )


def _blocks(
    config: StageOneConfig, n_in: int, n_out: int, kernels: tuple[int, ...], *, upsample: bool
) -> OrderedDict[str, nn.Module]:
    """The blocks of one group; the first changes the width, and doubles the side if asked."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(config.n_blk_per_group):
        blocks[f"block_{i + 1}"] = ResBlock(
            n_in if i == 0 else n_out,
            n_out,
            kernels,
            gain=config.residual_gain,
            upsample=upsample and i == 0,
        )
    return blocks


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")

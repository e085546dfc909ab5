"""The two ends of a sampler: prompts become text tokens, image tokens become pictures.

Letters: P prompts, B pictures, T text slots, n image tokens of the first rows, H and W the
picture's sides.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.prior import PriorConfig
from models.stage_one import StageOne, StageOneConfig
from pipelines.data.tokenizer import CaptionTokenizer


class Codec:
    """A tokenizer and a dVAE (or VQ-VAE), for a prior of which only the config is needed."""

    def __init__(self, prior: PriorConfig, dvae: StageOne, tokenizer: CaptionTokenizer) -> None:
        """Raises ValueError if they do not fit."""
        check_fit(prior, dvae.config, tokenizer)
        self.prior_config, self.dvae, self.tokenizer = prior, dvae.eval(), tokenizer
        self.device = next(dvae.parameters()).device

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.dvae.config.image_size

    @property
    def prompt_limit(self) -> int:
        """Most tokens that a prompt can have: one slot is the start token's."""
        return self.prior_config.text_len - 1

    def check_prompt(self, prompt: str) -> int:
        """The prompt's length in tokens; refuses one that is blank or would be cut off."""
        return check_prompt(self.tokenizer, self.prompt_limit, prompt)

    @torch.inference_mode()
    def first_rows(self, picture: np.ndarray, rows: int) -> np.ndarray:
        """The image tokens of the upper `rows` of a picture (H, W, 3) uint8, to start from."""
        grid, side = self.prior_config.grid, self.image_size
        if not 1 <= rows <= grid:
            raise ValueError(f"primed rows must be 1 to the grid's {grid}, got {rows}")
        if picture.dtype != np.uint8 or picture.shape != (side, side, 3):
            raise ValueError(
                f"the picture to start from must be {side}×{side} pixels, uint8 RGB, "
                f"got {picture.dtype} {picture.shape}"
            )
        pixels = torch.tensor(picture, device=self.device).permute(2, 0, 1)[None].float() / 255
        return self.dvae.encode(pixels)[0, :rows].flatten().cpu().numpy()

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """int64 (P, T) on the models' device."""
        length = self.prior_config.text_len
        rows = np.stack([self.tokenizer.encode(prompt, length) for prompt in prompts])
        return torch.from_numpy(rows.astype(np.int64)).to(self.device)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> np.ndarray:
        """Pictures (B, H, W, 3) uint8 of image tokens (B, grid²)."""
        grid = self.prior_config.grid
        pixels = self.dvae.decode(tokens.to(self.device).view(-1, grid, grid))
        return (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def check_prompt(tokenizer: CaptionTokenizer, limit: int, prompt: str) -> int:
    """The prompt's length in tokens; refuses one that is blank or longer than `limit` tokens."""
    if not prompt.strip():
        raise ValueError("prompt must not be blank")
    if "\0" in prompt:
        raise ValueError("prompt must not contain NUL characters")
    # Every token stands for at least one byte of the text: this bounds the work below.
    length = tokenizer.count(prompt)
    if length > limit:
        raise ValueError(f"prompt must have at most {limit} tokens, got {length}: shorten it")
    return length


def check_fit(prior: PriorConfig, dvae: StageOneConfig, tokenizer: CaptionTokenizer) -> None:
    """Refuse models whose grids or vocabularies differ."""
    for name, have, want in (
        ("grid", prior.grid, dvae.grid),
        ("image vocabulary", prior.image_vocab_size, dvae.vocab_size),
    ):
        if have != want:
            raise ValueError(f"the prior's {name} must be the dVAE's, got {have} and {want}")
    if tokenizer.vocab_size > prior.text_vocab_size:
        raise ValueError(
            f"the prior's text vocabulary must hold the tokenizer's {tokenizer.vocab_size} ids, "
            f"got {prior.text_vocab_size}"
        )

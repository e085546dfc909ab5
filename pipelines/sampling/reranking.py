"""Ranking pictures by how well they fit a prompt: the best n of a pool.

Letters: N pictures, H and W their sides.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.clip import Clip
from pipelines.data.caption_slots import CaptionSlots
from pipelines.training.clip_files import load_clip_with_slots

BATCH = 64
"""Pictures that are scored at once; bounds the memory, does not change the scores beyond 1e-6."""


class NonFiniteScores(RuntimeError):
    """The reranker gave NaN or infinite scores: pictures are not ordered by them."""


class Reranker:
    """A contrastive model and the vocabulary that it was trained with."""

    def __init__(self, clip: Clip, captions: CaptionSlots) -> None:
        if captions.vocab_size > clip.config.vocab_size:
            raise ValueError(
                f"the reranker's vocabulary must hold the tokenizer's {captions.vocab_size} ids, "
                f"got {clip.config.vocab_size}"
            )
        self.clip, self.captions = clip.eval(), captions
        self.device = clip.logit_scale.device

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        """The cosines (N,) float32, from -1 to 1, of pictures (N, H, W, 3) uint8 with a prompt.

        Raises ValueError for other pictures, and NonFiniteScores.
        """
        scores = self.picture_vectors(pictures) @ self.prompt_vectors([prompt])[0]
        if not np.isfinite(scores).all():
            raise NonFiniteScores(
                f"the reranker must give finite scores, but {int((~np.isfinite(scores)).sum())} of "
                f"{len(scores)} are not: its weights are damaged, train or import it again"
            )
        return scores

    @torch.inference_mode()
    def picture_vectors(self, pictures: np.ndarray) -> np.ndarray:
        """Unit vectors (N, E) float32 of pictures (N, H, W, 3) uint8."""
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise ValueError(
                f"pictures must be uint8 (N, H, W, 3), got {pictures.dtype} {pictures.shape}"
            )
        vectors = [
            self.clip.encode_images(self._pixels(pictures[first : first + BATCH])).cpu().numpy()
            for first in range(0, len(pictures), BATCH)
        ]
        width = self.clip.config.embed_width
        return np.concatenate(vectors) if vectors else np.zeros((0, width), np.float32)

    @torch.inference_mode()
    def prompt_vectors(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors (N, E) float32 of prompts; what is beyond the text slots is cut off."""
        vectors = []
        for first in range(0, len(prompts), BATCH):
            part = prompts[first : first + BATCH]
            ids, ends = self.captions.slots(part, self.clip.config.text_len)
            tokens = torch.from_numpy(ids).to(self.device)
            ends_there = torch.from_numpy(ends).to(self.device)
            vectors.append(self.clip.encode_texts(tokens, ends_there).cpu().numpy())
        width = self.clip.config.embed_width
        return np.concatenate(vectors) if vectors else np.zeros((0, width), np.float32)

    def _pixels(self, pictures: np.ndarray) -> Tensor:
        side = self.clip.config.image_size
        if pictures.shape[1:3] != (side, side):
            # One at a time, in the filter that CLIP's pictures are scaled with: a picture's values
            # do not depend on its neighbours.
            size, bicubic = (side, side), Image.Resampling.BICUBIC
            scaled = [np.asarray(Image.fromarray(p).resize(size, bicubic)) for p in pictures]
            pictures = np.stack(scaled)
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device)
        return pixels.permute(0, 3, 1, 2).float() / 255


def best_first(scores: np.ndarray) -> np.ndarray:
    """The order of pictures by their scores, best first; of equal ones the earlier one first."""
    return np.argsort(-scores, kind="stable")


def load_reranker(path: Path, tokenizer_path: Path, device: torch.device) -> Reranker:
    """The reranker in a model file of `jobs.train_clip` or `jobs.import_clip`.

    `tokenizer_path` is the tokenizer that it was trained with; an imported model brings its own
    vocabulary and does not read it. Raises FileNotFoundError or ValueError: a file is missing or
    broken, or the tokenizer is another one.
    """
    clip, captions = load_clip_with_slots(path, tokenizer_path)
    return Reranker(clip.to(device), captions)

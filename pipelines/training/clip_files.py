"""Model files of contrastive models, and the vocabulary that each was trained with."""

from pathlib import Path
from typing import Any

import torch

from models.clip import Clip, ClipConfig
from pipelines.data.caption_slots import CaptionSlots, OwnSlots
from pipelines.data.open_clip_slots import OpenClipSlots
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.weights import read_header, read_state

CLIP_FILE = "clip.safetensors"
MERGES_FILE = "bpe_merges.txt.gz"  # beside an imported model, as it was given


def load_clip(path: Path) -> tuple[Clip, dict[str, Any]]:
    """A contrastive model in eval mode, and the metadata it was saved with."""
    header = read_header(path, "clip")
    with torch.device("meta"):
        model = Clip(ClipConfig(**header["config"]))
    model.load_state_dict(read_state(path), strict=True, assign=True)
    return model.eval(), header["metadata"]


def load_clip_with_slots(path: Path, tokenizer_path: Path) -> tuple[Clip, CaptionSlots]:
    """A model and its vocabulary; refuses another tokenizer than the one it was trained with.

    An imported model has its vocabulary beside it, and `tokenizer_path` is not read.
    """
    clip, metadata = load_clip(path)
    if merges_sha256 := metadata.get("merges_sha256"):
        return clip, _imported_slots(path.with_name(MERGES_FILE), clip, merges_sha256)
    tokenizer = CaptionTokenizer.from_file(tokenizer_path)
    wanted = metadata.get("tokenizer_sha256")
    if wanted != tokenizer.digest:
        raise ValueError(
            f"{path} was trained with tokenizer {wanted}, but the tokenizer given, "
            f"{tokenizer_path}, is {tokenizer.digest}: give the one it was trained with"
        )
    return clip, OwnSlots(tokenizer)


def _imported_slots(file: Path, clip: Clip, merges_sha256: str) -> OpenClipSlots:
    slots = OpenClipSlots.from_file(file, clip.config.vocab_size)
    if slots.digest != merges_sha256:
        raise ValueError(
            f"{file} must be the merges that its model was imported with, {merges_sha256}, but is "
            f"{slots.digest}: import the model again"
        )
    return slots

"""Model files of contrastive models, and the vocabulary that each was trained with."""

from pathlib import Path
from typing import Any

import torch

from models.clip import Clip, ClipConfig
from pipelines.data.caption_slots import CaptionSlots, OwnSlots
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.weights import read_header, read_state

CLIP_FILE = "clip.safetensors"


def load_clip(path: Path) -> tuple[Clip, dict[str, Any]]:
    """A contrastive model in eval mode, and the metadata it was saved with."""
    header = read_header(path, "clip")
    with torch.device("meta"):
        model = Clip(ClipConfig(**header["config"]))
    model.load_state_dict(read_state(path), strict=True, assign=True)
    return model.eval(), header["metadata"]


def load_clip_with_slots(path: Path, tokenizer_path: Path) -> tuple[Clip, CaptionSlots]:
    """A model and its vocabulary; refuses another tokenizer than the one it was trained with."""
    clip, metadata = load_clip(path)
    tokenizer = CaptionTokenizer.from_file(tokenizer_path)
    wanted = metadata.get("tokenizer_sha256")
    if wanted != tokenizer.digest:
        raise ValueError(
            f"{path} was trained with tokenizer {wanted}, but the tokenizer given, "
            f"{tokenizer_path}, is {tokenizer.digest}: give the one it was trained with"
        )
    return clip, OwnSlots(tokenizer)

"""What jobs.import_clip can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.configs.job import Job


@dataclass(frozen=True, kw_only=True)
class ImportClipJob(Job):
    """Turn a checkpoint of open_clip into a reranker, without running anything of it."""

    checkpoint: Path = Path("open_clip_model.safetensors")
    """A vision transformer's weights: open_clip_model.safetensors, or its state_dict as .bin."""
    merges: Path = Path("bpe_simple_vocab_16e6.txt.gz")
    """The vocabulary's BPE merges, which the packages open_clip and CLIP hold under this name."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """quick_gelu for OpenAI's weights and for models whose name ends in -quickgelu: the weights do
    not tell."""
    image_heads: int = 0
    """Heads of the image tower; 0 takes those of open_clip's own B, L, H, g and bigG."""
    output: Path = Path("runs/open_clip/clip")
    """Directory for clip.safetensors; run the same line again to go on where it stopped."""

    def __post_init__(self) -> None:
        if self.image_heads < 0:
            raise ValueError(f"image_heads must be at least 0, got {self.image_heads}")


PRESETS = {
    "open_clip": (
        "any ViT of open_clip whose pictures are normalised as CLIP's: seconds, one core",
        ImportClipJob(),
    ),
}

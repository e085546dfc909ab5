"""What jobs.import_dvae can be told."""

from dataclasses import dataclass
from pathlib import Path

from jobs.configs.job import Job


@dataclass(frozen=True, kw_only=True)
class ImportDVAEJob(Job):
    """Turn OpenAI's released dVAE into a model file, without running anything of it."""

    encoder: Path = Path("encoder.pkl")
    """The released encoder, from https://cdn.openai.com/dall-e/encoder.pkl."""
    decoder: Path = Path("decoder.pkl")
    """The released decoder, from https://cdn.openai.com/dall-e/decoder.pkl."""
    output: Path = Path("runs/openai/dvae")
    """Directory for dvae.safetensors; run the same line again to go on where it stopped."""
    image_size: int = 256
    """Side of the pictures that will be encoded, a multiple of 8 (256 in the paper)."""

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.image_size % 8:
            raise ValueError(f"image_size must be a multiple of 8, got {self.image_size}")


PRESETS = {
    "released": (
        "the released 8,192 codes: under a minute, 1 GB of memory, one core",
        ImportDVAEJob(),
    ),
}

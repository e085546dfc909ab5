"""Settings of the encoding; in a room without torch, which decoders do without."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.data.crops import ENCODE_CROPS, CropConfig

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """What is encoded. The defaults are the paper's crops, one of each picture.

    All of it is part of the dataset's identity, `batch_samples` too: rounding depends on the shape
    of a batch (torch's own convolutions, fp32 on a CPU, 48 pictures at once against one by one:
    features differ by up to 2e-6), and where two codes are almost equally likely it decides. So all
    batches have one shape. Another processor, or other threads, may still round otherwise.
    """

    crops: CropConfig = field(default_factory=lambda: ENCODE_CROPS)
    crops_per_picture: int = 1
    """The paper draws a new crop in every of its 1.76 epochs; we store so many of each picture."""
    batch_samples: int = 64
    """Crops that are encoded at once."""
    precision: Precision = "fp16"
    """Of the encoder's convolutions, but the last one, which is fp32: the released code's choice.
    It has three bits more than bf16: on 16 pictures and untrained encoders, fp16 changed none of
    1,024 codes of fp32, bf16 up to 2.3 %. A CPU has fp32 and bf16 only."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crops_per_picture < 1 or self.batch_samples < 1:
            raise ValueError(
                "crops_per_picture and batch_samples must be at least 1, "
                f"got {self.crops_per_picture}, {self.batch_samples}"
            )

    def block_bytes(self, image_size: int) -> int:
        """Size of a whole batch of uint8 squares."""
        return self.batch_samples * image_size * image_size * 3

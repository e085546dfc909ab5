"""Settings of `jobs.sample`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jobs.configs.job import Job
from pipelines.sampling.drawing import SamplingConfig, check_seed
from pipelines.sampling.loading import DeviceChoice


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What the pictures start from besides the prompts."""

    prime_image: str = ""
    """A picture of the dVAE's size to complete: its upper rows are kept; empty for none."""
    prime_rows: int = 0
    """Rows of the grid of image tokens that are taken from --prime-image."""
    complete_captions: bool = False
    """Let the prior go on with a prompt before it draws, for each picture anew."""
    long_prompts: Literal["refuse", "cut"] = "refuse"
    """What is done with a prompt that has more tokens than the prior has slots."""

    def __post_init__(self) -> None:
        if self.prime_rows < 0 or bool(self.prime_image) != (self.prime_rows > 0):
            raise ValueError(
                "prime_rows must be 1 or more with a prime_image, and 0 without, "
                f"got {self.prime_rows} with {self.prime_image!r}"
            )


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """How many pictures a prompt gets, and of how many they are the best."""

    pictures_per_prompt: int = 8
    rerank_pool: int = 0
    """Pictures that are sampled and ranked for each prompt, of which the best are written (512 in
    the paper); 0 writes what is sampled."""
    clip: Path | None = None
    """The reranker, made by train_clip or import_clip; needed for a pool."""

    def __post_init__(self) -> None:
        if self.pictures_per_prompt < 1:
            raise ValueError(
                f"pictures_per_prompt must be at least 1, got {self.pictures_per_prompt}"
            )
        if self.rerank_pool and self.rerank_pool < self.pictures_per_prompt:
            raise ValueError(
                f"rerank_pool must be 0, or at least the {self.pictures_per_prompt} pictures that "
                f"are kept, got {self.rerank_pool}"
            )
        if bool(self.rerank_pool) != (self.clip is not None):
            raise ValueError(
                "rerank_pool must be 1 or more with a clip to rank by, and 0 without, "
                f"got {self.rerank_pool} with {self.clip}"
            )

    @property
    def candidates(self) -> int:
        """Pictures that are sampled for each prompt."""
        return self.rerank_pool or self.pictures_per_prompt


@dataclass(frozen=True, kw_only=True)
class SampleJob(Job):
    """Make pictures for prompts."""

    output: Path = Path("runs/12b/samples")
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place."""
    prior: Path = Path("runs/12b/prior/prior.safetensors")
    prompts: tuple[str, ...] = ("an illustration of a baby daikon radish in a tutu walking a dog",)
    """What to draw."""
    prompt_file: str = ""
    """A text file with a prompt a line, instead of --prompts; empty for none."""
    choice: Annotated[ChoiceOptions, tyro.conf.arg(name="")] = field(default_factory=ChoiceOptions)
    seed: int = 0
    """Of a prompt's first picture; the next ones have the following seeds."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    start: Annotated[StartOptions, tyro.conf.arg(name="")] = field(default_factory=StartOptions)
    max_candidates: int = 32
    """Pictures that are sampled at once: bounds the memory, does not change the pictures."""
    device: DeviceChoice = "cpu_or_gpu"

    def __post_init__(self) -> None:
        check_seed(self.seed)


TINY = SampleJob(
    output=Path("runs/quickstart/samples"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    prior=Path("runs/quickstart/prior/prior.safetensors"),
    prompts=(
        "a picture of an avocado, food and fruit",
        "a picture of a guitar, music and instrument",
        "a picture of a butterfly, insect and pretty",
        "a picture of a volcano, mountain and nature",
    ),
    choice=ChoiceOptions(pictures_per_prompt=4),
)

PRESETS: dict[str, tuple[str, SampleJob]] = {
    "tiny": ("The quickstart's model: 64 px pictures, a second for each prompt.", TINY),
    "12b": (
        "The paper's model: 256 px; a GPU of 80 GB, 49 GB of it for fp32 weights.",
        SampleJob(),
    ),
}

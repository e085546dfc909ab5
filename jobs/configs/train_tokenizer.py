"""What jobs.train_tokenizer can be told."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import DatasetPath, Job
from pipelines.data.storage import Location
from pipelines.data.tokenizer import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerJob(Job):
    """Learn the caption vocabulary from a filtered dataset."""

    filtered: DatasetPath = Location("runs/paper/filtered")
    """Dataset made by jobs.filter_pairs, whose captions are learned."""
    output: Path = Path("runs/paper/tokenizer")
    """Directory for tokenizer.json; run the same line again to go on where it stopped."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text_len: int = 256
    """Text slots of the prior (256 in the paper); used to count the captions that are longer."""

    def __post_init__(self) -> None:
        if self.text_len < 2:
            raise ValueError(
                f"text_len must be at least 2 (start and one token), got {self.text_len}"
            )


PRESETS = {
    "tiny": (
        "1,024 ids from the quickstart's captions: seconds, one core",
        TrainTokenizerJob(
            filtered=Location("runs/quickstart/filtered"),
            output=Path("runs/quickstart/tokenizer"),
            tokenizer=TokenizerConfig(vocab_size=1024),
            text_len=32,
        ),
    ),
    "paper": (
        "the paper's 16,384 ids: reads every caption twice on all cores, memory for the words",
        TrainTokenizerJob(),
    ),
}

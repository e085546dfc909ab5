"""What a judgement of a prior is made from, and the proof that it belongs together."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.data.stage import Manifest
from pipelines.data.storage import Location
from pipelines.sampling.loading import CheckedFiles, ModelFiles, check_files
from pipelines.training.token_loader import check_digest


@dataclass(frozen=True)
class JudgedInputs:
    """A corpus as tokens and as pictures, and the models of a sampler."""

    tokens: Manifest
    filtered: Manifest
    models: CheckedFiles

    @property
    def digests(self) -> dict[str, str]:
        """Of all of them, by name."""
        return {
            "tokens": self.tokens.digest,
            "filtered": self.filtered.digest,
        } | self.models.digests


def checked_inputs(
    tokens: Path | Location, filtered: Path | Location, files: ModelFiles
) -> JudgedInputs:
    """The inputs, each refused with both digests if it is not the one that the others name."""
    inputs = JudgedInputs(
        tokens=Manifest.load(tokens, stage="encode_pairs"),
        filtered=Manifest.load(filtered, stage="filter_pairs"),
        models=check_files(files),
    )
    check_digest(inputs.tokens, "filtered", inputs.filtered.digest)
    check_digest(inputs.tokens, "tokenizer", inputs.models.digests["tokenizer"])
    check_digest(inputs.tokens, "dvae", inputs.models.digests["dvae"])
    return inputs

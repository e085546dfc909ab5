"""The three files that make a sampler, and the proof that they belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from models.prior import PriorConfig
from models.stage_one import StageOneConfig
from pipelines.data.storage import sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.batching import Batch
from pipelines.sampling.codec import Codec, check_fit
from pipelines.sampling.engine import Sampler
from pipelines.sampling.packing import PackedPrior, Precision
from pipelines.training.weights import (
    STAGE_ONE,
    load_prior,
    load_stage_one,
    read_header,
    stage_one_config,
)

DeviceChoice = Literal["cpu_or_gpu", "cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where the files are."""

    tokenizer: Path
    dvae: Path
    prior: Path

    def resolved(self) -> "ModelFiles":
        """The same files under absolute paths, for another process."""
        return ModelFiles(
            tokenizer=self.tokenizer.resolve(),
            dvae=self.dvae.resolve(),
            prior=self.prior.resolve(),
        )


@dataclass(frozen=True, kw_only=True)
class CheckedFiles:
    """Files that were found to belong together."""

    files: ModelFiles
    digests: dict[str, str]
    """SHA-256 of ``tokenizer``, ``dvae`` and ``prior``."""
    prior: PriorConfig
    dvae: StageOneConfig
    caption_dropout: float
    """Share of captions that the prior saw emptied in its training."""


def check_files(files: ModelFiles) -> CheckedFiles:
    """Read headers and digests, not the weights.

    Raises FileNotFoundError or ValueError: a file is missing or broken, or the prior was trained
    with another tokenizer or dVAE than the ones given.
    """
    tokenizer = CaptionTokenizer.from_file(files.tokenizer)
    prior_header = read_header(files.prior, "prior")
    dvae_header = read_header(files.dvae, *STAGE_ONE)
    digests = {
        "tokenizer": tokenizer.digest,
        "dvae": sha256_file(files.dvae),
        "prior": sha256_file(files.prior),
    }
    for name in ("tokenizer", "dvae"):
        wanted = prior_header["metadata"].get(f"{name}_sha256")
        if wanted != digests[name]:
            raise ValueError(
                f"{files.prior} was trained with {name} {wanted}, but the {name} given, "
                f"{getattr(files, name)}, is {digests[name]}: give the one it was trained with"
            )
    prior, dvae = PriorConfig(**prior_header["config"]), stage_one_config(dvae_header)
    check_fit(prior, dvae, tokenizer)
    training = prior_header["metadata"].get("training", {})
    return CheckedFiles(
        files=files,
        digests=digests,
        prior=prior,
        dvae=dvae,
        caption_dropout=training.get("caption_dropout", 0.0),
    )


def load_sampler(files: ModelFiles, *, device: DeviceChoice, max_candidates: int) -> Sampler:
    """A sampler of files that `check_files` accepted."""
    place = torch_device(device)
    prior, _ = load_prior(files.prior)
    dvae, _ = load_stage_one(files.dvae)
    tokenizer = CaptionTokenizer.from_file(files.tokenizer)
    return Sampler(prior.to(place), dvae.to(place), tokenizer, max_candidates=max_candidates)


def load_codec(checked: CheckedFiles, *, device: DeviceChoice) -> Codec:
    """What encodes prompts and decodes pictures; the prior is not loaded."""
    dvae, _ = load_stage_one(checked.files.dvae)
    tokenizer = CaptionTokenizer.from_file(checked.files.tokenizer)
    return Codec(checked.prior, dvae.to(torch_device(device)), tokenizer)


def load_batch(
    prior: Path, *, device: DeviceChoice, slots: int, precision: Precision, threads: int
) -> Batch:
    """The slots of a prior, for a process that does nothing else: its CPU threads are set."""
    torch.set_num_threads(threads)
    loaded, _ = load_prior(prior)
    return Batch(PackedPrior(loaded.to(torch_device(device)).eval()), slots, precision)


def torch_device(choice: DeviceChoice) -> torch.device:
    """The device for a choice; "cpu_or_gpu" takes a GPU if there is one."""
    available = torch.cuda.is_available()
    if choice == "gpu" and not available:
        raise ValueError("device must be cpu on a machine without a CUDA GPU, got gpu")
    return torch.device("cuda" if available and choice != "cpu" else "cpu")

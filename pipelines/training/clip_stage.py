"""Training the contrastive model, filtered pairs to model file: a rank's part, and rank 0's."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.clip import Clip, ClipConfig
from pipelines.data.caption_slots import OwnSlots
from pipelines.data.split import TRAIN, VALIDATION, Side, rows_of
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.evaluation.pair_retrieval import retrieval_at_1
from pipelines.sampling.reranking import Reranker
from pipelines.training.clip_files import CLIP_FILE
from pipelines.training.clip_loop import Batches, train_clip
from pipelines.training.clip_training import ClipCadence, ClipTraining
from pipelines.training.desk import ignore
from pipelines.training.pair_loader import PairSource
from pipelines.training.picture_stage import ModelDesk, picture_source, run_picture_stage
from pipelines.training.watchdog import WatchdogConfig
from pipelines.training.weights import load_stage_one, save_model


@dataclass(frozen=True, kw_only=True)
class ClipStage:
    """All that a worker needs to know; travels to it."""

    output: Path
    filtered: Path | Location
    tokenizer: Path
    dvae: Path
    """Read if `training.redrawn` is not 0."""
    config: ClipConfig
    training: ClipTraining
    cadence: ClipCadence
    tracking_uri: str
    """Empty for none."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def batch_bytes(self) -> int:
        """Of an update's pairs, over all ranks."""
        pair = 3 * self.config.image_size**2 + 8 * (self.config.text_len + 1)
        return pair * self.training.batch_samples

    @property
    def source(self) -> PairSource:
        """What makes the batches."""
        return PairSource(
            pictures=picture_source(self),
            tokenizer=self.tokenizer,
            text_len=self.config.text_len,
        )


def run_clip(
    stage: ClipStage,
    *,
    batches: Batches,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Train on this rank; rank 0 writes metrics, retrieval, `result.json` and the model file.

    If it is asked to stop (`StopRequest(stage.output)`), it makes a checkpoint and no model file.
    """
    desk = _Desk(stage, device) if rank == 0 else None
    train = partial(
        train_clip,
        batches=batches,
        keys=stage.source.loader(rank, world_size).keys,
        device=device,
        stage_one=load_stage_one(stage.dvae)[0] if stage.training.redrawn else None,
        on_weights=desk.judge if desk else ignore,
    )
    run_picture_stage(stage, desk, train, rank=rank, world_size=world_size)


class _Desk(ModelDesk):
    """What rank 0 does with what the loop hands out."""

    def __init__(self, stage: ClipStage, device: torch.device) -> None:
        super().__init__(stage.output, stage.tracking_uri)
        self.stage, self.device = stage, device
        self.manifest = Manifest.load(stage.filtered, stage="filter_pairs")
        self.tokenizer = CaptionTokenizer.from_file(stage.tokenizer)
        self.split, self.rows = _judged(self.manifest)
        self.is_judged = False

    def resume(self, step: int, said: list[str]) -> None:
        super().resume(step, said)
        if self.split == TRAIN:
            self.notice(
                step,
                f"{self.stage.filtered} holds less than two validation pairs: retrieval is "
                "measured on pairs that are learned (filter_pairs --validation-fraction)",
            )

    def judge(self, step: int, weights: dict[str, Tensor]) -> None:
        """Retrieval on the validation split, or on what is learned if there is no such split."""
        with torch.device("meta"):
            model = Clip(self.stage.config)
        # Copied: the average moves on, and the model is in use on this rank alone.
        model.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True)
        reranker = Reranker(model.to(self.device), OwnSlots(self.tokenizer))
        pairs = min(self.rows, self.stage.cadence.validation_pairs)
        self.log(step, retrieval_at_1(reranker, self.manifest, split=self.split, pairs=pairs))
        self.is_judged = True

    def keep(self, weights: dict[str, Tensor]) -> None:
        stage = self.stage
        if not self.is_judged:  # resumed after the last update
            self.judge(stage.training.steps, weights)
        self.keep_result(stage.training.steps)
        save_model(
            stage.output / CLIP_FILE,
            kind="clip",
            config=stage.config,
            state=weights,
            metadata={
                "filtered_digest": self.manifest.digest,
                "tokenizer_sha256": self.tokenizer.digest,
                "training": asdict(stage.training),
                **({"dvae_sha256": sha256_file(stage.dvae)} if stage.training.redrawn else {}),
            },
        )


def _judged(manifest: Manifest) -> tuple[Side, int]:
    """The split whose retrieval is measured, and its rows."""
    held_out = sum(map(len, rows_of(manifest, VALIDATION)))
    if held_out >= 2:
        return VALIDATION, held_out
    return TRAIN, sum(map(len, rows_of(manifest, TRAIN)))

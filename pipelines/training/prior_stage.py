"""One worker's part of training a prior: reads the inputs, trains, keeps the results."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.prior import PriorConfig
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.sampling.engine import Sampler
from pipelines.sampling.grid import captioned_rows
from pipelines.training.block_history import BlockHistory, BlockRecord
from pipelines.training.desk import Desk, ignore
from pipelines.training.prior_loop import load_weights, train_prior
from pipelines.training.prior_training import Cadence, PriorTraining
from pipelines.training.scale_picture import scale_picture
from pipelines.training.stopping import StopRequest
from pipelines.training.token_loader import TokenLoader
from pipelines.training.validation import HeldOut
from pipelines.training.watchdog import Watchdog, WatchdogConfig
from pipelines.training.weights import load_stage_one, save_model

PRIOR_FILE = "prior.safetensors"
ODD_FILE = "odd_updates.jsonl"
PREVIEW_PROMPTS = 8
PREVIEW_SAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class PriorStage:
    """All that a worker needs to know; travels to it."""

    output: Path
    tokens: Path | Location
    tokenizer: Path
    dvae: Path
    prior: PriorConfig
    training: PriorTraining
    cadence: Cadence
    tracking_uri: str
    """Empty for none."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def run_prior_stage(
    stage: PriorStage,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    is_machine_leaving: Callable[[], bool] = lambda: False,
) -> None:
    """Train on this rank; rank 0 writes metrics, previews, `result.json` and the model file.

    If it is asked to stop (`StopRequest(stage.output)`), it makes a checkpoint and no model file.
    """
    manifest = Manifest.load(stage.tokens, stage="encode_pairs")
    tokenizer = CaptionTokenizer.from_file(stage.tokenizer)
    loader = TokenLoader(
        manifest,
        tokenizer,
        text_len=stage.prior.text_len,
        batch_samples=stage.training.batch_samples,
        bpe_dropout=stage.training.bpe_dropout,
        seed=stage.training.seed,
        caption_dropout=stage.training.caption_dropout,
        rank=rank,
        world_size=world_size,
    )
    held_out = HeldOut(
        manifest,
        tokenizer,
        text_len=stage.prior.text_len,
        samples=stage.cadence.validation_samples,
    )
    desk = _Desk(stage, manifest, loader, tokenizer, held_out) if rank == 0 else None
    watchdog = Watchdog(
        stage.output / ".heartbeats", stage.watchdog, rank=rank, world_size=world_size
    )
    with watchdog:
        _train(stage, loader, held_out, desk, watchdog, device, is_machine_leaving)


def _train(
    stage: PriorStage,
    loader: TokenLoader,
    held_out: HeldOut,
    desk: "_Desk | None",
    watchdog: Watchdog,
    device: torch.device,
    is_machine_leaving: Callable[[], bool],
) -> None:
    finished = train_prior(
        stage.prior,
        stage.training,
        cadence=stage.cadence,
        loader=loader,
        device=device,
        checkpoints=stage.output / "checkpoints",
        on_log=desk.log if desk else ignore,
        on_resume=desk.resume if desk else ignore,
        on_weights=desk.keep if desk else ignore,
        on_blocks=desk.record if desk else ignore,
        on_odd=desk.keep_odd if desk else ignore,
        held_out=held_out,
        on_validation=desk.log if desk else ignore,
        is_asked_to_stop=StopRequest(stage.output).is_asked,
        beat=watchdog.beat,
        on_notice=desk.notice if desk else ignore,
        is_machine_leaving=is_machine_leaving,
    )
    if desk and not finished:
        desk.stop()


class _Desk(Desk):
    """What rank 0 does with what the loop hands out."""

    def __init__(
        self,
        stage: PriorStage,
        manifest: Manifest,
        loader: TokenLoader,
        tokenizer: CaptionTokenizer,
        held_out: HeldOut,
    ) -> None:
        super().__init__(stage.output, stage.tracking_uri)
        self.held_out = held_out
        self.stage, self.manifest, self.loader, self.tokenizer = stage, manifest, loader, tokenizer
        self.blocks = BlockHistory(stage.output)

    def resume(self, step: int, said: list[str]) -> None:
        super().resume(step, said)
        self.blocks.rewind(step)
        if not self.held_out and not step:
            self.notice(
                step,
                f"{self.manifest.path} holds no validation rows: losses are those of what is "
                "learned (filter_pairs --validation-fraction)",
            )

    def keep_odd(self, step: int, batch: int, why: str) -> None:
        """Name the samples of an update, for somebody to look at them."""
        row = {"step": step, "batch": batch, "why": why, "keys": self.loader.all_keys_of(batch)}
        with (self.stage.output / ODD_FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "loss" in why:  # a scale that is too high is how fp16 finds its scale
            self.notice(step, f"update {step} is odd: {why}; its samples are in {ODD_FILE}")

    def record(self, step: int, record: BlockRecord) -> None:
        self.blocks.add(record)

    def keep(self, step: int, weights: dict[str, Tensor]) -> None:
        self._preview(step, weights)
        if self.blocks.records:
            picture = scale_picture(self.blocks.records, f"resblocks, update {step}")
            self.tracker.log_image("resblocks", picture, step)
        if step < self.stage.training.steps:
            return
        self.keep_result(step)
        save_model(
            self.stage.output / PRIOR_FILE,
            kind="prior",
            config=self.stage.prior,
            state=weights,
            metadata={
                "tokens_digest": self.manifest.digest,
                "tokenizer_sha256": self.tokenizer.digest,
                "dvae_sha256": sha256_file(self.stage.dvae),
                "training": asdict(self.stage.training),
            },
        )

    def _preview(self, step: int, weights: dict[str, Tensor]) -> None:
        """Sample captions, learned and held out, always the same ones, for the eye to follow."""
        dvae, _ = load_stage_one(self.stage.dvae)
        prior = load_weights(self.stage.prior, weights)
        sampler = Sampler(prior, dvae, self.tokenizer)
        unseen = self.held_out.captions[: PREVIEW_PROMPTS // 2]
        learned = min(PREVIEW_PROMPTS - len(unseen), len(self.loader))
        spread = np.linspace(0, len(self.loader) - 1, learned)
        prompts = [*(self.loader.captions[int(row)] for row in spread), *unseen]
        samples = sampler.sample(prompts, n=PREVIEW_SAMPLES, seed=0)
        sampled = [[sample.pixels for sample in row] for row in samples]
        titles = [*prompts[:learned], *(f"held out: {prompt}" for prompt in unseen)]
        rows = list(zip(titles, sampled, strict=True))
        self.tracker.log_image("samples", captioned_rows(rows), step)

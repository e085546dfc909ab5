"""One update of the contrastive model over all ranks, and what a resumed training must find."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.clip import Clip, ClipConfig, contrastive_loss
from models.stage_one import StageOne
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.clip_training import ClipTraining
from pipelines.training.gathering import gather_of
from pipelines.training.pair_loader import PairBatch
from pipelines.training.redrawing import Redrawing
from pipelines.training.replica import Replica, to_device


@dataclass(frozen=True)
class ClipUpdate:
    """What an update minimised on this rank, without gradients."""

    loss: Tensor
    accuracy: Tensor
    """Share of pictures nearest to their own caption of the whole batch."""
    per_pair: Tensor
    """(B,); not finite for the pairs whose vectors are not."""


class ClipTrainer:
    """A rank's replica of the model."""

    def __init__(
        self,
        config: ClipConfig,
        training: ClipTraining,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        stage_one: StageOne | None = None,
    ) -> None:
        """`stage_one` redraws pictures; it is needed where `training.redrawn` is not 0."""
        if training.redrawn and stage_one is None:
            raise ValueError(f"redrawn must be 0 without a stage-one model, got {training.redrawn}")
        self.training, self.device, self.rank, self.world_size = training, device, rank, world_size
        model = Clip(config)
        model.init_weights(training.seed)  # every rank begins with the same weights
        self.model = model.to(device)
        self.gather = gather_of(rank, world_size)
        self.redraw: Callable[[Tensor, int], Tensor] = _as_they_are
        if training.redrawn and stage_one is not None:
            self.redraw = Redrawing(
                stage_one.to(device),
                training.redrawn,
                seed=training.seed,
                batch_samples=training.batch_samples,
                rank=rank,
                world_size=world_size,
            )
        self.replica = Replica(
            self.model,
            _optimizer(self.model, training),
            training.averaging,
            precision=training.precision,
            clip_norm=training.optimizer.clip_norm,
            world_size=world_size,
        )

    @property
    def step(self) -> int:
        """Updates that were made."""
        return self.replica.step

    def update(self, batch: PairBatch, *, stop: bool = False) -> ClipUpdate:
        """One update on this rank's pairs; skipped on all ranks if not finite.

        `stop` asks all ranks to stop: `replica.stop_asked` then is true on every one.
        """
        pixels = to_device(batch.pictures.pixels, self.device).float().div_(255)
        tokens, ends = (to_device(part, self.device) for part in (batch.tokens, batch.ends))
        with self.replica.autocast(self.device):
            pixels = self.redraw(pixels, self.step)
            images = self.model.encode_images(pixels)
            texts = self.model.encode_texts(tokens, ends)
            matching = contrastive_loss(
                images, texts, self.model.scale(), gather=self.gather, rank=self.rank
            )
        finite = self.replica.descend(matching.loss, self.training.lr(self.step), stop=stop)
        if finite:
            self.model.clamp_scale()
        self.replica.count(finite)
        return ClipUpdate(
            loss=matching.loss.detach(),
            accuracy=matching.accuracy,
            per_pair=(images + texts).detach().sum(dim=1),
        )

    def metrics(self, update: ClipUpdate, unusable: int) -> dict[str, float]:
        """Of the update just made, means over all ranks; every rank must call it."""
        values = torch.stack([update.loss, update.accuracy]).double()
        values = torch.cat([values, values.new_tensor([unusable])])
        self.replica.sum_over_ranks(values)
        loss, accuracy, replaced = values.tolist()
        return {
            "loss": loss / self.world_size,
            "batch_accuracy": accuracy / self.world_size,
            "unusable_pictures": replaced,
            "logit_scale": float(self.model.scale()),
            "skipped": self.replica.skipped,
            "lr": self.training.lr(self.step - 1),
        }

    def save(self, checkpoints: Checkpoints) -> None:
        """A checkpoint after the current step; every rank must call it."""
        self.replica.save(checkpoints, {})

    def resume(self, checkpoints: Checkpoints) -> list[str]:
        """Go on from the newest valid checkpoint, if there is one; what is to be said about it."""
        return self.replica.resume(checkpoints, {})


def _as_they_are(pixels: Tensor, step: int) -> Tensor:
    return pixels


def _optimizer(model: nn.Module, training: ClipTraining) -> torch.optim.AdamW:
    # Gains, biases, the class token and the temperature have less than two axes.
    groups = [
        {
            "params": [value for value in model.parameters() if value.ndim >= 2],
            "weight_decay": training.optimizer.weight_decay,
        },
        {"params": [value for value in model.parameters() if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, betas=training.optimizer.betas, eps=training.optimizer.epsilon, fused=True
    )

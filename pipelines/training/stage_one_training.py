"""How a stage-one model is trained: what a result depends on, and what it does not."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Protocol

from models.averaging import AveragingConfig
from models.dvae import DVAE
from models.dvae_objective import DVAEObjective, DVAESchedule
from models.objective import Objective
from models.stage_one import StageOne
from models.vqvae import VQVAE
from models.vqvae_objective import QuantizerConfig, VQVAEObjective, VQVAESchedule
from pipelines.data.crops import CropConfig


class StepSizes(Protocol):
    """The step size of every update."""

    def lr(self, step: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class StageOneTraining(ABC):
    """What the trainings of the dVAE and of the VQ-VAE have in common."""

    steps: int
    """Updates."""
    batch_samples: int
    """Pictures an update, over all workers."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Of the convolutions, but for the two at the codes; fp16 scales the loss as a whole."""
    crops: CropConfig = field(default_factory=CropConfig)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's; its epsilon is the paper's 1e-8
    weight_decay: float = 1e-4
    """On the convolutions' weights, not on their biases (the paper does not say)."""
    clip_norm: float = 0.0
    """Global norm that gradients are scaled down to; 0, as in the paper, clips none."""
    averaging: AveragingConfig = field(
        default_factory=lambda: AveragingConfig(decay=0.999, every=1)
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_samples < 1 or not self.clip_norm >= 0:
            raise ValueError(
                "steps and batch_samples must be at least 1 and clip_norm at least 0, "
                f"got {self.steps}, {self.batch_samples}, {self.clip_norm}"
            )

    @property
    @abstractmethod
    def step_sizes(self) -> StepSizes: ...

    @abstractmethod
    def objective(self, model: StageOne) -> Objective:
        """What is minimised of a model of the kind that this trains."""


@dataclass(frozen=True, kw_only=True)
class DVAETraining(StageOneTraining):
    """How the dVAE is trained. The defaults are the paper's (appendix A.2)."""

    steps: int = 3_000_000
    batch_samples: int = 512
    schedule: DVAESchedule = field(default_factory=DVAESchedule)

    @property
    def step_sizes(self) -> DVAESchedule:
        return self.schedule

    def objective(self, model: StageOne) -> DVAEObjective:
        assert isinstance(model, DVAE)
        return DVAEObjective(model, self.schedule)


@dataclass(frozen=True, kw_only=True)
class VQVAETraining(StageOneTraining):
    """How the VQ-VAE is trained. The defaults are van den Oord et al.'s (2017, section 4).

    They give no weight decay and no average of the weights.
    """

    steps: int = 250_000
    batch_samples: int = 128
    weight_decay: float = 0.0
    averaging: AveragingConfig = field(default_factory=lambda: AveragingConfig(decay=0.0, every=1))
    schedule: VQVAESchedule = field(default_factory=VQVAESchedule)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    @property
    def step_sizes(self) -> VQVAESchedule:
        return self.schedule

    def objective(self, model: StageOne) -> VQVAEObjective:
        assert isinstance(model, VQVAE)
        return VQVAEObjective(model, self.quantizer)


@dataclass(frozen=True, kw_only=True)
class StageOneCadence:
    """How often things are written, in updates; changing it does not change the result."""

    log_every: int = 100
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    images_every: int = 5000

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "images_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

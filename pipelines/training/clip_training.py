"""How the contrastive model is trained: what a result depends on, and what it does not."""

from dataclasses import dataclass, field
from typing import Literal

from models.averaging import AveragingConfig
from models.schedules import cosine, linear_warmup
from pipelines.data.crops import CropConfig


@dataclass(frozen=True, kw_only=True)
class ClipOptimizer:
    """AdamW and its step size. The defaults are CLIP's for ViT-B/32 (tables 18 and 20)."""

    peak_lr: float = 5e-4
    warmup_steps: int = 2000
    """Updates to the peak; then half a cosine to 0."""
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    weight_decay: float = 0.2
    """On all weights that are no gains or biases (CLIP, section 2.5)."""
    clip_norm: float = 0.0
    """Global norm that gradients are scaled down to; 0, as in CLIP, clips none."""

    def __post_init__(self) -> None:
        if not self.peak_lr > 0 or self.warmup_steps < 0 or not self.clip_norm >= 0:
            raise ValueError(
                "peak_lr must be positive, warmup_steps and clip_norm at least 0, "
                f"got {self.peak_lr}, {self.warmup_steps}, {self.clip_norm}"
            )

    def lr(self, step: int, steps: int) -> float:
        """The step size of update number `step` (0, 1, …) of so many."""
        past = max(step - self.warmup_steps, 0)
        span = max(steps - self.warmup_steps, 1)
        warm = self.peak_lr * linear_warmup(step, self.warmup_steps)
        return warm * cosine(past, start=1.0, end=0.0, steps=span)


@dataclass(frozen=True, kw_only=True)
class ClipTraining:
    """The defaults are CLIP's (arXiv:2103.00020, section 2.5 and table 18)."""

    steps: int = 390_625
    """Updates: the 32 epochs of CLIP's 400 million pairs."""
    batch_samples: int = 32_768
    """Pairs an update, over all workers; each is told from all the others."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the towers; CLIP took fp16, which would have to scale the loss."""
    optimizer: ClipOptimizer = field(default_factory=ClipOptimizer)
    crops: CropConfig = field(
        default_factory=lambda: CropConfig(scale_low=1.0, scale_high=9 / 8, flip=False)
    )
    """A random square is CLIP's only augmentation (section 2.3); how much is cut off is ours."""
    redrawn: float = 0.0
    """Share of the pictures that are shown as the stage-one model keeps them: ours, not CLIP's.
    What is ranked comes out of a decoder (pipelines/training/redrawing.py)."""
    averaging: AveragingConfig = field(default_factory=lambda: AveragingConfig(decay=0.0, every=1))
    """CLIP keeps the last weights: a decay of 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_samples < 2:
            raise ValueError(
                "steps must be at least 1 and batch_samples at least 2, "
                f"got {self.steps}, {self.batch_samples}"
            )
        if not 0 <= self.redrawn <= 1:
            raise ValueError(f"redrawn must be from 0 to 1, got {self.redrawn}")

    def lr(self, step: int) -> float:
        """The step size of update number `step` (0, 1, …)."""
        return self.optimizer.lr(step, self.steps)


@dataclass(frozen=True, kw_only=True)
class ClipCadence:
    """How often things are written, in updates; changing it does not change the result."""

    log_every: int = 100
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    validate_every: int = 5000
    validation_pairs: int = 1000
    """Pairs of the validation split that are looked up among each other; a smaller split whole."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.validation_pairs < 2:
            raise ValueError(f"validation_pairs must be at least 2, got {self.validation_pairs}")

"""AdamW with the paper's values for the prior, and the rule for its step size."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from models.schedules import PlateauConfig, PlateauHalving, cosine, linear_warmup


@dataclass(frozen=True, kw_only=True)
class PriorOptimizerConfig:
    """The defaults are the paper's (appendix B.2)."""

    peak_lr: float = 4.5e-4
    """Step size after the warm-up."""
    warmup_steps: int = 5000
    decay: Literal["plateau", "cosine"] = "plateau"
    """Halve when the training loss stops falling (the paper), or a half cosine to peak_lr / 32."""
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
    beta1: float = 0.9
    beta2: float = 0.96
    epsilon: float = 1e-8
    weight_decay: float = 4.5e-2
    """On the weights of Linear layers only; the paper does not say on which."""
    clip_norm: float = 4.0
    """Largest global norm of the gradients."""


def build_optimizer(model: nn.Module, config: PriorOptimizerConfig) -> torch.optim.AdamW:
    """AdamW over a model's (sharded) parameters, in two groups: decayed and not."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_linear = parameter.ndim == 2 and name.endswith("weight") and "embedding" not in name
        (decayed if is_linear else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # Fused: one pass over the memory, which bounds AdamW (7 times faster than foreach on a CPU).
    return torch.optim.AdamW(
        groups,
        lr=config.peak_lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def adam_moments(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by parameter name, as a checkpoint keeps it and fills it in place.

    Before the first update there is none: it is made as AdamW would make it.
    """
    moments = {}
    for name, parameter in parameters:
        entry = optimizer.state[parameter]
        if not entry:
            entry["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            entry["exp_avg"] = torch.zeros_like(parameter)
            entry["exp_avg_sq"] = torch.zeros_like(parameter)
        moments[name] = dict(entry)
    return moments


class StepSize:
    """The step size of every update."""

    def __init__(self, config: PriorOptimizerConfig, steps: int) -> None:
        self.config = config
        self.steps = steps
        self.plateau = PlateauHalving(config.plateau)

    def at(self, step: int) -> float:
        """For update number `step` (0, 1, …)."""
        config = self.config
        warm = config.peak_lr * linear_warmup(step, config.warmup_steps)
        if config.decay == "plateau":
            return warm * self.plateau.factor
        past = max(step - config.warmup_steps, 0)
        span = max(self.steps - config.warmup_steps, 1)
        return warm * cosine(past, start=1.0, end=1 / 32, steps=span)

    def update(self, loss: float) -> None:
        """Tell it the loss of an update, which moves it if it halves on plateaus."""
        if self.config.decay == "plateau":
            self.plateau.update(loss)

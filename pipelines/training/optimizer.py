"""AdamW with the paper's values for the prior, and the rule for its step size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.schedules import PlateauConfig, PlateauHalving, cosine, linear_warmup
from pipelines.training.adamw_rule import Moments, Rule
from pipelines.training.compact_adamw import CompactAdamW


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
    """Largest global norm of the gradients; 0: any."""
    moments: Moments = "paper"
    """How AdamW keeps the moments of the resblocks' matrices: in fp32, in bf16, or in the paper's
    formats of 6 exponent bits, with the variance clipped to 5. All else has them in fp32."""
    master: Literal["fp32", "split"] = "fp32"
    """How the resblocks' matrices keep their fp32 weights: as such, or as a bf16 weight, which the
    model uses as it is, and the 16 bits that it lacks. The paper does not say."""
    step: Literal["after", "in_backward"] = "after"
    """Update after the backward pass (the paper), or each resblock as soon as it has its gradients,
    so that all gradients never exist at once."""

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.epsilon > 0):
            raise ValueError(
                "beta1 and beta2 must be in [0, 1) and epsilon above 0, "
                f"got {self.beta1}, {self.beta2}, {self.epsilon}"
            )
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm must be above 0, or 0 for none, got {self.clip_norm}")
        if self.step == "in_backward" and self.clip_norm:
            raise ValueError(
                "optimizer.step in_backward excludes optimizer.clip_norm, because the global norm "
                f"is known only after the last update: clip_norm must be 0, got {self.clip_norm}; "
                "or set step to after"
            )


def build_optimizer(model: nn.Module, config: PriorOptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over a model's (sharded) parameters; torch's own if all of its state is fp32.

    In groups: decayed matrices of the resblocks, other decayed ones, and what is not decayed,
    sharded or whole on every rank: torch's own takes no group of both.
    """
    compact: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_linear = parameter.ndim == 2 and name.endswith("weight") and "embedding" not in name
        if is_linear:
            (compact if name.startswith("resblocks.") else decayed).append(parameter)
        else:
            (others if isinstance(parameter, DTensor) else whole).append(parameter)
    groups = [
        {"params": compact, "weight_decay": config.weight_decay, "compact": True},
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": whole, "weight_decay": 0.0},
    ]
    if config.moments == "fp32" and config.master == "fp32" and config.step == "after":
        # Fused: one pass over the memory, which bounds AdamW (7 times faster than foreach on a
        # CPU).
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(
            groups, lr=config.peak_lr, betas=betas, eps=config.epsilon, fused=True
        )
    rule = Rule(
        beta1=config.beta1, beta2=config.beta2, epsilon=config.epsilon, moments=config.moments
    )
    return CompactAdamW(groups, rule, lr=config.peak_lr, split_weights=config.master == "split")


def named_masters(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> Iterator[tuple[str, Tensor]]:
    """Parameters in fp32 by name, one at a time: of split ones the fp32 numbers are made here."""
    for name, parameter in parameters:
        if isinstance(optimizer, CompactAdamW):
            yield name, optimizer.master(parameter)
        else:
            yield name, parameter.detach()


def adam_moments(
    optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by parameter name, as a checkpoint keeps it and fills it in place.

    16-bit moments are kept as they are, and with them the lower bits of split weights. Before the
    first update torch's own AdamW has no state: it is made as AdamW would make it.
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

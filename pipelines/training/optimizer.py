"""AdamW with the paper's values for the prior, and the rule for its step size."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.schedules import PlateauHalving, cosine, linear_warmup
from pipelines.training.adamw_rule import Rule
from pipelines.training.compact_adamw import CompactAdamW
from pipelines.training.prior_training import PriorOptimizerConfig


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

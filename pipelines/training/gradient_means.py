"""Parameters that are whole on every rank: their gradients become the mean over the ranks.

DistributedDataParallel would do, but that it lays its buckets out anew after the first update: a
resumed run would sum in another order than one that was never interrupted.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

AT_ONCE = 25 << 20
"""Bytes of a message, as DistributedDataParallel has them: enough for a network's full rate."""


class GradientMeans:
    """Sends gradients off while the backward pass makes the others: `finish` waits for the means.

    `parameters` come in the order of the forward pass, and all must have a gradient of the same
    dtype. They travel in `messages` of about the same size, in more if these would be above
    `AT_ONCE`. The last has nothing left to hide behind, so it should be short; on a CPU what sends
    takes time from what computes, so there should not be many.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, messages: int) -> None:
        self.collects = True
        """Whether the next backward pass is an update's last: those before it only add up."""
        self._messages = list(_messages(list(parameters), messages))
        self._missing: list[int] = []
        self._under_way: list[dist.Work] = []
        self._start()
        for number, members in enumerate(self._messages):
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def finish(self) -> None:
        """After an update's last backward pass, on every rank: the gradients are means.

        Raises RuntimeError if a parameter had no gradient.
        """
        if any(self._missing):
            raise RuntimeError(
                "every parameter must have a gradient for its mean over the ranks to be taken, "
                f"got none of {sum(self._missing)}"
            )
        for work in self._under_way:
            work.wait()
        self._start()

    def _start(self) -> None:
        self._under_way.clear()
        self._missing = [len(members) for members in self._messages]

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if not self.collects:
            return
        self._missing[number] -= 1
        # In one order on all ranks, whatever order the gradients come in.
        while (following := len(self._under_way)) < len(self._messages):
            if self._missing[following]:
                break
            self._under_way.append(_send(self._messages[following]))


@torch.no_grad()
def _send(parameters: Sequence[nn.Parameter]) -> dist.Work:
    gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    message = torch.cat(gradients).div_(dist.get_world_size())
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, message.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)  # and the memory of what it was is free
    work = dist.all_reduce(message, async_op=True)
    assert work is not None
    return work


def _messages(parameters: Sequence[nn.Parameter], least: int) -> Iterable[list[nn.Parameter]]:
    """In the order in which a backward pass makes them."""
    enough = min(AT_ONCE, sum(parameter.nbytes for parameter in parameters) / least)
    members: list[nn.Parameter] = []
    for parameter in reversed(parameters):
        members.append(parameter)
        if sum(member.nbytes for member in members) >= enough:
            yield members
            members = []
    if members:
        yield members

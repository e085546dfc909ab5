"""The end of a training whose updates fail one after the other, and the pairs that may be why."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

SKIPS_IN_A_ROW = 10
NAMED_KEYS = 20


class Spoilers:
    """Pairs whose own result was not finite, since the last update that was made."""

    def __init__(self, keys: Callable[[int], list[str]], world_size: int) -> None:
        """`keys` names the pairs of this rank's batch of an update."""
        self.keys, self.world_size = keys, world_size
        self._found: list[str] = []

    def note(self, step: int, skipped_in_a_row: int, per_pair: Tensor) -> None:
        """To be told of every update; `per_pair` (B,) is not finite for the pairs that spoiled it.

        Raises RuntimeError after ten updates in a row that were skipped, on every rank at once.
        """
        if not skipped_in_a_row:
            self._found.clear()
            return
        spoiled = (~torch.isfinite(per_pair)).tolist()
        if any(spoiled):
            named = zip(self.keys(step - 1), spoiled, strict=True)
            self._found += [key for key, bad in named if bad]
        if skipped_in_a_row == SKIPS_IN_A_ROW:
            raise RuntimeError(self._stopped(step))

    def _stopped(self, step: int) -> str:
        batch = self.keys(step - 1)
        everyone: list[tuple[list[str], list[str]]] = [(self._found, batch)]
        if self.world_size > 1:
            everyone *= self.world_size
            dist.all_gather_object(everyone, (self._found, batch))
        named = list(dict.fromkeys(key for found, _ in everyone for key in found))
        what = "pictures whose loss was not finite"
        if not named:
            named = [key for _, last in everyone for key in last]
            what = "no picture stands out; the last batch's"
        more = f" and {len(named) - NAMED_KEYS} more" if len(named) > NAMED_KEYS else ""
        return (
            f"{SKIPS_IN_A_ROW} updates in a row up to {step} had no finite loss or gradient; "
            f"{what}: {', '.join(named[:NAMED_KEYS])}{more}"
        )

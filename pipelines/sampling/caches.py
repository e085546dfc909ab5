"""What a layer keeps of the past while a picture is sampled: no more than its mask can still see.

Letters: P prompts, N candidates a prompt, T text slots, H heads, D head width, L positions of the
sampled part, S slots that a step reads.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention import LayerKind, image_mask


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a position's key and value are kept, and which slots its step sees.

    A column layer has a slab of slots for each column, so that a step reads one contiguous slab;
    the other kinds have one slab. A slab is a ring as long as the mask looks back within it: a
    write takes the place of what no later position can see.
    """

    mask: Tensor
    """Bool (L, L): which position (a row) sees which."""
    slabs: int
    ring: int
    """Slots of a slab, S."""
    places: Tensor
    """int64 (L,): the slot that a position is written to, counted through all slabs."""
    hidden: Tensor
    """Bool (L, S): the slots of the position's slab that it must not see."""

    def held(self, length: int) -> Tensor:
        """int64: of the first `length` positions those that are not overwritten by then."""
        latest = {place: position for position, place in enumerate(self.places[:length].tolist())}
        return torch.tensor(sorted(latest.values()), dtype=torch.int64)


def make_layout(mask: Tensor, slabs: int = 1) -> Layout:
    """The layout for a causal mask whose positions only see others of their own slab."""
    index = torch.arange(len(mask))
    turn, slab = index // slabs, index % slabs
    ring = int((turn[:, None] - turn[None, :])[mask].max()) + 1
    # Slot s holds the latest position of the slab whose turn is s modulo the ring's length.
    held_turn = turn[:, None] - (turn[:, None] - torch.arange(ring)) % ring
    held = held_turn * slabs + slab[:, None]
    seen = (held_turn >= 0) & mask.gather(1, held.clamp(min=0))
    assert torch.equal(seen.sum(dim=1), mask.sum(dim=1))  # nothing visible is missing
    places = slab * ring + turn % ring
    return Layout(mask=mask, slabs=slabs, ring=ring, places=places, hidden=~seen)


@lru_cache(maxsize=16)  # a few kinds of layers, many layers
def image_layout(kind: LayerKind, grid: int, conv_kernel: int) -> Layout:
    """Row: a ring of grid + 1. Convolution: radius rows, and radius + 1 more because it wraps."""
    return make_layout(image_mask(kind, grid, conv_kernel), grid if kind == "column" else 1)


@lru_cache(maxsize=16)
def text_layout(length: int) -> Layout:
    """Everything, because text sees all text before it, whatever the layer."""
    return make_layout(torch.ones(length, length, dtype=torch.bool).tril())


class Moment(NamedTuple):
    """What one step needs of a layout; the same for all layers that have it."""

    place: Tensor  # (1,) int64
    mask: Tensor  # (1, 1, S), added to the scores
    slab: int | Tensor  # a number, or (1,) int64 where one CUDA graph serves all steps


class Timetable:
    """The moments of all steps, made before the first."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        slabs = layout.places // layout.ring
        mask = torch.zeros(layout.hidden.shape).masked_fill(layout.hidden, float("-inf"))
        self._places, self._slabs = layout.places.to(device), slabs.to(device)
        self._masks = mask[:, None, None].to(device=device, dtype=dtype)
        rows = zip(self._places[:, None], self._masks, slabs.tolist(), strict=True)
        self._moments = [Moment(*row) for row in rows]

    def at(self, position: int) -> Moment:
        return self._moments[position]

    def at_tensor(self, position: Tensor) -> Moment:  # (1,) int64
        """The same where only the device knows the position."""
        return Moment(
            self._places.index_select(0, position),
            self._masks.index_select(0, position)[0],
            self._slabs.index_select(0, position),
        )


class Heads:
    """The buffers in which a step's rows are taken apart into heads and put together again.

    One copy each way, which also changes the precision where the caches' is not the rows'.
    """

    def __init__(self, candidates: int, keys: Tensor, rows_dtype: torch.dtype) -> None:
        """`keys` (P, H, n, D) has the caches' precision and place."""
        prompts, heads, _, width = keys.shape
        self._split = keys.new_empty(3, prompts, heads, candidates, width)
        self._merged = keys.new_empty(prompts, candidates, heads, width, dtype=rows_dtype)
        self._rows = self._merged.view(prompts * candidates, heads * width)
        self.q = self._split[0].view(prompts * heads, candidates, width)
        self.q_rows = self._split[0].view(-1, 1, width)  # (P · H · N, 1, D)
        self.kv = self._split[1:].view(2, -1, 1, width)  # (2, P · H · N, 1, D)

    def split(self, qkv: Tensor) -> None:  # (P · N, 3 · H · D)
        _, prompts, heads, candidates, width = self._split.shape
        rows = qkv.view(prompts, candidates, 3, heads, width)
        self._split.copy_(rows.permute(2, 0, 3, 1, 4))

    def merge(self, y: Tensor) -> Tensor:  # (P · H · N, 1, D) -> (P · N, H · D)
        self._merged.copy_(y.view(self._split.shape[1:]).transpose(1, 2))
        return self._rows


class LayerCache:
    """Keys and values of one layer: of the text once a prompt, of what follows once a candidate."""

    def __init__(self, layout: Layout, text_k: Tensor, text_v: Tensor, candidates: int) -> None:
        prompts, heads, self.text_len, width = text_k.shape
        self.layout, self.scale = layout, width**-0.5
        # Scaled and transposed once: an operand of one matrix product for all of a prompt's rows.
        self.text_k = (text_k * self.scale).flatten(0, 1).transpose(1, 2).contiguous()
        self.text_v = text_v.flatten(0, 1).contiguous()  # (P · H, T, D)
        # Zeros, because a slot that is not written yet counts 0 times what is in it.
        slots = layout.slabs * layout.ring
        self.kv = text_k.new_zeros(2, prompts * heads * candidates, slots, width)

    def prime(self, k: Tensor, v: Tensor) -> None:  # 2 × (P, H, n, D)
        """Take over the first n positions, which all candidates of a prompt share."""
        held = self.layout.held(k.shape[2])
        places = self.layout.places[held].to(k.device)
        slots = self.kv.view(2, *k.shape[:2], -1, *self.kv.shape[2:])
        slots[..., places, :] = torch.stack((k, v))[:, :, :, None, held.to(k.device)]

    def attend(self, heads: Heads, moment: Moment) -> Tensor:
        """Attention of the rows in `heads`, one new position of each: (P · H · N, 1, D)."""
        self.kv.index_copy_(2, moment.place, heads.kv)
        keys, values = self._slab(moment.slab)  # (P · H · N, S, D)
        text = torch.bmm(heads.q, self.text_k)  # (P · H, N, T)
        local = torch.baddbmm(moment.mask, heads.q_rows, keys.transpose(1, 2), alpha=self.scale)
        # One softmax over the text and the image keys together.
        weights = torch.cat((text, local.view(*text.shape[:2], -1)), dim=-1).softmax(dim=-1)
        y = torch.bmm(weights[..., : self.text_len], self.text_v).view(heads.q_rows.shape)
        return y.baddbmm_(weights[..., self.text_len :].view(local.shape), values)

    def _slab(self, slab: int | Tensor) -> Tensor:
        ring = self.layout.ring
        if self.layout.slabs == 1:
            return self.kv
        if isinstance(slab, int):
            return self.kv.narrow(2, slab * ring, ring)
        return self.kv.unflatten(2, (-1, ring)).index_select(2, slab).squeeze(2)

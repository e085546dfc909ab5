"""Continuous batching: a static number of slots, each drawing a picture of whoever is next.

A slot is a row of the batch and is free again as soon as its picture is drawn, so a late order
joins the others in the middle of theirs. An order with guidance takes two slots a picture.
Running a prompt holds up whoever is drawing: when many are, prompts come together, once a row.

What is drawn depends on prompt, seed and settings alone. On a CPU this holds bit for bit in fp32
(without oneDNN: on one thread): attention multiplies one row at a time, and from four rows on the
linear layers give a row the same sums in any company, so that free rows make up what is missing to
four (`tests/unit/test_batching.py`). On a GPU the library chooses another kernel for another number
of rows; there a draw that falls on the edge of two codes may turn.

Who is next: the order that holds the fewest quarters of the slots, of these the one that came
first. So orders are served as they come, and a pool of hundreds never holds more than a quarter of
the slots while others want them.

Letters: A slots in use, T text slots of a prompt, n image tokens that are given, L image tokens of
a picture, K image codes.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.sampling.diagnosis import NonFiniteLogits, non_finite_logits
from pipelines.sampling.drawing import SamplingConfig, draw, uniform_draws
from pipelines.sampling.image_tokens import check_primed, null_prompt
from pipelines.sampling.orders import Drawn, Order
from pipelines.sampling.packing import LEAST_ROWS, PackedPrior, Precision
from pipelines.sampling.picture_source import TooLate
from pipelines.sampling.row_caches import RowDecoder

# Few sizes, because a CPU's library makes and keeps a kernel for each that it meets; eight prompts
# take hardly longer a prompt than sixty-four.
PROMPTS_TOGETHER = (8, 4, 2, 1)


@dataclass(eq=False)
class _Picture:
    """A picture that is drawn, and the rows of the batch that it has."""

    order: Order
    index: int
    rows: list[int]
    position: int
    """Image tokens that it has."""


class Batch:
    """The slots, and the orders that wait for them. One thread has it."""

    def __init__(self, packed: PackedPrior, slots: int, precision: Precision = "fp32") -> None:
        if slots < 2:
            raise ValueError(f"there must be at least 2 slots, guidance takes two, got {slots}")
        self.slots, self.config, self.prior = slots, packed.prior.config, packed.prior
        self._weights = packed.weights(precision)
        rows = max(slots, LEAST_ROWS)
        self._decoder = RowDecoder(self._weights, rows)
        length, device = self.config.image_len, self._weights.device
        self._tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self._draws = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self._logits = torch.zeros(rows, self.config.image_vocab_size, device=device)
        self._unsound = torch.zeros(rows, device=device)  # 0, or NaN
        self._owners: list[_Picture] = []  # of the rows in use, which are the first ones
        self._orders: list[Order] = []  # as they came
        self.steps, self.drawn = 0, 0  # how often it stepped; image tokens that came of it
        self._last_begun = 0  # the step before which orders last got slots

    @property
    def busy_slots(self) -> int:
        """Rows in use."""
        return len(self._owners)

    @property
    def waiting(self) -> int:
        """Pictures that have no slot yet."""
        return sum(len(order.seeds) - order.begun for order in self._orders)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to step for."""
        return not self._orders

    def add(self, order: Order) -> None:
        """Let an order wait for slots. Raises ValueError if it is none that this prior can draw."""
        order.sampling.check(self.config.image_vocab_size)
        order.text_tokens = order.text_tokens.to(self._tokens.device)
        order.primed = order.primed.to(self._tokens.device)
        self.prior.check_tokens(
            order.text_tokens[None], order.text_tokens.new_zeros(1, self.config.image_len)
        )
        check_primed(order.primed[None], self.config, 1)
        if not order.seeds:
            raise ValueError("an order must be for at least one picture, got no seeds")
        if len(order.primed) == self.config.image_len:
            raise ValueError("an order must leave something to draw, got every image token")
        order.left = len(order.seeds)
        self._orders.append(order)

    def drop(self, order: Order) -> None:
        """Forget an order; its slots are free at once. Nobody is told."""
        if order in self._orders:
            self._orders.remove(order)
        order.prefixes = []
        self._free([picture for picture in self._pictures() if picture.order is order])

    def fail_all(self, error: Exception) -> None:
        """Forget all orders and tell them why."""
        for order in [*self._orders]:
            self._fail(order, error)

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every slot in use; free slots are taken first."""
        now = time.monotonic()
        for order in [order for order in self._orders if order.deadline < now]:
            self._fail(order, TooLate())
        if self._may_begin() and (taken := self._take()):
            self._last_begun = self.steps
            self._begin(taken)
        if not self._owners:
            return
        for sampling, pictures in self._by_sampling().items():
            self._draw(sampling, pictures)
        self.steps += 1
        self.drawn += len(self._pictures())
        self._fail_broken()
        self._free([picture for picture in self._pictures() if self._report(picture)])
        if self._owners:
            positions = self._positions()
            rows = torch.arange(len(positions), device=positions.device)
            last = self._tokens[rows, positions - 1]
            self._logits[: len(rows)] = self._decoder.step(last, positions - 1)

    def _may_begin(self) -> bool:
        few = self.busy_slots <= self.slots // 4
        return few or self.steps - self._last_begun >= self.config.grid

    def _take(self) -> list[_Picture]:
        """Give the free slots away; the pictures that have them now."""
        quarter, taken = max(1, self.slots // 4), list[_Picture]()
        waiting = [order for order in self._orders if order.begun < len(order.seeds)]
        while waiting:
            # Of equals the one that came first. Whoever is next waits until its slots are free,
            # else orders that take one would keep out those that take two.
            order = min(waiting, key=lambda order: order.slots // quarter)
            first, last = len(self._owners), len(self._owners) + order.slots_a_picture
            if last > self.slots:
                break
            picture = _Picture(order, order.begun, [*range(first, last)], len(order.primed))
            self._owners += [picture] * len(picture.rows)
            order.begun += 1
            order.slots += len(picture.rows)
            taken.append(picture)
            if order.begun == len(order.seeds):
                waiting.remove(order)
        return taken

    def _begin(self, taken: list[_Picture]) -> None:
        self._run_prompts(list(dict.fromkeys(p.order for p in taken if not p.order.prefixes)))
        draws = uniform_draws([p.order.seeds[p.index] for p in taken], self.config.image_len)
        for picture, uniform in zip(taken, draws, strict=True):
            order = picture.order
            for row, prefix in zip(picture.rows, order.prefixes, strict=True):
                self._decoder.load(row, prefix)
                self._logits[row] = prefix.logits
                self._tokens[row, : picture.position] = order.primed
                self._draws[row].copy_(uniform)
                self._unsound[row] = 0
        for picture in taken:
            if picture.order.begun == len(picture.order.seeds):
                picture.order.prefixes = []  # as large as a row's text

    def _run_prompts(self, orders: list[Order]) -> None:
        """Those with equally many given tokens at once."""
        groups: dict[int, list[tuple[Order, Tensor]]] = {}
        for order in orders:
            texts = [order.text_tokens]
            if order.sampling.guided:
                texts.append(null_prompt(self.config, order.text_tokens[None])[0])
            groups.setdefault(len(order.primed), []).extend((order, text) for text in texts)
        for group in groups.values():
            for size in PROMPTS_TOGETHER:
                while len(group) >= size:
                    self._run_together(group[:size])
                    del group[:size]

    def _run_together(self, prompts: list[tuple[Order, Tensor]]) -> None:
        texts, primed = [text for _, text in prompts], [order.primed for order, _ in prompts]
        prefixes = self._decoder.prefixes(torch.stack(texts), torch.stack(primed))
        for (order, _), prefix in zip(prompts, prefixes, strict=True):
            order.prefixes.append(prefix)

    def _draw(self, sampling: SamplingConfig, pictures: list[_Picture]) -> None:
        device = self._tokens.device
        table = torch.tensor([[*p.rows, p.position] for p in pictures], device=device)
        rows, position = table[:, 0], table[:, -1]
        if len(pictures) == len(self._owners):
            logits = self._logits[: len(pictures)]
        else:
            logits = self._logits.index_select(0, rows)
        if sampling.guided:
            empty = self._logits.index_select(0, table[:, 1])
            logits = torch.lerp(empty, logits, sampling.cond_scale)
        # 0 times a number is 0, times infinity or NaN it is NaN, and that stays.
        self._unsound.index_add_(0, rows, (logits * 0).sum(dim=1))
        codes = draw(logits, self._draws[rows, position], sampling)
        for column in range(table.shape[1] - 1):
            self._tokens[table[:, column], position] = codes
        for picture in pictures:
            picture.position += 1

    def _fail_broken(self) -> None:
        """End the orders whose logits were not finite; a GPU is asked once a row of the picture."""
        if self._tokens.is_cuda and self.steps % self.config.grid and not self._any_ends():
            return
        unsound = self._unsound[: len(self._owners)] != 0
        if not unsound.any():
            return
        flags = unsound.tolist()
        broken = {p.order: p for p in self._pictures() if flags[p.rows[0]]}
        for order, picture in broken.items():
            self._fail(order, self._broken(picture))

    def _any_ends(self) -> bool:
        return any(p.position == self.config.image_len for p in self._owners)

    def _broken(self, picture: _Picture) -> NonFiniteLogits:
        order, prompts = picture.order, self._decoder.prompts
        texts = [order.text_tokens[None]]
        if order.sampling.guided:
            texts.append(null_prompt(self.config, texts[0]))
        tokens = self._tokens[picture.rows[0], : picture.position - 1][None]
        return non_finite_logits(
            f"image token {picture.position - 1} of {self.config.image_len}, or one before it",
            prompts.stack,
            (prompts.embed(text, tokens) for text in texts),
            self.config.text_len,
            prompts.score,
        )

    def _report(self, picture: _Picture) -> bool:
        """Tell of a picture if it is time; whether it is drawn."""
        order, position = picture.order, picture.position
        rows, rest = divmod(position, self.config.grid)
        drawn = position == self.config.image_len
        if rest == 0 and (drawn or (rows in order.moments and picture.index < order.shown)):
            tokens = self._tokens[picture.rows[0], :position].cpu().numpy().copy()
            order.tell(Drawn(picture.index, rows, tokens))
        if drawn:
            order.left -= 1
            if order.left == 0:
                self._orders.remove(order)
        return drawn

    def _fail(self, order: Order, error: Exception) -> None:
        self.drop(order)
        order.tell(error)

    def _free(self, pictures: list[_Picture]) -> None:
        """Give rows back; the last ones move into the gaps, so that those in use stay the first."""
        for picture in pictures:
            picture.order.slots -= len(picture.rows)
            for row in sorted(picture.rows, reverse=True):
                last = len(self._owners) - 1
                if row != last:
                    self._move(last, row)
                self._owners.pop()

    def _move(self, source: int, target: int) -> None:
        self._decoder.move(source, target)
        for table in (self._tokens, self._draws, self._logits, self._unsound):
            table[target] = table[source]
        owner = self._owners[source]
        owner.rows[owner.rows.index(source)] = target
        self._owners[target] = owner

    def _pictures(self) -> list[_Picture]:
        """Each once, in the order of their first rows."""
        return list(dict.fromkeys(self._owners))

    def _by_sampling(self) -> dict[SamplingConfig, list[_Picture]]:
        groups: dict[SamplingConfig, list[_Picture]] = {}
        for picture in self._pictures():
            groups.setdefault(picture.order.sampling, []).append(picture)
        return groups

    def _positions(self) -> Tensor:
        """How many tokens each row in use has, int64; free rows make up what is missing to the
        least number, as if they had one."""
        positions = [picture.position for picture in self._owners]
        positions += [1] * (LEAST_ROWS - len(positions))
        return torch.tensor(positions, device=self._tokens.device)

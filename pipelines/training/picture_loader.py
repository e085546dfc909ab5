"""Batches of augmented pictures, as a function of one integer.

Sample p of a run (p = step x batch + place in the batch) is a fixed picture under a fixed
augmentation: a resumed run, on any number of ranks, sees what the uninterrupted one would have
seen. Whoever holds a loader can make any batch: a thread of the training process (`prefetch`), or
actors beside it (jobs.picture_stream).
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.data.crops import CropConfig, random_crop
from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.split import TRAIN, Split, rows_of
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location

WINDOW_SHARDS = 4
"""Shards that are held in memory and shuffled into each other."""
DECODED_BYTES = 256 << 20
"""Pictures stay decoded in memory if all of them fit in this."""
PREFETCH_BATCHES = 2
TRIES = 100

Arrays = dict[str, np.ndarray]
"""A batch as it travels from the process that made it."""
Batch = TypeVar("Batch")


class Picked(NamedTuple):
    """The square for a place in a run, and which row of which shard it was cut from."""

    square: np.ndarray  # (S, S, 3) uint8
    shard: int
    row: int


@dataclass(frozen=True)
class PictureBatch:
    """One rank's pictures of one update."""

    pixels: Tensor
    """(B, 3, S, S) uint8; the memory is channels-last, as the pictures are."""
    unusable: int
    """Pictures that gave no square and were replaced by the next one."""

    @classmethod
    def unpack(cls, arrays: Arrays) -> "PictureBatch":
        """The batch in what `PictureLoader.arrays` gave."""
        pixels = torch.from_numpy(arrays["squares"]).permute(0, 3, 1, 2)
        return cls(pixels, int(arrays["unusable"]))


class PictureLoader:
    """Reads the pictures of a filtered dataset; indexed by the number of the update."""

    def __init__(
        self,
        manifest: Manifest,
        crops: CropConfig,
        *,
        image_size: int,
        batch_samples: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        split: Split = TRAIN,
    ) -> None:
        if batch_samples % world_size:
            raise ValueError(
                f"batch_samples must divide by the workers, got {batch_samples}, {world_size}"
            )
        parts = list(zip(manifest.shards, rows_of(manifest, split), strict=True))
        if not any(rows for _, rows in parts):
            raise ValueError(f"{manifest.path} must hold at least one {split} picture, got none")
        self.manifest, self.crops, self.image_size = manifest, crops, image_size
        self.batch_samples, self.seed = batch_samples, seed
        self.rank, self.world_size = rank, world_size
        self._unusable = 0
        self._shards = [shard.shard for shard, rows in parts if rows]
        self._first = [rows.start for _, rows in parts if rows]
        self._rows = [len(rows) for _, rows in parts if rows]
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._images = lru_cache(maxsize=WINDOW_SHARDS)(self._read_images)
        self._decode = lru_cache(maxsize=self._decoded_pictures())(self._decode_row)

    def __len__(self) -> int:
        return sum(self._rows)

    def pick(self, step: int) -> tuple[list[Picked], int]:
        """This rank's part of update `step`'s batch, and how many pictures were replaced in it."""
        before = self._unusable
        picked = [self._pick(position) for position in self._positions(step)]
        return picked, self._unusable - before

    def arrays(self, step: int) -> Arrays:
        """`squares` (B, S, S, 3) uint8 and the number of `unusable` pictures."""
        picked, unusable = self.pick(step)
        return {
            "squares": np.stack([one.square for one in picked]),
            "unusable": np.array(unusable),
        }

    def batch(self, step: int) -> PictureBatch:
        """The same as a training takes it."""
        return PictureBatch.unpack(self.arrays(step))

    def column(self, shard: int, name: str) -> list[str]:
        """A column of a shard that `pick` named, as text."""
        values: list[str] = self.manifest.read(self._shards[shard], [name])[name].to_pylist()
        return values

    def keys(self, step: int) -> list[str]:
        """The keys of the pairs at the places of `batch`."""
        rows = [self._locate(*divmod(place, len(self))) for place in self._positions(step)]
        return [self.column(shard, "key")[row] for shard, row in rows]

    def _positions(self, step: int) -> range:
        share = self.batch_samples // self.world_size
        first = step * self.batch_samples + self.rank * share
        return range(first, first + share)

    def _pick(self, position: int) -> Picked:
        """The square at a position of the run; an unusable picture gives way to the next one."""
        last = ""
        for candidate in range(position, position + min(TRIES, len(self))):
            epoch, place = divmod(candidate, len(self))
            shard, row = self._locate(epoch, place)
            rng = np.random.default_rng([self.seed, position // len(self), shard, row])
            try:
                picture = self._decode(shard, row)
                square, _ = random_crop(picture, self.image_size, self.crops, rng)
                return Picked(square, shard, row)
            except UnusablePicture as error:
                self._unusable += 1
                last = f"picture {row} of shard {self._shards[shard]} is {error}"
        raise ValueError(
            f"{self.manifest.path} must hold pictures of at least {self.image_size} pixels, but "
            f"{min(TRIES, len(self))} in a row gave none; {last}"
        )

    def _locate(self, epoch: int, place: int) -> tuple[int, int]:
        """Shard and row of a place in an epoch's order.

        Shards are shuffled and taken a window at a time; the rows of a window are shuffled into
        each other. With few shards this is a permutation of all rows.
        """
        order, ends = self._order(epoch)
        window = bisect_right(ends, place)
        start = ends[window - 1] if window else 0
        members = order[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        number = int(self._permutation(epoch, window, ends[window] - start)[place - start])
        for shard in members:
            if number < self._rows[shard]:
                return shard, self._first[shard] + number
            number -= self._rows[shard]
        raise AssertionError(f"place {place} lies in no shard")

    def _shuffle(self, epoch: int) -> tuple[list[int], list[int]]:
        """The order of the shards in an epoch, and where each window of them ends."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._shards)).tolist()
        windows = range(0, len(order), WINDOW_SHARDS)
        sizes = [sum(self._rows[shard] for shard in order[i : i + WINDOW_SHARDS]) for i in windows]
        return order, list(accumulate(sizes))

    def _permute(self, epoch: int, window: int, rows: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, window]).permutation(rows)

    def _read_images(self, shard: int) -> list[bytes]:
        images: list[bytes] = self.manifest.read(self._shards[shard], ["image"])[
            "image"
        ].to_pylist()
        return images

    def _decode_row(self, shard: int, row: int) -> np.ndarray:
        return decode_picture(self._images(shard)[row])

    def _decoded_pictures(self) -> int:
        """How many decoded pictures to keep: all, or none but the last."""
        table = self.manifest.read(self._shards[0], ["width", "height"])
        pixels = np.multiply(table["width"].to_numpy(), table["height"].to_numpy(), dtype=np.int64)
        return len(self) if 3 * int(pixels.max()) * len(self) <= DECODED_BYTES else 1


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """What a loader is made of; travels to the processes that load, and knows nothing else."""

    filtered: Path | Location
    crops: CropConfig
    image_size: int
    batch_samples: int
    seed: int

    def loader(self, rank: int, world_size: int) -> PictureLoader:
        """What makes a rank's batches."""
        return PictureLoader(
            Manifest.load(self.filtered, stage="filter_pairs"),
            self.crops,
            image_size=self.image_size,
            batch_samples=self.batch_samples,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )


@contextmanager
def prefetch(read: Callable[[int], Batch], first: int, last: int) -> Iterator[Iterator[Batch]]:
    """`read` of the steps first, first + 1, … last - 1, a few ahead in a thread of its own."""
    with ThreadPoolExecutor(1, thread_name_prefix="pictures") as pool:
        ahead: deque[Future[Batch]] = deque()

        def batches() -> Iterator[Batch]:
            for step in range(first, last):
                if step + PREFETCH_BATCHES < last:
                    ahead.append(pool.submit(read, step + PREFETCH_BATCHES))
                yield ahead.popleft().result()

        for step in range(first, min(first + PREFETCH_BATCHES, last)):
            ahead.append(pool.submit(read, step))
        try:
            yield batches()
        finally:
            for future in ahead:
                future.cancel()

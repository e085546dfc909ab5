"""The pictures of an evaluation, which a training should not have seen.

The paper found about a fifth of COCO's validation pictures among its training pictures, by a
network made for it and a threshold set by hand; this looks for altered copies of the same picture.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.picture_hashes import HASHES, WORDS, picture_hashes

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif"))
PARQUET_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """What happens to rows whose picture is in an evaluation set."""

    pictures: str = ""
    """A directory of pictures, or a Parquet file with a column image; pairs that are found go to
    OUTPUT/overlap.json. Empty: nothing is looked for."""
    remove: bool = False
    """Drop them, and all that is near them, with the reason overlaps_evaluation; they are reported
    in any case."""
    max_distance: int = 48
    """Bits of 256 in which two pictures may differ, see NearDuplicatesConfig."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 80:
            raise ValueError(f"max_distance must be in [0, 80], got {self.max_distance}")


@dataclass(frozen=True)
class Evaluation:
    """Pictures to look for."""

    names: list[str]
    hashes: np.ndarray  # (N, HASHES, WORDS) uint64
    flat: list[str]
    """Pictures without contrast, which cannot be looked for."""
    digest: str
    """SHA-256 of the pictures' bytes, in their order; empty if there are none."""


def read_evaluation(path: str) -> Evaluation:
    """Hash the pictures of a directory or of a Parquet file's column `image`; "" has none.

    Raises ValueError if there is none, or if one cannot be decoded: it could not be looked for.
    """
    names: list[str] = []
    flat: list[str] = []
    hashes: list[np.ndarray] = []
    digest = hashlib.sha256()
    for name, data in _pictures(Path(path)) if path else ():
        digest.update(hashlib.sha256(data).digest())
        try:
            ten = picture_hashes(decode_picture(data))
        except UnusablePicture as error:
            raise ValueError(f"{path}: picture {name} is {error}: repair or remove it") from error
        if ten is None:
            flat.append(name)
        else:
            names.append(name)
            hashes.append(ten)
    if path and not names:
        raise ValueError(f"{path} must hold pictures with contrast, got {len(flat)} without")
    stacked = np.stack(hashes) if hashes else np.empty((0, HASHES, WORDS), np.uint64)
    return Evaluation(names, stacked, flat, digest.hexdigest() if path else "")


def _pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                yield str(file.relative_to(path)), file.read_bytes()
        return
    try:
        with pq.ParquetFile(path) as parquet:
            if "image" not in parquet.schema_arrow.names:
                columns = ", ".join(parquet.schema_arrow.names)
                raise ValueError(f"{path} must have a column image, it has {columns}")
            number = 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=["image"]):
                for value in batch["image"].to_pylist():
                    # Hugging Face's datasets keep a picture's bytes in a struct.
                    yield f"row {number}", value["bytes"] if isinstance(value, dict) else value
                    number += 1
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise ValueError(
            f"{path} must be a directory of pictures or a Parquet file: {error}"
        ) from error

"""Rules that look at more than one row: equal pictures, near duplicates, pictures of evaluations.

The driver holds 152 bytes a picture (its content's hash 16, its own perceptual hash and the index
of it 112, its place among the clusters 16, flags), and reads the hashes of trimmed pictures shard
by shard. What it decides is a function of the set of rows, not of their order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.near_duplicates import Clusters, HashIndex
from pipelines.data.overlap import Evaluation, OverlapConfig
from pipelines.data.picture_hashes import HASHES, WORDS
from pipelines.data.split import is_validation
from pipelines.data.stage import Manifest

DECISIONS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string()),  # null: it stays
        pa.field("detail", pa.string()),
        pa.field("representative", pa.binary(16), nullable=False),  # content of its cluster's
    ]
)


@dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig:
    """What happens to pictures that look the same but have other bytes.

    The distance was measured on 4,448 photographs (9.9 million pairs) and altered copies of 250 of
    them. At 48 bits, the 8 pairs found showed the same scene. Found were all copies of half the
    size, of JPEG quality 30, or with other colours or brightness, and 99.6, 100 and 98.8 % of those
    trimmed by 2, 3.5 and 5 %. Drawings of one style differ in less: men and women on bicycles of
    the emoji corpus are alike.
    """

    action: Literal["drop", "keep", "off"] = "drop"
    """drop all of a cluster but one; keep all, on one side of the split; off does not look."""
    max_distance: int = 48
    """Bits of 256 in which near pictures may differ."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 80:
            raise ValueError(f"max_distance must be in [0, 80], got {self.max_distance}")


@dataclass
class Groups:
    """What was decided about pictures that are not alone."""

    decisions: dict[str, pa.Table] = field(default_factory=dict)
    """By shard, in the schema `DECISIONS`; rows that are not in it stay, alone."""
    overlap: list[dict[str, Any]] = field(default_factory=list)
    """Pairs of a row and a picture of the evaluation."""
    figures: dict[str, float] = field(default_factory=dict)


def find_groups(
    prints: Manifest,
    near: NearDuplicatesConfig,
    overlap: OverlapConfig,
    evaluation: Evaluation,
    *,
    validation_fraction: float,
) -> Groups:
    """Decide about all rows of a dataset of fingerprints.

    Of a cluster, the picture with the smallest content hash represents it; of equal pictures, the
    row with the smallest key stays.
    """
    contents, own, shards = _read(prints)
    clusters = Clusters(len(contents))
    equal = _join_equal(clusters, contents)
    if near.action != "off":
        _join_near(clusters, prints, own, shards, near)
    groups = Groups()
    seen = _find_overlap(groups, prints, shards, overlap, evaluation)
    labels = clusters.labels()
    sizes = np.bincount(labels, minlength=len(labels))
    clustered = np.flatnonzero(sizes[labels] > 1)
    shown = {int(labels[row]): name for row, name in seen.items()} if overlap.remove else {}
    tainted = np.zeros(len(labels), bool)
    tainted[list(shown)] = True
    keys = _read_keys(prints, shards, np.union1d(clustered, np.flatnonzero(tainted[labels])))
    members = _members(keys, contents, labels)
    dropped = np.zeros(len(labels), bool)
    rows: dict[str, list[dict[str, Any]]] = {}
    for cluster in members:
        for row, decision in _decide(
            cluster, contents, keys, shown.get(int(labels[cluster[0]])), near
        ):
            dropped[row] = decision["reason"] is not None
            rows.setdefault(_shard_of(shards, row), []).append(decision)
    groups.decisions = {
        shard: pa.Table.from_pylist(found, schema=DECISIONS) for shard, found in rows.items()
    }
    held_out = is_validation(_of_cluster(contents, labels, members), validation_fraction)
    groups.figures |= {
        "equal_pictures": float(equal),
        "near_duplicate_clusters": float(
            sum(len({contents[row].tobytes() for row in cluster}) > 1 for cluster in members)
        ),
        "validation_rows": float((held_out & ~dropped).sum()),
    }
    return groups


@dataclass(frozen=True)
class _Shards:
    names: list[str]
    starts: np.ndarray  # of each shard's rows, and the end

    def rows(self) -> Iterator[tuple[str, int]]:
        yield from zip(self.names, self.starts[:-1].tolist(), strict=True)


def hashes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have hashes, and their (N, HASHES, WORDS) uint64."""
    present = np.flatnonzero(pc.is_valid(column).to_numpy())
    data = b"".join(column.drop_null().to_pylist())
    return present, np.frombuffer(data, np.uint64).reshape(-1, HASHES, WORDS)


def _read(prints: Manifest) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], _Shards]:
    """Contents (N, 16) uint8; rows with a hash and their own hash; where shards begin."""
    names = [part.shard for part in prints.shards]
    starts = np.cumsum([0, *(part.rows_out for part in prints.shards)])
    contents = np.empty((int(starts[-1]), 16), np.uint8)
    rows, own = [], []
    for name, start in zip(names, starts, strict=False):
        table = prints.read(name, ["content", "hashes"])
        part = np.frombuffer(b"".join(table["content"].to_pylist()), np.uint8).reshape(-1, 16)
        contents[start : start + len(part)] = part
        present, hashes = hashes_of(table["hashes"])
        rows.append(start + present)
        own.append(hashes[:, 0].copy())  # without the copy, all ten would stay
    if not names:
        return (
            contents,
            (np.empty(0, np.int64), np.empty((0, WORDS), np.uint64)),
            _Shards([], starts),
        )
    return contents, (np.concatenate(rows), np.concatenate(own)), _Shards(names, starts)


def _join_equal(clusters: Clusters, contents: np.ndarray) -> int:
    """Join rows of equal pictures; how many rows repeat another."""
    _, first, inverse = np.unique(
        contents.view("V16")[:, 0], return_index=True, return_inverse=True
    )
    clusters.join(np.arange(len(contents)), first[inverse])
    return len(contents) - len(first)


def _join_near(
    clusters: Clusters,
    prints: Manifest,
    own: tuple[np.ndarray, np.ndarray],
    shards: _Shards,
    config: NearDuplicatesConfig,
) -> None:
    rows, hashes = own
    order = np.lexsort(hashes.T)
    new = np.ones(len(order), bool)
    new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    # Equal hashes are joined here, so that a thousand copies are not half a million pairs.
    owner = rows[order[new]]
    clusters.join(rows[order], owner[np.cumsum(new) - 1])
    index = HashIndex(hashes[order[new]], config.max_distance)
    for shard, start in shards.rows():
        present, ten = hashes_of(prints.read(shard, ["hashes"])["hashes"])
        for query, found in index.near(ten.reshape(-1, WORDS)):
            clusters.join(start + present[query // HASHES], owner[found])


def _find_overlap(
    groups: Groups,
    prints: Manifest,
    shards: _Shards,
    config: OverlapConfig,
    evaluation: Evaluation,
) -> dict[int, str]:
    """Rows near a picture of the evaluation, and its name; fills `overlap` and its figures."""
    if not evaluation.names:
        return {}
    index = HashIndex(evaluation.hashes.reshape(-1, WORDS), config.max_distance)
    rows: dict[int, str] = {}
    for shard, start in shards.rows():
        table = prints.read(shard, ["key", "hashes"])
        present, ten = hashes_of(table["hashes"])
        near = index.near(ten.reshape(-1, WORDS))
        pairs = {
            (int(present[query]), int(picture))
            for queries, found in near
            for query, picture in zip(queries // HASHES, found // HASHES, strict=True)
        }
        rows |= {start + row: evaluation.names[picture] for row, picture in sorted(pairs)}
        groups.overlap += [
            {"key": table["key"][row].as_py(), "shard": shard, "picture": evaluation.names[picture]}
            for row, picture in sorted(pairs)
        ]
    groups.figures |= {
        "overlapping_rows": float(len(rows)),
        "overlapping_pictures": float(len({pair["picture"] for pair in groups.overlap})),
        "evaluation_pictures": float(len(evaluation.names)),
        "evaluation_pictures_without_contrast": float(len(evaluation.flat)),
    }
    return rows


def _read_keys(prints: Manifest, shards: _Shards, wanted: np.ndarray) -> dict[int, str]:
    keys: dict[int, str] = {}
    for number, (shard, start) in enumerate(shards.rows()):
        first, last = np.searchsorted(wanted, [start, shards.starts[number + 1]])
        if first == last:
            continue
        rows = wanted[first:last]
        table = prints.read(shard, ["key"]).take(rows - start)
        keys |= dict(zip(rows.tolist(), table["key"].to_pylist(), strict=True))
    return keys


def _members(keys: dict[int, str], contents: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """The clusters of these rows, each with its representative first."""
    clusters: dict[int, list[int]] = {}
    for row in sorted(keys, key=lambda row: (contents[row].tobytes(), keys[row])):
        clusters.setdefault(int(labels[row]), []).append(row)
    return list(clusters.values())


def _decide(
    cluster: Sequence[int],
    contents: np.ndarray,
    keys: dict[int, str],
    shown: str | None,
    near: NearDuplicatesConfig,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What happens to each row of a cluster whose representative comes first."""
    first = cluster[0]
    representative = contents[first].tobytes()
    holders: dict[bytes, int] = {}
    for row in cluster:
        holder = holders.setdefault(contents[row].tobytes(), row)
        reason, detail = None, None
        if holder != row:
            reason, detail = "duplicate_picture", keys[holder]
        elif row != first and near.action == "drop":
            reason, detail = "near_duplicate", keys[first]
        elif shown is not None:
            reason, detail = "overlaps_evaluation", shown
        yield (
            row,
            {
                "key": keys[row],
                "reason": reason,
                "detail": detail,
                "representative": representative,
            },
        )


def _of_cluster(
    contents: np.ndarray, labels: np.ndarray, members: Sequence[Sequence[int]]
) -> np.ndarray:
    """Each row's representative's content, its first 8 bytes."""
    found = contents[:, :8].copy()
    for cluster in members:
        found[list(cluster)] = found[cluster[0]]
    return found


def _shard_of(shards: _Shards, row: int) -> str:
    return shards.names[int(np.searchsorted(shards.starts, row, side="right")) - 1]

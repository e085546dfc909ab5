"""img2dataset's outputs (webdataset, Parquet) as a raw dataset of ours.

Pictures go through the same checks as fetched ones: the bytes are decoded and encoded anew. Rows
that img2dataset lost become dropped rows with our reasons.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import killable
from pipelines.data.archive import ArchiveLimits, read_members
from pipelines.data.bad_files import BadFile, OnBadFile
from pipelines.data.causes import reason_said
from pipelines.data.killable import Resize
from pipelines.data.resize import ResizeConfig, resize_picture
from pipelines.data.schema import DROPPED, RAW
from pipelines.data.stage import DatasetWriter
from pipelines.data.storage import sha256_file
from pipelines.data.urls import pair_key

STAGE = "import_pairs"
PICTURES = ("jpg", "png", "webp")
TEXTS = ("key", "url", "caption", "status", "error_message", "sha256")
SIDES = ("original_width", "original_height")
MAX_SIDE = 1 << 20  # of a picture that we do not have: what is claimed must be believable


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What is taken of a foreign dataset and what is stored of a picture."""

    max_rows_per_shard: int = 100_000
    """Pairs of one file; img2dataset's default is 10,000."""
    archive: ArchiveLimits = field(default_factory=ArchiveLimits)
    resize: ResizeConfig = field(default_factory=ResizeConfig)


def shard_names(folder: Path) -> list[str]:
    """The shards of an img2dataset output: the names of its Parquet files and tars."""
    if not folder.is_dir():
        raise ValueError(f"{folder} must be the output directory of img2dataset, it is none")
    names = {file.stem for file in folder.iterdir() if file.suffix in (".parquet", ".tar")}
    if not names:
        raise ValueError(f"{folder} must hold Parquet files or tars of img2dataset, it has none")
    for name in names:
        if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", name):
            raise ValueError(f"{folder} has a shard of a name that is not img2dataset's: {name!r}")
    return sorted(names)


def sound_shards(
    folder: Path, config: ImportConfig, on_bad_file: OnBadFile
) -> tuple[list[str], list[BadFile]]:
    """The shards that are imported and, if bad files are left out, those of the others.

    To find them takes a reading of every file; otherwise the workers find them, and raise BadFile.
    Raises the first one if no shard is sound.
    """
    names = shard_names(folder)
    if on_bad_file == "fail":
        return names, []
    faults = {name: _fault(folder, name, config) for name in names}
    bad = [error for error in faults.values() if error is not None]
    if len(bad) == len(names):
        raise bad[0]
    return [name for name in names if faults[name] is None], bad


def _fault(folder: Path, shard: str, config: ImportConfig) -> BadFile | None:
    try:
        for _ in _rows(folder, shard, config):
            pass
    except BadFile as error:
        return error
    return None


def digest(folder: Path, shards: Sequence[str]) -> str:
    """SHA-256 over the files of these shards; reads them once."""
    files = [
        file
        for name in shards
        for suffix in (".parquet", ".tar")
        if (file := folder / f"{name}{suffix}").exists()
    ]
    lines = "".join(f"{file.name} {sha256_file(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def commit_imported(
    item: dict[str, Any], *, folder: Path, writer: DatasetWriter, config: ImportConfig
) -> dict[str, Any]:
    """Import and commit one shard."""
    shard = item["shard"]
    with (
        killable.attempt(writer.place, shard) as careful,
        killable.resizer(config.resize, careful=careful) as resize,
    ):
        kept, dropped = import_shard(folder, shard, config, resize)
        rows = kept.num_rows + dropped.num_rows
        commit = writer.commit(shard, kept, dropped, rows_in=rows, schema=RAW)
    return {"shard": commit.shard, "rows_in": commit.rows_in, "rows_out": commit.rows_out}


def import_shard(
    folder: Path, shard: str, config: ImportConfig, resize: Resize | None = None
) -> tuple[pa.Table, pa.Table]:
    """The (RAW, DROPPED) tables of one shard; raises BadFile for a file that is not sound.

    `resize` is one of `killable.resizer`, without which a picture may kill this process.
    """
    resize = resize or partial(resize_picture, config=config.resize)
    kept: dict[str, dict[str, Any]] = {}
    dropped: list[dict[str, Any]] = []
    for count, row in enumerate(_rows(folder, shard, config), start=1):
        if count > config.max_rows_per_shard:
            raise ValueError(
                f"shard {shard} of {folder} must have at most {config.max_rows_per_shard:,} rows"
            )
        pair = {"url": row["url"] or "", "caption": row["caption"] or ""}
        pair |= {"key": pair_key(pair["url"], pair["caption"])}
        found = _judge(row, resize)
        if "reason" not in found and pair["key"] in kept:
            found = {"reason": "duplicate_pair", "detail": ""}
        if "reason" in found:
            dropped.append(pair | found)
        else:
            kept[pair["key"]] = pair | found
    return (
        pa.Table.from_pylist([row for _, row in sorted(kept.items())], schema=RAW),
        pa.Table.from_pylist(
            sorted(dropped, key=lambda row: (row["key"], row["reason"], row["detail"])),
            schema=DROPPED,
        ),
    )


def _judge(row: Mapping[str, Any], resize: Resize) -> dict[str, Any]:
    """The picture's columns, or a reason and a detail."""
    if row["status"] not in (None, "success"):
        return {"reason": drop_reason(row), "detail": (row["error_message"] or "")[:100]}
    image = row["picture"]
    if not image:
        return {"reason": "picture_missing", "detail": "in the foreign dataset"}
    told = row["sha256"] or ""
    sha256 = told if re.fullmatch("[0-9a-f]{64}", told) else hashlib.sha256(image).hexdigest()
    found = resize(image).columns(sha256)
    sides = {side: row[side] for side in SIDES}
    if "reason" not in found and all(
        isinstance(side, int) and 0 < side < MAX_SIDE for side in sides.values()
    ):
        found |= sides
    return found


def drop_reason(row: Mapping[str, Any]) -> str:
    """Our reason for a row that img2dataset has no picture of."""
    if row["status"] == "failed_to_resize":
        return "resize_failed"
    return reason_said(row["error_message"] or "")


def _rows(folder: Path, shard: str, config: ImportConfig) -> Iterator[dict[str, Any]]:
    """Rows with `picture` and all of TEXTS and SIDES, as far as they are there."""
    table, tar = folder / f"{shard}.parquet", folder / f"{shard}.tar"
    if not table.exists():
        yield from _rows_of_tar(tar, config)
    elif not tar.exists():
        yield from _rows_of_parquet(table)
    else:
        with_pictures = {row["key"]: row["picture"] for row in _rows_of_tar(tar, config)}
        for row in _rows_of_parquet(table):
            yield row | {"picture": with_pictures.pop(row["key"], None)}
        if with_pictures:
            name = sorted(map(str, with_pictures))[0]
            raise BadFile(tar, f"has the picture of {name}, of which {table.name} knows nothing")


def _rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as parquet:
            names = parquet.schema_arrow.names
            picture = next((name for name in PICTURES if name in names), None)
            if missing := [name for name in ("url", "caption") if name not in names]:
                raise BadFile(
                    path,
                    f"must have the columns url and caption, but {' and '.join(missing)} "
                    f"is missing; it has {', '.join(names)}",
                )
            wanted = [name for name in (*TEXTS, *SIDES, picture) if name in names]
            for batch in parquet.iter_batches(64, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    yield _complete(row, row.pop(picture, None), path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not Arrow's
            raise
        raise BadFile(path, "must be a readable Parquet file", error) from error


def _rows_of_tar(path: Path, config: ImportConfig) -> Iterator[dict[str, Any]]:
    """Members of one pair follow each other: KEY.jpg, KEY.json, KEY.txt in any order."""
    key, fields = "", dict[str, bytes]()
    for name, content in read_members(path, config.archive):
        stem, _, suffix = name.partition(".")
        if stem != key and fields:
            yield _row_of_members(key, fields, path)
            fields = {}
        key = stem
        fields[suffix.lower()] = content
    if fields:
        yield _row_of_members(key, fields, path)


def _row_of_members(key: str, fields: Mapping[str, bytes], path: Path) -> dict[str, Any]:
    picture = next((fields[name] for name in PICTURES if name in fields), None)
    try:
        told = json.loads(fields.get("json", b"{}"))
        caption = fields["txt"].decode() if "txt" in fields else told.get("caption")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadFile(path, f"must have JSON and UTF-8 texts; of {key!r}: {error}") from error
    wanted = {name: told.get(name) for name in (*TEXTS, *SIDES)}
    return _complete(wanted | {"key": key, "caption": caption}, picture, path)


def _complete(row: dict[str, Any], picture: Any, path: Path) -> dict[str, Any]:
    found = dict.fromkeys((*TEXTS, *SIDES)) | row | {"picture": picture}
    if not all(isinstance(found[name], str | None) for name in TEXTS) or not isinstance(
        picture, bytes | None
    ):
        raise BadFile(path, f"must have texts in {', '.join(TEXTS)} and bytes as pictures")
    return found

"""Datasets as WebDataset tars: the same dataset gives the same bytes, wherever and whenever."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipelines.data.shard_files import open_shard
from pipelines.data.stage import READ_ROWS, Manifest
from pipelines.data.storage import replace_file_by, sha256_file

STAGE = "export_webdataset"
INDEX = "index.json"
STAGES = ("filter_pairs", "encode_pairs")
SIGNATURES = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


def export_shard(manifest: Manifest, shard: str, folder: Path) -> dict[str, Any]:
    """Write SHARD.tar once: KEY.jpg (or .npy: the codes), KEY.txt and KEY.json for each row.

    A tar that is there is whole: it gets its name when its last byte is on the disk.
    """
    final = folder / f"{shard}.tar"
    if not final.exists():
        replace_file_by(final, partial(_write, manifest=manifest, shard=shard))
    rows = manifest.commit_of(shard).rows_out
    return {"file": final.name, "rows": rows, "sha256": sha256_file(final)}


def _write(file: BinaryIO, manifest: Manifest, shard: str) -> None:
    for name, content in _members(manifest, shard):
        info = tarfile.TarInfo(name)  # its other fields are constants
        info.size, info.mode = len(content), 0o644
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
    file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive


def _members(manifest: Manifest, shard: str) -> Iterator[tuple[str, bytes]]:
    seen: Counter[str] = Counter()
    for row in _rows(manifest, shard):
        key, caption = row.pop("key"), row.pop("caption")
        name = f"{key}-{seen[key]}" if seen[key] else key  # crops of one picture share its key
        seen[key] += 1
        if "image_tokens" in row:
            yield f"{name}.npy", _codes(row.pop("image_tokens"))
        else:
            image = row.pop("image")
            yield f"{name}.{_suffix(image)}", image
        yield f"{name}.txt", caption.encode()
        fields = {"key": key, "caption": caption, **row}
        yield f"{name}.json", json.dumps(fields, ensure_ascii=False, sort_keys=True).encode()


def _rows(manifest: Manifest, shard: str) -> Iterator[dict[str, Any]]:
    with open_shard(manifest.path / manifest.commit_of(shard).file) as parquet:
        for batch in parquet.iter_batches(READ_ROWS, use_threads=False):
            yield from batch.to_pylist()


def _codes(tokens: bytes) -> bytes:
    values = np.frombuffer(tokens, "<u2")
    side = round(len(values) ** 0.5)
    buffer = io.BytesIO()
    np.save(buffer, values.reshape(side, side))
    return buffer.getvalue()


def _suffix(image: bytes) -> str:
    for signature, suffix in SIGNATURES:
        if image.startswith(signature):
            return suffix
    raise ValueError(f"a stored picture must be JPEG, PNG, WebP or GIF, got {image[:4]!r}")

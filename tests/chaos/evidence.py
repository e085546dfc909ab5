"""What a dataset holds, read with other eyes than the protocol's."""

import hashlib
import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data import checking, garbage
from pipelines.data.stage import Manifest
from pipelines.data.storage import Location


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was found; `faults` is empty if nothing is wrong."""

    digest: str
    keys: list[str]
    """Of all rows, kept and dropped, sorted; a row that is there twice is here twice."""
    faults: list[str]
    left: list[str]
    """Abandoned files, which the job itself has not collected; collected now."""


def of(place: Location) -> Evidence:
    """Look through a dataset that should be finished, and through its fingerprints."""
    faults: list[str] = []
    keys: list[str] = []
    left: list[str] = []
    digest = ""
    try:
        digest = Manifest.load(place).digest
        for each in (place, place / "fingerprints"):
            left += [entry.name for entry in garbage.garbage(each)]
            garbage.collect(each)
        content = json.loads((place / "manifest.json").read())
        for shard in content["shards"]:
            names = ("file", "sha256"), ("dropped_file", "dropped_sha256")
            for name, sha256 in names:
                keys += _keys(place / shard[name], shard[sha256], faults)
        for each in (place, place / "fingerprints"):
            if (each / "plan.json").exists():
                faults += [f"{fault.file}: {fault.what}" for fault in checking.check(each)]
    except (ValueError, FileNotFoundError) as error:
        faults.append(f"{type(error).__name__}: {error}")
    return Evidence(digest=digest, keys=sorted(keys), faults=faults, left=left)


def _keys(file: Location, sha256: str, faults: list[str]) -> list[str]:
    try:
        data = file.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            faults.append(f"{file} is not what was committed")
        return [str(key) for key in pq.read_table(pa.BufferReader(data))["key"].to_pylist()]
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        faults.append(f"{file}: {error}")
        return []

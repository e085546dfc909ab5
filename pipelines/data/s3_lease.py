"""One driver an output, in S3: an object that its holder writes anew while it lives.

The lease saves work; it is not what makes a dataset right. A driver that was held up for longer
than a lease and finds it taken does nothing worse than work in vain, because every record of the
protocol is created once.

How old the lease is, is the difference of two times of the server's clock. Whoever finds it older
than its time takes it over by a write that fails if it has been written since.
"""

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.data import s3
from pipelines.data.storage import Location, canonical_json

LEASE = ".lease"
EXPIRES_AFTER_S = 60.0
BEATS = 4  # signs of life in that time


@contextmanager
def hold(place: Location, expires_after_s: float = EXPIRES_AFTER_S) -> Iterator[str | None]:
    """Hold the lease while the block runs; gives the holder's name if somebody else has it."""
    bucket, key = place.object_name()
    mine = {
        "holder": f"process {os.getpid()} on {socket.gethostname()}",
        "owner": uuid.uuid4().hex,
        "expires_after_s": expires_after_s,
        "beat": 0,
    }
    if holder := _acquire(bucket, key, mine):
        yield holder
        return
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(bucket, key, mine, ended), daemon=True)
    beating.start()
    try:
        yield None
    finally:
        ended.set()
        beating.join()
        _release(bucket, key, mine)


def _acquire(bucket: str, key: str, mine: dict[str, Any]) -> str:
    """Empty if the lease is ours now, else who holds it."""
    data = canonical_json(mine)
    while not s3.create(bucket, key, data):
        try:
            found = s3.get(bucket, key)
        except FileNotFoundError:  # given back since
            continue
        theirs = _content(found.data)
        if found.age_s <= float(theirs.get("expires_after_s", EXPIRES_AFTER_S)):
            return str(theirs.get("holder", "another process"))
        if s3.swap(bucket, key, data, found.version):
            break
    return ""


def _beat(bucket: str, key: str, mine: dict[str, Any], ended: threading.Event) -> None:
    """Write the lease anew until the end, or until it is somebody else's."""
    beat = 0
    while not ended.wait(mine["expires_after_s"] / BEATS):
        beat += 1
        try:
            found = s3.get(bucket, key)
            if _content(found.data).get("owner") != mine["owner"]:
                return
            s3.swap(bucket, key, canonical_json(mine | {"beat": beat}), found.version)
        except (OSError, ValueError):  # the store is away: the driver will hear of it itself
            continue


def _release(bucket: str, key: str, mine: dict[str, Any]) -> None:
    """Let the next one have it at once: write a lease that has expired, unless it is not ours."""
    try:
        found = s3.get(bucket, key)
        if _content(found.data).get("owner") == mine["owner"]:
            s3.swap(bucket, key, canonical_json(mine | {"expires_after_s": -1.0}), found.version)
    except (OSError, ValueError):  # it then ends by itself
        return


def _content(data: bytes) -> dict[str, Any]:
    """What a lease says; one that nobody can read says nothing, and expires as usual."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}

"""The steps of a process that others can see: what it does to files of a dataset, or asks of S3.

Python tells of them before they happen (audit events, PEP 578), so that a test can stop or kill a
process between any two of them, and production code need not know.
"""

import os
from typing import Any

ON_A_PATH = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"}
# urllib3, and so boto3, sends heads and bodies of requests with it.
ON_A_STORE = "http.client.send"


def step_of(event: str, arguments: tuple[Any, ...], root: str) -> str | None:
    """The path or place that a step is about, None if the event is no step on `root`.

    `root` is a directory, or HOST:PORT of a store.
    """
    if event in ON_A_PATH:
        paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
        return next((path for path in paths if path.startswith(root + "/")), None)
    if event == ON_A_STORE:
        connection = arguments[0]
        return root if f"{connection.host}:{connection.port}" == root else None
    if event == "fcntl.flock":
        path = os.readlink(f"/proc/self/fd/{arguments[0]}")
        return path if path.startswith(root + "/") else None
    return None


def opens_for_writing(event: str, arguments: tuple[Any, ...]) -> bool:
    """True if the event is the opening of a file that will then be written."""
    return event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))

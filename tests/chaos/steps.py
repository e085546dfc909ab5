"""The steps of a process that others can see: what it does to files of a dataset.

Python tells of them before they happen (audit events, PEP 578), so that a test can stop or kill a
process between any two of them, and production code need not know.
"""

import os
from typing import Any

ON_A_PATH = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir"}


def step_of(event: str, arguments: tuple[Any, ...], root: str) -> str | None:
    """The path that a step is about, None if the event is no step below the directory `root`."""
    if event in ON_A_PATH:
        paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
        return next((path for path in paths if path.startswith(root + "/")), None)
    if event == "fcntl.flock":
        path = os.readlink(f"/proc/self/fd/{arguments[0]}")
        return path if path.startswith(root + "/") else None
    return None


def opens_for_writing(event: str, arguments: tuple[Any, ...]) -> bool:
    """True if the event is the opening of a file that will then be written."""
    return event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))

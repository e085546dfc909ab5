"""What jobs.serve_keys can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class ServeKeysJob:
    """Make, list and end the keys of jobs.serve_sampler; a server notices at its next request."""

    action: Annotated[Literal["add", "remove", "list"], tyro.conf.Positional]
    keys: Path
    """The file: names, and of each key its SHA-256."""
    name: str = ""
    """Whose key it is; shown in logs."""

    def __post_init__(self) -> None:
        if (self.action == "list") == bool(self.name):
            wanted = "absent" if self.action == "list" else "given"
            raise ValueError(f"name must be {wanted} to {self.action}")

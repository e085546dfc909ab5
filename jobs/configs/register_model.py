"""What jobs.register_model can be told."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RegisterModelJob:
    """Enter a trained sampler in MLflow's registry; jobs.serve_sampler takes it by its alias."""

    tokenizer: Path
    dvae: Path
    """A dVAE, or a VQ-VAE in its place."""
    prior: Path
    name: str = "manray"
    """Of the registered model; each call makes a new version of it."""
    alias: str = "production"
    """Names the new version from now on; a server is told so with --update."""

    def __post_init__(self) -> None:
        for field, value in (("name", self.name), ("alias", self.alias)):
            if not value or set(value) & set("/@:"):
                raise ValueError(f"{field} must not be empty or have / @ or :, got {value!r}")

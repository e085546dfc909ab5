"""Settings of `jobs.quickstart`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.configs import train_clip, train_dvae, train_prior
from jobs.configs.job import Job


@dataclass(frozen=True, kw_only=True)
class QuickstartJob(Job):
    """From a list of URLs to a served model, on the pictures that ship with manray."""

    output: Path = Path("runs/quickstart")
    pictures: int = 256
    """Pictures of the corpus in the URL list, besides nine bad rows as the web has them."""
    stage_one: Literal["dvae", "vqvae"] = "dvae"
    """Which model turns pictures to codes: the paper's, or the VQ-VAE in its place."""
    dvae_steps: int = train_dvae.TINY.training.steps
    """Updates of the dVAE, or of the VQ-VAE."""
    prior_steps: int = train_prior.TINY.training.steps
    """Updates of the prior."""
    clip_steps: int = train_clip.TINY.training.steps
    """Updates of the reranker."""
    web_port: int = 8790
    """Loopback port that serves the corpus; part of the URLs, so part of the data's digest."""
    port: int = 8000
    """Loopback port that the trained model is served on."""
    until: Literal[
        "download_pairs",
        "filter_pairs",
        "train_tokenizer",
        "train_dvae",
        "train_vqvae",
        "encode_pairs",
        "train_prior",
        "train_clip",
        "sample",
        "evaluate",
        "serve_sampler",
    ] = "serve_sampler"
    """Last job to run; the same line without it goes on from there."""
    keep_serving: Literal["on_terminal", "always", "never"] = "on_terminal"
    """Whether to go on serving at the end until Ctrl-C."""


PRESETS: dict[str, tuple[str, QuickstartJob]] = {
    "tiny": ("256 pictures, about seven minutes on two CPU cores.", QuickstartJob()),
    "smoke": (
        "48 pictures and a few steps, about two minutes: every part runs, nothing is learned.",
        QuickstartJob(
            output=Path("runs/smoke"),
            pictures=48,
            dvae_steps=40,
            prior_steps=40,
            clip_steps=20,
            web_port=8791,
        ),
    ),
}

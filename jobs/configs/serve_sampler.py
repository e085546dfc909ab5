"""Settings of `jobs.serve_sampler`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jobs.configs.job import Job
from pipelines.sampling.access import AccessSettings, check_exposure
from pipelines.sampling.loading import DeviceChoice
from pipelines.sampling.packing import Precision
from pipelines.sampling.picture_source import ServingLimits


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many processes of a kind there are, and what each has."""

    replicas: int = 1
    most_replicas: int = 0
    """Under load there may be so many, without it `replicas`; 0: always `replicas`."""
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.cpus < 0 or self.gpus < 0:
            raise ValueError(
                "replicas must be at least 1, cpus and gpus 0 or more, "
                f"got {self.replicas}, {self.cpus}, {self.gpus}"
            )
        if self.most_replicas and self.most_replicas < self.replicas:
            raise ValueError(
                f"most_replicas must be 0 or at least replicas ({self.replicas}), "
                f"got {self.most_replicas}"
            )

    @property
    def most(self) -> int:
        """Replicas that there may be."""
        return max(self.replicas, self.most_replicas)


@dataclass(frozen=True, kw_only=True)
class ServeSamplerJob(Job):
    """Serve pictures over HTTP, in the shape of OpenAI's Images API."""

    output: Path = Path("runs/12b/serving")
    """Directory for serving.json: what is served where."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place."""
    prior: Path = Path("runs/12b/prior/prior.safetensors")
    """Or models:/NAME@ALIAS of MLflow's registry, which brings tokenizer and dVAE along."""
    clip: Path | None = None
    """The reranker's model; without one there is no rerank_pool."""
    model_name: str = "manray"
    """What requests may name as their model, and /v1/models lists."""
    host: str = "127.0.0.1"
    """Address to listen on; others than loopback need keys, or a word that there are none."""
    allow_without_keys: bool = False
    """Whether anybody who reaches the address may ask for pictures."""
    access: AccessSettings = field(default_factory=AccessSettings)
    port: int = 8000
    listen: Literal["ingress", "proxies"] = "ingress"
    """Who accepts connections: the ingress processes themselves, where they are; or Ray Serve's
    proxies on every node of a cluster, which cost ten milliseconds of CPU a request."""
    device: DeviceChoice = "cpu_or_gpu"
    slots: int = 16
    """Pictures that a sampler draws at once: bounds its memory. Guidance takes two a picture."""
    precision: Precision = "fp32"
    """Of the prior's branches; in fp32 on a CPU a request gives the same bits in any company."""
    ingress: Scale = field(default_factory=lambda: Scale(cpus=0))
    """Processes that speak HTTP; they hold no model."""
    samplers: Scale = field(default_factory=Scale)
    rerankers: Scale = field(default_factory=Scale)
    limits: ServingLimits = field(default_factory=ServingLimits)
    update: bool = False
    """Replace what a running server serves, after a picture was drawn from the new files; a request
    under way ends with the old ones. Needs RAY_ADDRESS, and room for a sampler more."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be 1 to 65535, got {self.port}")
        check_exposure(self.host, self.access, allow_without_keys=self.allow_without_keys)
        if self.listen == "ingress" and self.ingress.most_replicas:
            raise ValueError(
                "listen must be proxies with ingress.most_replicas: Ray Serve counts only requests "
                "that come through them; or say ingress.replicas"
            )
        if self.slots < 2:
            raise ValueError(f"slots must be at least 2, guidance takes two, got {self.slots}")


TINY = ServeSamplerJob(
    output=Path("runs/quickstart/serving"),
    tokenizer=Path("runs/quickstart/tokenizer/tokenizer.json"),
    dvae=Path("runs/quickstart/dvae/dvae.safetensors"),
    prior=Path("runs/quickstart/prior/prior.safetensors"),
)

PRESETS: dict[str, tuple[str, ServeSamplerJob]] = {
    "tiny": ("The quickstart's model on one CPU core: a picture a second.", TINY),
    "12b": (
        "The paper's model: one replica on a GPU of 80 GB.",
        ServeSamplerJob(samplers=Scale(gpus=1.0), device="gpu", precision="bf16"),
    ),
}

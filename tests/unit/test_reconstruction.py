"""The reconstruction report's figures: pictures, bounds, codes, and no trace of the batch size."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from models.dvae import DVAE, DVAEConfig
from models.stage_one import StageOne
from models.vqvae import VQVAE, VQVAEConfig
from pipelines.data.decode import decode_picture
from pipelines.data.schema import FILTERED
from pipelines.data.stage import Manifest
from pipelines.evaluation.centre_squares import centre_squares
from pipelines.evaluation.frechet import PairedSets
from pipelines.evaluation.reconstruction import (
    Judgement,
    ReconstructionConfig,
    bound_and_picture,
    draw_codes,
    measure,
)
from pipelines.evaluation.reconstruction_report import EXPLAINED, notes
from tests.fixtures.datasets import filtered_pairs, filtered_row, write_dataset

SIDE = 32
ROWS = 40
SIZES = {"image_size": SIDE, "vocab_size": 64, "n_hid": 8, "n_init": 8, "n_blk_per_group": 1}
WITHOUT_NETWORK = ReconstructionConfig(frechet=False, shown=5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return filtered_pairs(tmp_path_factory.mktemp("pairs") / "filtered", rows=ROWS)


def dvae() -> DVAE:
    torch.manual_seed(0)
    model = DVAE(DVAEConfig(**SIZES))
    with torch.no_grad():  # fresh logits are almost equal: codes would be drawn from all
        model.encoder.blocks.output.conv.w.mul_(8)
    return model.eval()


def vqvae() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(**SIZES, code_width=4)).eval()


def judge(
    model: StageOne, manifest: Manifest, config: ReconstructionConfig, batch_samples: int = 16
) -> Judgement:
    return measure(model, manifest, config, batch_samples=batch_samples, on_rows=lambda _: None)


def stripes(width: int, height: int) -> bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(width) * 255 // width
    pixels[:, :, 1] = (np.arange(height) * 255 // height)[:, None]
    return cv2.imencode(".png", pixels)[1].tobytes()


def dataset(path: Path, sizes: list[tuple[int, int]]) -> Manifest:
    rows = [filtered_row(f"{i} {size}", stripes(*size)) for i, size in enumerate(sizes)]
    table = pa.Table.from_pylist(rows, schema=FILTERED)
    return write_dataset(path, "filter_pairs", table, inputs={"raw": "0" * 64}, rows_per_shard=3)


def test_a_picture_is_its_middle_square_scaled_by_area(tmp_path: Path) -> None:
    wide = dataset(tmp_path / "wide", [(100, 64)])
    (square,) = centre_squares(wide, SIDE, 1)
    assert square is not None
    middle = decode_picture(stripes(100, 64))[:, 18:82]
    expected = middle.reshape(SIDE, 2, SIDE, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(square.pixels, expected, atol=0.51)


def test_a_bound_on_the_number_spreads_over_the_whole_dataset(tmp_path: Path) -> None:
    many = dataset(tmp_path / "many", [(SIDE + i, SIDE) for i in range(21)])
    found = [square.caption for square in centre_squares(many, SIDE, 5) if square]
    assert [caption.split()[0] for caption in found] == ["0", "5", "10", "15", "20"]


def test_unusable_pictures_are_counted_and_left_out(tmp_path: Path) -> None:
    sizes = [(SIDE + 8 * (i % 4), SIDE + i) for i in range(8)]
    good = judge(dvae(), dataset(tmp_path / "good", sizes), WITHOUT_NETWORK)
    rows = [*sizes[:3], (SIDE - 1, SIDE), *sizes[3:], (4, 4)]
    spoiled = dataset(tmp_path / "spoiled", rows)
    seen: list[int] = []
    some = measure(dvae(), spoiled, WITHOUT_NETWORK, batch_samples=3, on_rows=seen.append)
    assert (some.pictures, some.unusable, sum(seen)) == (8, 2, 10)
    assert some.figures["psnr"] == pytest.approx(good.figures["psnr"], rel=1e-6)
    assert "2 pictures were too small" in notes(some)[0]
    tiny = dataset(tmp_path / "tiny", [(SIDE - 1, SIDE - 1)] * 6)
    with pytest.raises(ValueError, match="must hold at least 4 pictures of 32 pixels"):
        judge(dvae(), tiny, WITHOUT_NETWORK)


@pytest.mark.parametrize("make", [dvae, vqvae])
def test_figures_do_not_depend_on_the_batch(
    make: Callable[[], StageOne], manifest: Manifest
) -> None:
    alone, batched = (judge(make(), manifest, WITHOUT_NETWORK, size) for size in (1, 17))
    assert alone.figures == pytest.approx(batched.figures, rel=1e-4)
    assert alone.standard_errors == pytest.approx(batched.standard_errors, rel=1e-3)
    for group, shown in alone.shown.items():
        assert [s.original.key for s in shown] == [s.original.key for s in batched.shown[group]]


def test_the_dvaes_bound_is_that_of_codes_drawn_from_its_encoder() -> None:
    model = dvae()
    pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        (_, kl), tokens, made = bound_and_picture(model, pixels, [1])
        logits = model.logits(pixels.float() / 255)
        p = logits.double().softmax(dim=1)
        expected = (p * (p * 64).log()).sum() / (3 * SIDE * SIDE)
        assert float(kl) == pytest.approx(float(expected), rel=1e-4)
        assert torch.equal(tokens, logits.argmax(dim=1))
        shown = model.decode(tokens).mul(255).round().to(torch.uint8)
        assert torch.equal(made, shown)
        drawn = {float(bound_and_picture(model, pixels, [seed])[0][0]) for seed in range(4)}
    assert len(drawn) == 4  # another seed, other codes


def test_codes_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).view(1, 4, 1, 1).expand(1, 4, 100, 100)
    drawn = draw_codes(logits, seed=0)
    shares = drawn.flatten().bincount(minlength=4) / drawn.numel()
    likely = logits[0, :, 0, 0].softmax(dim=0)
    # 0.03 is six standard deviations of a share of 10,000 draws, or more
    torch.testing.assert_close(shares, likely, atol=0.03, rtol=0)
    assert torch.equal(drawn, draw_codes(logits, seed=0))


def test_the_bounds_first_part_is_the_likelihood_of_what_the_drawn_codes_decode_to() -> None:
    model = dvae()
    with torch.no_grad():  # certain of its codes: there is one draw
        model.encoder.blocks.output.conv.w.mul_(1e6)
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.inference_mode():
        (found, _), tokens, _ = bound_and_picture(model, pixels, [0, 1])
        mu, ln_b = model.stats(tokens).double().chunk(2, dim=1)
        x = 0.8 * pixels.double() / 255 + 0.1
        logit = (x / (1 - x)).log()
        density = (-(logit - mu).abs() / ln_b.exp()).exp() / (2 * ln_b.exp() * x * (1 - x))
    expected = density.log().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_vqvaes_codes_cost_ln_k_each(manifest: Manifest) -> None:
    judgement = judge(vqvae(), manifest, WITHOUT_NETWORK)
    figures = judgement.figures
    assert figures["kl"] == pytest.approx(16 * math.log(64) / (3 * SIDE * SIDE))
    assert judgement.standard_errors["kl"] == pytest.approx(0, abs=1e-9)
    assert figures["hard_elb"] == pytest.approx(figures["reconstruction"] - figures["kl"])
    assert figures["hard_elb_training_beta"] == pytest.approx(
        figures["reconstruction"] - 6.6 * figures["kl"]
    )


def test_the_codebooks_use_is_counted_over_all_positions(manifest: Manifest) -> None:
    judgement = judge(dvae(), manifest, WITHOUT_NETWORK)
    counts = np.array(judgement.code_counts)
    assert counts.sum() == ROWS * (SIDE // 8) ** 2
    p = counts[counts > 0] / counts.sum()
    assert judgement.figures["codes_used"] == len(p)
    assert judgement.figures["share_of_codes_used"] == len(p) / 64
    assert judgement.figures["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_the_worst_and_the_best_are_the_ends_of_all_pictures(manifest: Manifest) -> None:
    everything = judge(dvae(), manifest, replace(WITHOUT_NETWORK, shown=1000))
    few = judge(dvae(), manifest, WITHOUT_NETWORK)
    order = sorted(everything.shown["worst"], key=lambda shown: shown.psnr)
    assert len(order) == ROWS
    assert [s.psnr for s in few.shown["worst"]] == [s.psnr for s in order[:5]]
    assert [s.psnr for s in few.shown["best"]] == [s.psnr for s in order[::-1][:5]]
    mean = np.mean([shown.psnr for shown in order])
    assert few.figures["psnr"] == pytest.approx(mean)
    spread = np.std([shown.psnr for shown in order], ddof=1) / math.sqrt(ROWS)
    assert few.standard_errors["psnr"] == pytest.approx(spread)
    another = judge(dvae(), manifest, replace(WITHOUT_NETWORK, seed=1))
    keys = [{s.original.key for s in j.shown["random"]} for j in (few, another)]
    assert len(keys[0]) == len(keys[1]) == 5
    assert keys[0] != keys[1]


def test_every_figure_is_explained_and_a_distance_of_few_pictures_comes_with_a_warning(
    manifest: Manifest,
) -> None:
    judgement = judge(dvae(), manifest, WITHOUT_NETWORK)
    assert notes(judgement) == []
    sets = PairedSets(2)
    sets.add(torch.randn(4, 2), torch.randn(4, 2))
    with_distances = replace(judgement, figures=judgement.figures | sets.distances())
    assert {row.key for row in EXPLAINED} == with_distances.figures.keys()
    assert "40 pictures are few for FD-EffNetLite0" in notes(with_distances)[0]
    assert notes(replace(with_distances, pictures=2561)) == []


def test_a_model_that_gives_no_number_is_refused_with_the_picture(manifest: Manifest) -> None:
    model = vqvae()
    with torch.no_grad():
        model.decoder.blocks.output.conv.b.fill_(torch.nan)
    with pytest.raises(ValueError, match="must give finite figures, but those of picture"):
        judge(model, manifest, WITHOUT_NETWORK)


def test_settings_that_measure_nothing_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="most_pictures must be at least 4, got 3"):
        ReconstructionConfig(most_pictures=3)
    with pytest.raises(ValueError, match="shown must be at least 1, got 0"):
        ReconstructionConfig(shown=0)
    with pytest.raises(ValueError, match="training_beta must be at least 0, got nan"):
        ReconstructionConfig(training_beta=math.nan)
    with pytest.raises(ValueError, match="at least 4 pictures, got 1"):
        judge(dvae(), dataset(tmp_path / "one", [(64, 64)]), WITHOUT_NETWORK)
    with pytest.raises(ValueError, match="at least 11 pixels a side"):
        WITHOUT_NETWORK.check(manifest, DVAEConfig(**SIZES | {"image_size": 8}))

"""`jobs.sample` end to end on saved models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import sample
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.reranking import load_reranker
from pipelines.training.weights import load_prior, save_model
from tests.fixtures.models import TINY, TinyModels, random_prior, tiny_clip, tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


def line(models: TinyModels, output: Path, *more: str) -> list[str]:
    return [
        *("tiny", "--output", str(output), "--tokenizer", str(models.tokenizer)),
        *("--dvae", str(models.dvae), "--prior", str(models.prior), "--device", "cpu"),
        *("--pictures-per-prompt", "2", *more),
    ]


def snapshot(directory: Path) -> dict[str, bytes]:
    """Everything but what tells of times."""
    files = [file for file in directory.iterdir() if file.name[0] != "."]
    return {file.name: file.read_bytes() for file in files}


def summary_of(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    summary: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return summary


def test_every_prompt_gets_its_pictures_a_grid_and_a_record(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    prompts = ("--prompts", "Red apple!", "dog / cat", "--seed", "5")
    assert sample.main(line(models, output, *prompts)) == 0
    assert summary_of(capsys)["pictures"] == 4
    record = json.loads((output / "samples.json").read_text())
    assert [entry["prompt"] for entry in record] == ["Red apple!", "dog / cat"]
    assert record[0]["pictures"][1]["file"] == "prompt-00-red-apple-seed-6.png"
    sampler = models.sampler()
    for entry in record:
        for picture in entry["pictures"]:
            pixels = np.asarray(Image.open(output / picture["file"]))
            wanted = sampler.generate(entry["prompt"], seed=picture["seed"])[0]
            assert np.array_equal(pixels, wanted)
            assert len(picture["tokens"]) == 64
    assert Image.open(output / "samples.png").width > 2 * 96


def test_a_second_run_changes_nothing_and_says_so(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert sample.main(line(models, output, "--prompts", "dog")) == 0
    before = snapshot(output)
    capsys.readouterr()
    assert sample.main(line(models, output, "--prompts", "dog")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(output) == before
    assert sample.main(line(models, output, "--prompts", "cat")) == 2
    assert "other settings" in capsys.readouterr().err
    assert snapshot(output) == before


def test_prompts_can_come_from_a_file(models: TinyModels, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n\n  dog \n苹果\n", encoding="utf-8")
    assert sample.main(line(models, tmp_path / "out", "--prompt-file", str(file))) == 0
    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert [entry["prompt"] for entry in record] == ["red apple", "dog", "苹果"]
    assert (tmp_path / "out/prompt-02-seed-0.png").exists()


def test_how_many_are_sampled_at_once_does_not_change_the_pictures(
    models: TinyModels, tmp_path: Path
) -> None:
    for name, together in (("one", "1"), ("many", "32")):
        arguments = ("--prompts", "dog", "cat", "moon", "--max-candidates", together)
        assert sample.main(line(models, tmp_path / name, *arguments)) == 0
    one, many = (snapshot(tmp_path / name) for name in ("one", "many"))
    assert one["samples.json"] == many["samples.json"]


def primed_with(picture: Path, rows: int) -> list[str]:
    return ["--prompts", "dog", "--prime-image", str(picture), "--prime-rows", str(rows)]


def test_a_picture_s_upper_rows_are_completed(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    picture, output = tmp_path / "picture.png", tmp_path / "out"
    Image.fromarray(noise).save(picture)
    assert sample.main(line(models, output, *primed_with(picture, 3))) == 0
    (entry,) = json.loads((output / "samples.json").read_text())
    wanted = models.sampler().first_rows(noise, 3).tolist()
    tokens = [made["tokens"] for made in entry["pictures"]]
    assert [made[:24] for made in tokens] == [wanted, wanted]
    assert tokens[0] != tokens[1]
    # Another picture under the same name is another input.
    Image.fromarray(255 - noise).save(picture)
    assert sample.main(line(models, output, *primed_with(picture, 3))) == 2
    assert "prime_image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "rows", "message"),
    [(64, 9, "1 to the grid's 8, got 9"), (48, 3, "must be 64×64 pixels")],
)
def test_a_picture_or_rows_that_do_not_fit_are_refused(
    models: TinyModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: int,
    rows: int,
    message: str,
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (side, side)).save(picture)
    assert sample.main(line(models, tmp_path / "out", *primed_with(picture, rows))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_captions_are_completed_if_asked_for(models: TinyModels, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--prompts", "dog", "--complete-captions")
    assert sample.main(line(models, output, *arguments)) == 0
    (entry,) = json.loads((output / "samples.json").read_text())
    assert entry["prompt"] == "dog"
    captions = [made["caption"] for made in entry["pictures"]]
    assert all(caption.startswith("dog") and caption != "dog" for caption in captions)


def test_a_long_prompt_is_cut_with_a_notice_if_asked_for(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, words = tmp_path / "out", "q " * 40
    arguments = ("--prompts", words, "dog", "--long-prompts", "cut")
    assert sample.main(line(models, output, *arguments)) == 0
    notices = [row for row in capsys.readouterr().out.splitlines() if row.startswith("notice")]
    assert len(notices) == 1
    assert "the first 15 count" in notices[0]
    assert len(json.loads((output / "samples.json").read_text())) == 2


def test_settings_reach_the_sampler_and_guidance_without_its_training_is_said(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    flags = ("--sampling.cond-scale", "2", "--sampling.top-p", "0.8", "--sampling.top-k", "9")
    assert sample.main(line(models, output, "--prompts", "dog", *flags)) == 0
    assert "trained with caption_dropout 0" in capsys.readouterr().out
    (entry,) = json.loads((output / "samples.json").read_text())
    config = SamplingConfig(cond_scale=2, top_p=0.8, top_k=9)
    (wanted,) = models.sampler().sample(["dog"], n=2, seed=0, sampling=config)
    assert [made["tokens"] for made in entry["pictures"]] == [
        picture.tokens.tolist() for picture in wanted
    ]


def test_guidance_of_a_prior_that_was_trained_for_it_needs_no_notice(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior, metadata = load_prior(models.prior)
    file = tmp_path / "prior.safetensors"
    metadata = metadata | {"training": {"caption_dropout": 0.1}}
    save_model(file, kind="prior", config=TINY, state=prior.state_dict(), metadata=metadata)
    trained, output = dataclasses.replace(models, prior=file), tmp_path / "out"
    guided = ("--prompts", "dog", "--sampling.cond-scale", "2")
    assert sample.main(line(trained, output, *guided)) == 0
    assert "notice" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", " "], "prompt must not be blank"),
        (["--prompts", "q " * 40], "at most 15 tokens"),
        (["--prompts"], "there must be a prompt"),
        (["--prompt-file", "/nowhere/prompts.txt"], "No such file"),
        (["--prompts", "dog", "--sampling.top-k", "129"], "top_k must be 1 to 128, got 129"),
        (["--prompts", "dog", "--sampling.temperature", "0"], "temperature must be positive"),
        (["--prompts", "dog", "--sampling.temperature", "nan"], "temperature must be positive"),
        (["--prompts", "dog", "--sampling.top-k", "0"], "top_k must be 1"),
        (["--prompts", "dog", "--sampling.top-p", "0"], "top_p must be in (0, 1]"),
        (["--prompts", "dog", "--sampling.top-p", "1.5"], "top_p must be in (0, 1]"),
        (["--prompts", "dog", "--sampling.cond-scale", "-1"], "cond_scale must be 0 or more"),
        (["--prompts", "dog", "--sampling.cond-scale", "nan"], "cond_scale must be 0 or more"),
        (["--prompts", "dog", "--prime-rows", "2"], "prime_rows must be"),
        (["--prompts", "dog", "--prime-image", "x.png"], "prime_rows must be"),
        (["--prompts", "dog", "--prime-image", "/nowhere/x.png", "--prime-rows", "1"], "No such"),
        (["--prompts", "dog", "--prime-image", __file__, "--prime-rows", "1"], "must be a picture"),
        (["--prompts", "dog", "--seed", "-1"], "seed must be 0"),
        (["--prompts", "dog", "--prior", "/nowhere/prior.safetensors"], "there is none"),
    ],
)
def test_what_cannot_be_sampled_is_refused_and_nothing_is_written(
    models: TinyModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert sample.main(line(models, tmp_path / "out", *arguments)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prior_of_another_tokenizer_or_dvae_is_refused_with_both_digests(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {
        "tokenizer_sha256": models.sampler().tokenizer.digest,
        "dvae_sha256": "d" * 64,
    }
    file = tmp_path / "prior.safetensors"
    save_model(file, kind="prior", config=TINY, state=random_prior(TINY).state_dict(), metadata=own)
    foreign = dataclasses.replace(models, prior=file)
    assert sample.main(line(foreign, tmp_path / "out", "--prompts", "dog")) == 2
    said = capsys.readouterr().err
    assert "trained with dvae " + "d" * 64 in said
    assert str(models.dvae) in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample.main(line(models, tmp_path / "out", "--prompts", "dog", "--dry-run")) == 0
    assert "sample 2 pictures for 1 prompts" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_best_of_a_pool_are_written_with_their_scores(
    models: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tiny_clip(tmp_path / "clip.safetensors", models.tokenizer)
    pool = ["--prompts", "dog", "cat", "--rerank-pool", "6", "--clip", str(clip)]
    assert sample.main(line(models, tmp_path / "best", *pool)) == 0
    assert summary_of(capsys)["pictures"] == 4
    reranker = load_reranker(clip, models.tokenizer, torch.device("cpu"))
    for entry in json.loads((tmp_path / "best/samples.json").read_text()):
        candidates = np.stack(models.sampler().generate(entry["prompt"], n=6))
        scores = reranker.scores(entry["prompt"], candidates)
        wanted = sorted(range(6), key=lambda seed: -scores[seed])[:2]
        assert [made["seed"] for made in entry["pictures"]] == wanted
        assert [made["score"] for made in entry["pictures"]] == pytest.approx(scores[wanted])
        best = np.asarray(Image.open(tmp_path / "best" / entry["pictures"][0]["file"]))
        assert np.array_equal(best, candidates[wanted[0]])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rerank-pool", "4"], "rerank_pool must be 1 or more with a clip"),
        (["--clip", "x.safetensors"], "rerank_pool must be 1 or more with a clip"),
        (["--rerank-pool", "1", "--clip", "x"], "at least the 2 pictures that are kept"),
        (["--rerank-pool", "4", "--clip", "none.safetensors"], "there is none"),
    ],
)
def test_a_pool_that_cannot_be_ranked_is_refused(
    models: TinyModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert sample.main(line(models, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()

"""The playground as a user has it: clicked in a real browser, its pictures looked at."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sampling.access import AccessSettings
from pipelines.sampling.engine import Sampler
from pipelines.sampling.keys import add_key
from pipelines.sampling.model_card import model_card
from pipelines.training.weights import read_header
from tests.fixtures.browser import Seen, look_at
from tests.fixtures.http_server import app_of, before_steps, serving
from tests.fixtures.models import TinyModels, tiny_models

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
STEP_SECONDS = 0.01
# Resolves when an expression holds; the browser's own patience ends it.
UNTIL = """new Promise(done => {{ const look = () =>
  ({0}) ? done(true) : setTimeout(look, 20); look(); }})"""
IDLE = UNTIL.format("!document.getElementById('draw').disabled")
CANVAS = """(async () => {{ const image = document.images[{0}]; await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), {{width: 64, height: 64}});
  const pen = canvas.getContext('2d'); pen.drawImage(image, 0, 0);
  return [...pen.getImageData(0, 0, 64, 64).data]; }})()"""


class Brightness:
    """A reranker whose order can be checked."""

    def scores(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        return pictures.mean((1, 2, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return tiny_models(tmp_path_factory.mktemp("models"), rows=8)


@pytest.fixture(scope="module")
def sampler(models: TinyModels) -> Sampler:
    return models.sampler()


@pytest.fixture(autouse=True)
def steadily(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a moment, so that a picture can be seen while it is drawn."""
    before_steps(monkeypatch, lambda batch: time.sleep(STEP_SECONDS))


@pytest.fixture(scope="module")
def url(models: TinyModels, sampler: Sampler) -> Iterator[str]:
    about = model_card(read_header(models.prior, "prior"), "0123abcd") | {"Corpus": EVIL}
    with serving(app_of(sampler, reranker=Brightness(), about=about)) as url:
        yield url


def fill(name: str, value: str) -> str:
    """As typing does it."""
    return (
        f"(() => {{ const field = document.getElementById({json.dumps(name)}); "
        f"field.value = {json.dumps(value)}; "
        "field.dispatchEvent(new Event('input', {bubbles: true})); "
        "field.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def pixels(data: list[int]) -> np.ndarray:
    return np.array(data, np.uint8).reshape(64, 64, 4)[..., :3]


def keep(seen: Seen, folder: Path, name: str) -> None:
    """For people to look at: pytest leaves the folder."""
    (folder / f"{name}.png").write_bytes(seen.screenshot)


def test_a_click_draws_row_by_row_and_shows_the_very_pixels(
    url: str, sampler: Sampler, tmp_path: Path
) -> None:
    seen = look_at(
        f"{url}/",
        [
            UNTIL.format("document.getElementById('model').textContent.includes('64×64')"),
            fill("prompt", "red apple"),
            fill("seed", "5"),
            fill("n", "2"),
            "document.getElementById('draw').click()",
            UNTIL.format("document.images.length === 2"),
            "document.querySelector('.below').textContent",
            "document.images[1].style.clipPath",
            CANVAS.format(0),
            "document.getElementById('draw').disabled",
            IDLE,
            CANVAS.format(0),
            CANVAS.format(1),
            "document.getElementById('pictures').innerText",
            "document.getElementById('status').textContent",
        ],
    )
    keep(seen, tmp_path, "drawn")
    said, clip, early, busy = (seen.values[index] for index in (6, 7, 8, 9))
    assert said == "1 of 8 rows"
    assert clip == "inset(0px 0px 87.5%)"
    assert busy
    first, second, words, status = seen.values[11:]
    (wanted,) = sampler.sample(["red apple"], n=2, seed=5)
    assert np.array_equal(pixels(first), wanted[0].pixels)
    assert np.array_equal(pixels(second), wanted[1].pixels)
    assert not np.array_equal(pixels(early), pixels(first))
    assert "seed 5" in words
    assert status.startswith("Drawn in ")
    assert all(address.startswith(url) for address in seen.requests)
    assert seen.complaints == []


def test_the_best_of_a_pool_come_first_with_their_scores(url: str, sampler: Sampler) -> None:
    seen = look_at(
        f"{url}/",
        [
            UNTIL.format("!document.getElementById('pool-field').hidden"),
            fill("prompt", "dog"),
            fill("seed", "0"),
            fill("n", "3"),
            fill("pool", "16"),
            "document.getElementById('draw').click()",
            IDLE,
            CANVAS.format(0),
            "[...document.querySelectorAll('li .below')].map(row => row.textContent)",
            "[...document.getElementById('pool').options].map(option => option.value)",
        ],
    )
    best, rows, pools = seen.values[7:]
    (samples,) = sampler.sample(["dog"], n=16, seed=0)
    samples.sort(key=lambda sample: -float(sample.pixels.mean()))
    assert np.array_equal(pixels(best), samples[0].pixels)
    for rank, (row, sample) in enumerate(zip(rows, samples[:3], strict=True), start=1):
        assert row.startswith(f"#{rank}{sample.pixels.mean():.3f}seed {sample.seed}")
    assert pools == ["0", "8", "16"]
    assert seen.complaints == []


@pytest.mark.parametrize(
    ("width", "dark"), [(1200, False), (1200, True), (390, False)], ids=["light", "dark", "phone"]
)
def test_the_page_fits_and_says_what_strangers_wrote_as_text(
    url: str, tmp_path: Path, width: int, dark: bool
) -> None:
    seen = look_at(
        f"{url}/",
        [
            UNTIL.format("document.getElementById('about').children.length"),
            fill("prompt", EVIL),
            "document.getElementById('card').open = document.getElementById('code').open = true",
            "document.getElementById('about').innerText",
            "document.getElementById('snippet').textContent",
            OVERFLOW,
            "document.querySelectorAll('script').length",
            "document.title",
            "getComputedStyle(document.body).backgroundColor",
            # Everything that can be used has a name.
            "[...document.querySelectorAll('input, textarea, select')]"
            ".filter(field => !field.hidden && !field.labels.length).length",
            # And is large enough for a thumb.
            "Math.min(...[...document.querySelectorAll('form button, form select, textarea')]"
            ".filter(e => e.offsetParent).map(e => e.getBoundingClientRect().height))",
        ],
        width=width,
        dark=dark,
    )
    keep(seen, tmp_path, f"{width}-{dark}")
    about, snippet, overflow, scripts, title, ground, nameless, smallest = seen.values[3:]
    assert EVIL in about
    assert "0123abcd" in about
    assert "3 layers" in about
    assert "onerror" in snippet
    assert overflow <= 0
    assert (scripts, title, nameless) == (1, "manray playground", 0)
    assert (ground == "rgb(18, 22, 31)") == dark
    assert smallest >= 40
    assert seen.complaints == []
    colours = Image.open(io.BytesIO(seen.screenshot)).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 50


def test_errors_are_shown_in_words_and_enter_draws(url: str) -> None:
    enter = (
        "document.getElementById('prompt').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true}))"
    )
    error = "document.getElementById('error').innerText"
    seen = look_at(
        f"{url}/",
        [
            enter,
            error,
            "document.activeElement.id",
            fill("prompt", "q " * 40),
            enter,
            IDLE,
            error,
            fill("prompt", "dog"),
            fill("seed", "-1"),
            enter,
            error,
            fill("seed", "3"),
            fill("n", "1"),
            enter,
            UNTIL.format("document.images.length"),
            "document.getElementById('stop').click()",
            IDLE,
            "document.getElementById('status').textContent",
            error,
        ],
    )
    assert seen.values[1:3] == ["Say in a few words what shall be drawn.", "prompt"]
    assert "at most 15 tokens" in seen.values[6]
    assert "whole number" in seen.values[10]
    assert seen.values[-2:] == ["Stopped.", ""]


def test_a_key_is_asked_for_where_there_are_keys_and_never_copied(
    sampler: Sampler, tmp_path: Path
) -> None:
    key = add_key(tmp_path / "keys", "ann")
    access = AccessSettings(keys=tmp_path / "keys")
    error = "document.getElementById('error').innerText"
    with serving(app_of(sampler, access=access)) as url:
        seen = look_at(
            f"{url}/",
            [
                UNTIL.format("!document.getElementById('key-field').hidden"),
                error,
                fill("key", "wrong"),
                UNTIL.format(f"{error}.includes('not valid')"),
                fill("key", key),
                UNTIL.format("document.getElementById('model').textContent.includes('64×64')"),
                fill("prompt", "dog"),
                fill("n", "1"),
                "document.getElementById('draw').click()",
                UNTIL.format("document.images.length"),
                IDLE,
                "document.querySelectorAll('li img').length",
                "document.getElementById('snippet').textContent",
                "document.querySelector('[data-copy=python]').click()",
                "document.getElementById('snippet').textContent",
            ],
        )
    assert seen.values[1] == "This server asks for a key."
    assert seen.values[11] == 1
    curl, python = seen.values[12], seen.values[14]
    assert "Bearer $MANRAY_KEY" in curl
    assert 'os.environ["MANRAY_KEY"]' in python
    assert key not in curl + python


def test_the_copied_python_runs(url: str, tmp_path: Path, sampler: Sampler) -> None:
    prompt = '"é" \\n \''
    seen = look_at(
        f"{url}/",
        [
            fill("prompt", prompt),
            fill("seed", "8"),
            fill("n", "1"),
            "document.querySelector('[data-copy=python]').click()",
            "document.getElementById('snippet').textContent",
            "document.querySelector('[data-copy=curl]').click()",
            "document.getElementById('snippet').textContent",
        ],
    )
    python, curl = seen.values[4], seen.values[6]
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=True, timeout=60)
    wanted = sampler.sample([prompt], n=1, seed=8)[0][0].pixels
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0.png")), wanted)
    done = subprocess.run(["sh", "-c", curl], capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["data"][0]["seed"] == 8

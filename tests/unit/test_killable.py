"""A picture that aborts the decoder's process, or stops it, costs one row."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.corpus.web import CorpusWeb
from pipelines.data import killable
from pipelines.data.download import DownloadConfig
from pipelines.data.fetch import FetchConfig
from pipelines.data.resize import ResizeConfig, Resized, resize_picture
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location
from pipelines.data.travelling import pack
from pipelines.data.urls import read_url_list

ROOT = Path(__file__).parents[2]
CONFIG = ResizeConfig(short_side=64, encoding="png")
DOWNLOAD = DownloadConfig(
    rows_per_shard=100, fetch=FetchConfig(allow_loopback=True, timeout_s=60), resize=CONFIG
)
ABORTS, STOPS, FAILS = b"abort!", b"stop!", b"fail!"


def deadly(data: bytes, config: ResizeConfig) -> Resized:
    """`resize_picture` with a C library that has a fault."""
    if data.endswith(ABORTS):
        os.abort()
    if data.endswith(STOPS):
        threading.Event().wait()
    if data.endswith(FAILS):
        raise ZeroDivisionError
    return resize_picture(data, config)


@pytest.fixture
def pictures() -> list[bytes]:
    with CorpusWeb(0, 6) as web:
        return [row["image"] for row in web.rows]


def test_a_child_gives_the_same_pictures_and_survives_those_that_kill_it(
    pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with killable.resizer(CONFIG, careful=False) as resize:
        expected = [resize(data) for data in pictures]
    monkeypatch.setattr(killable, "resize_picture", deadly)
    hostile = [*pictures[:3], b"x" + ABORTS, b"x" + STOPS, *pictures[3:], b"not a picture"]
    with killable.resizer(CONFIG, careful=True, most_s=2.0) as resize:
        found = [resize(data) for data in hostile]
    assert [each for each in found if each.image] == expected
    assert [(each.reason, each.detail) for each in found if not each.image] == [
        ("decoder_crash", "SIGABRT"),
        ("decoder_timeout", "after 2 s"),
        ("not_a_picture", found[-1].detail),
    ]


IDLE = """
import sys, threading
from pipelines.data import killable
from tests.unit import test_killable
killable.resize_picture = test_killable.deadly
with killable.resizer(test_killable.CONFIG, careful=False, most_s=0.5) as resize:
    for pause in (0.02, 0.06, 1.0, 0.02):
        assert resize(b"no picture").reason
        threading.Event().wait(pause)
    print("idle", flush=True)
    resize(b"x" + test_killable.STOPS)
"""


def test_a_worker_that_waits_for_the_network_is_not_ended_and_one_that_hangs_is() -> None:
    line = [sys.executable, "-c", IDLE]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "idle\n")
    assert "Timeout" in done.stderr


def test_a_fault_of_ours_is_no_picture_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killable, "resize_picture", deadly)
    with (
        killable.resizer(CONFIG, careful=True) as resize,
        pytest.raises(RuntimeError, match="decoder's process failed"),
    ):
        resize(b"x" + FAILS)


def test_an_attempt_is_careful_after_one_that_never_ended(tmp_path: Path) -> None:
    place = Location(tmp_path / "out")
    with killable.attempt(place, "00000") as careful:
        assert not careful
    with pytest.raises(ValueError), killable.attempt(place, "00000"):
        raise ValueError
    (place / "begun/00000.dead").put(b"")
    with killable.attempt(place, "00001") as careful:
        assert not careful
    with killable.attempt(place, "00000") as careful:
        assert careful
    assert not (place / "begun").list()


WORKER = """
import pickle, sys
from pipelines.data import download, killable
from tests.unit import test_killable
killable.resize_picture = test_killable.deadly
killable.resizer.__wrapped__.__kwdefaults__["most_s"] = 2.0
item, writer = pickle.loads(sys.stdin.buffer.read())
download.commit_download(item, writer=writer, config=test_killable.DOWNLOAD)
"""


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [(ABORTS, -signal.SIGABRT, "decoder_crash"), (STOPS, 1, "decoder_timeout")],
)
def test_a_shard_with_a_killer_is_made_by_its_second_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes, code: int, reason: str
) -> None:
    with CorpusWeb(0, 6) as web:
        pages = web._server.RequestHandlerClass.args[0]  # type: ignore[attr-defined]
        killer = f"/emoji/{web.rows[2]['key']}.webp"
        kind, body = pages[killer]
        pages[killer] = (kind, body + ending)
        urls = read_url_list(web.url_list(tmp_path / "urls.parquet"), rows_per_shard=100)
        writer = DatasetWriter(
            path=tmp_path / "raw",
            stage="download_pairs",
            config={},
            inputs={},
            sources={},
            shards=["00000"],
        )
        writer.claim()
        item = {"shard": "00000", "rows": pack(urls.shard("00000"))}
        codes = [
            subprocess.run(
                [sys.executable, "-c", WORKER],
                input=pickle.dumps((item, writer)),
                cwd=ROOT,
                stderr=subprocess.DEVNULL,
            ).returncode
            for _ in range(2)
        ]
    assert codes == [code, 0]
    writer.seal()
    manifest = Manifest.load(tmp_path / "raw")
    usual = ("http_404", "broken_picture", "not_a_picture", "duplicate_pair", "forbidden_scheme")
    assert manifest.dropped == dict.fromkeys((*usual, reason), 1)
    assert manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())
    assert not list((tmp_path / "raw/begun").iterdir())

"""What a driver shows of a training that runs elsewhere."""

from pathlib import Path

import pytest

from jobs.progress import FollowMetrics
from pipelines.training.tracking import METRICS_FILE, Tracker


def follow(directory: Path) -> FollowMetrics:
    return FollowMetrics(directory / METRICS_FILE, "train", 4, ("loss",))


def test_notices_are_said_once_and_the_latest_metrics_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, "")
    with follow(tmp_path):
        tracker.log_metrics({"loss": 2.0}, 1)
        tracker.notice("mind the gap", 1)
        tracker.log_metrics({"loss": 1.5}, 2)
    out = capsys.readouterr().out
    assert out.count("train: mind the gap") == 1
    assert "train: 2/4 steps" in out
    assert "loss 1.500" in out


def test_a_resumed_training_does_not_repeat_what_was_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, "")
    tracker.notice("mind the gap", 1)
    tracker.log_metrics({"loss": 1.5}, 3)
    with follow(tmp_path):
        tracker.rewind(1)
        tracker.notice("resumed after step 1", 1)
        tracker.log_metrics({"loss": 1.0}, 4)
    out = capsys.readouterr().out
    assert "mind the gap" not in out
    assert out.count("train: resumed after step 1") == 1
    assert "train: 4/4 steps" in out

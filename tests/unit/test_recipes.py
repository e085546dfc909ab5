"""The pages of docs/recipes say what the plan says today."""

import re
import shlex

import pytest

from jobs.configs.train_prior import PRESETS
from jobs.runtime import parse
from tests.benchmarks.recipes import FOLDER, renewed


@pytest.mark.parametrize("preset", PRESETS)
def test_a_page_has_the_plan_s_figures(preset: str) -> None:
    page = (FOLDER / f"{preset}.md").read_text()
    assert renewed(page, preset) == page, "python -m tests.benchmarks.recipes renews it"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_page_s_commands_are_understood(preset: str) -> None:
    page = (FOLDER / f"{preset}.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python -m jobs\.train_prior (.*)$", page, flags=re.MULTILINE)
    assert lines
    for line in lines:
        job = parse("train_prior", PRESETS, shlex.split(line, comments=True))
        assert not isinstance(job, int), line


def test_every_page_is_a_preset_s_and_says_what_was_measured() -> None:
    pages = {page.stem: page.read_text() for page in FOLDER.glob("*.md")}
    assert pages.keys() == PRESETS.keys()
    for text in pages.values():
        assert "## What was measured" in text
        assert "## The curve to expect" in text

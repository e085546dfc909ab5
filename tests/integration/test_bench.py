"""`make bench`, with as little work as it takes."""

import json
import subprocess
import sys
from pathlib import Path

from tests.fixtures.peers import need_peer

ROOT = Path(__file__).parents[2]


def test_make_bench_writes_rows_that_a_program_can_read(tmp_path: Path) -> None:
    need_peer("dall_e")
    effort = ("--effort.rows", "50", "--effort.repeats", "2")
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.run", "--output", tmp_path, *effort],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [row for file in tmp_path.glob("*.json") for row in json.loads(file.read_text())]
    names = {"token-shard-read", "token-shard-bytes", "caption-bpe-dropout"}
    names |= {"token-shard-read-dictionary", "token-shard-bytes-dictionary"}
    names |= {"filter-captions", "filter-captions-cld3"}
    names |= {"encoder-fp32", "encoder-bf16", "jpeg-crop", "jpeg-crop-1024"}
    assert names == {row["row"] for row in rows}
    for row in rows:
        assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        assert row["ours"] > 0 < row["theirs"]
        assert row["versions"]
        assert row["row"] in done.stdout

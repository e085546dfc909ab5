"""The script for a GPU runs on a CPU too, at sizes that say nothing."""

from pathlib import Path

import torch

from tests.benchmarks.prior_gpu import Bench, measured
from tests.unit.test_prior_training import MODEL


def test_the_gpu_script_trains_records_and_draws(tmp_path: Path) -> None:
    bench = Bench(
        smaller=MODEL,
        smaller_updates=4,
        smaller_batch=2,
        larger=MODEL,
        larger_updates=3,
        larger_batch=2,
        recompute="selective",
        pictures=tmp_path,
        device="cpu",
    )
    rows = measured(bench, torch.device("cpu"))
    assert list(rows) == ["smaller-fp16", "smaller-bf16", "12b"]
    for name, row in rows.items():
        assert len(row["losses"]) == row["updates"] == (3 if name == "12b" else 4)
        assert row["images_per_second"] > 0
        assert {"weights (cpu)", "exp_avg (cpu)", "average (cpu)", "peak"} <= set(row["gib"])
    assert "lower_bits (cpu)" in rows["12b"]["gib"]
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {f"resblocks-{name}.png" for name in ("fp16", "bf16", "12b")}

"""A machine that is about to go away: one checkpoint at once."""

from pathlib import Path

import torch

from pipelines.training.prior_loop import train_prior
from pipelines.training.prior_training import Cadence
from pipelines.training.token_loader import TokenBatch
from tests.fixtures.tiny_training import MODEL, tiny_batch, tiny_training

STEPS = 12


class Batches:
    def batch(self, number: int) -> TokenBatch:
        return tiny_batch(number)


def test_a_notice_makes_one_checkpoint_and_the_training_goes_on(tmp_path: Path) -> None:
    asked: list[int] = []

    def is_machine_leaving() -> bool:
        asked.append(len(asked))
        return len(asked) == 2

    finished = train_prior(
        MODEL,
        tiny_training(steps=STEPS),
        cadence=Cadence(checkpoint_every=1000, ask_every=2),
        loader=Batches(),  # type: ignore[arg-type]
        device=torch.device("cpu"),
        checkpoints=tmp_path,
        on_log=lambda step, metrics: None,
        on_resume=lambda step, said: None,
        on_weights=lambda step, weights: None,
        is_machine_leaving=is_machine_leaving,
    )
    assert finished
    assert len(asked) == STEPS // 2
    names = sorted(path.name[:13] for path in tmp_path.iterdir())
    assert names == ["step-00000004", f"step-{STEPS:08d}"]

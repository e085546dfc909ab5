"""Does the prior learn as much from a token as somebody else's? Two models, the same batches.

    python -m tests.benchmarks.learning_curve --train TOKENS --held-out TOKENS --tokenizer FILE

writes `learning-curve.json` and `learning-curve.svg`: the image loss on held-out pictures after
every sixth of the run. Both models see the same tokens in the same order under the same optimizer
and schedule; their parameters differ by less than 3 %. `make peers` installs the other one.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from models.prior import Prior, PriorConfig
from pipelines.data.stage import Manifest
from pipelines.data.storage import replace_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.optimizer import StepSize, build_optimizer
from pipelines.training.prior_training import PriorOptimizerConfig
from pipelines.training.token_loader import TokenBatch, TokenLoader
from tests.benchmarks import peers
from tests.benchmarks.measure import versions
from tests.benchmarks.prior import LARGEST_DIFFERENCE

POINTS = 6
EVALUATED = 256  # held-out pictures
CLIP_NORM = 1.0
WIDTH, HEIGHT, MARGIN = 640, 360, 48


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Train both on the same batches, fp32."""

    train: Path
    held_out: Path
    tokenizer: Path
    output: Path = Path("runs/bench")
    steps: int = 480
    batch_samples: int = 16
    lr: float = 1e-3
    warmup_steps: int = 40
    n_layers: int = 8
    n_heads: int = 4
    d_model: int = 192
    text_len: int = 32


@dataclass(frozen=True)
class Student:
    """A model, its training loss, and its mean image loss of a batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[TokenBatch], Tensor]
    image_loss: Callable[[TokenBatch], Tensor]

    def update(self, batch: TokenBatch, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main(argv: Sequence[str] | None = None) -> int:
    settings = tyro.cli(LearningCurve, args=argv, prog="python -m tests.benchmarks.learning_curve")
    tokenizer = CaptionTokenizer.from_file(settings.tokenizer)
    lessons, exam = (
        _loader(path, tokenizer, settings) for path in (settings.train, settings.held_out)
    )
    config = _config(settings, tokenizer, lessons, exam)
    students = {"manray": manray(config), "dalle-pytorch 1.6.6": dalle_pytorch(config)}
    sizes = {
        name: sum(p.numel() for p in student.model.parameters() if p.requires_grad)
        for name, student in students.items()
    }
    ours, theirs = sizes.values()
    assert abs(ours / theirs - 1) <= LARGEST_DIFFERENCE, sizes
    curves: dict[str, list[float]] = {name: [] for name in students}
    schedule = PriorOptimizerConfig(
        peak_lr=settings.lr, warmup_steps=settings.warmup_steps, decay="cosine"
    )
    step_size = StepSize(schedule, settings.steps)
    marks = [settings.steps * point // POINTS for point in range(1, POINTS + 1)]
    for step in range(settings.steps):
        batch, lr = lessons.batch(step), step_size.at(step)
        for student in students.values():
            student.update(batch, lr)
        if step + 1 in marks:
            for name, student in students.items():
                curves[name].append(_image_loss(student, exam, settings.batch_samples))
            losses = ", ".join(f"{name} {curve[-1]:.4f}" for name, curve in curves.items())
            print(f"update {step + 1:5} of {settings.steps}: image loss {losses}", flush=True)
    made = {
        "settings": {
            key: value for key, value in asdict(settings).items() if isinstance(value, (int, float))
        },
        "parameters": sizes,
        "precision": "fp32",
        "train_digest": Manifest.load(settings.train).digest,
        "updates": marks,
        "image_tokens": [mark * settings.batch_samples * config.image_len for mark in marks],
        "held_out_image_loss": curves,
        "versions": versions(("torch", "dalle-pytorch")),
    }
    replace_file(settings.output / "learning-curve.json", json.dumps(made, indent=1).encode())
    replace_file(settings.output / "learning-curve.svg", drawing(marks, curves).encode())
    return 0


def manray(config: PriorConfig) -> Student:
    prior = Prior(config)
    prior.init_weights(0)
    return Student(
        prior,
        build_optimizer(prior, PriorOptimizerConfig(moments="fp32")),
        lambda batch: prior(batch.text_tokens, batch.image_tokens).total,
        lambda batch: prior(batch.text_tokens, batch.image_tokens).image,
    )


def dalle_pytorch(config: PriorConfig) -> Student:
    torch.manual_seed(0)
    model = peers.dalle_pytorch(config)

    def image_loss(batch: TokenBatch) -> Tensor:
        # It scores one vocabulary, of text and then image tokens, and hides the text from pictures.
        logits = model(batch.text_tokens, batch.image_tokens)
        logits = logits[:, config.text_len :, -config.image_vocab_size :]
        return F.cross_entropy(logits.flatten(0, 1), batch.image_tokens.flatten())

    return Student(
        model,
        build_optimizer(model, PriorOptimizerConfig(moments="fp32")),
        lambda batch: model(batch.text_tokens, batch.image_tokens, return_loss=True),
        image_loss,
    )


def drawing(marks: Sequence[int], curves: dict[str, list[float]]) -> str:
    """The curves as SVG."""
    low = min(map(min, curves.values()))
    high = max(map(max, curves.values()))

    def place(mark: int, loss: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * mark / marks[-1]
        y = MARGIN + (HEIGHT - 2 * MARGIN) * (high - loss) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="24">nats an image token, held-out pictures, by updates</text>',
    ]
    for row, ((name, curve), colour) in enumerate(
        zip(curves.items(), ("#0057b7", "#d1495b"), strict=True)
    ):
        points = " ".join(place(mark, loss) for mark, loss in zip(marks, curve, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        label = f"{name}: {curve[0]:.3f} to {curve[-1]:.3f}"
        parts.append(f'<text x="{WIDTH // 2}" y="{60 + 20 * row}" fill="{colour}">{label}</text>')
    for mark in (marks[0], marks[-1]):
        x = place(mark, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 16}" text-anchor="middle">{mark}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _loader(path: Path, tokenizer: CaptionTokenizer, settings: LearningCurve) -> TokenLoader:
    return TokenLoader(
        Manifest.load(path, stage="encode_pairs"),
        tokenizer,
        text_len=settings.text_len,
        batch_samples=settings.batch_samples,
        bpe_dropout=0.0,
        seed=0,
    )


def _config(
    settings: LearningCurve, tokenizer: CaptionTokenizer, *loaders: TokenLoader
) -> PriorConfig:
    length = loaders[0].image_tokens.shape[1]
    return PriorConfig(
        n_layers=settings.n_layers,
        n_heads=settings.n_heads,
        d_model=settings.d_model,
        text_len=settings.text_len,
        # The peer takes text_len of these for its padding tokens.
        text_vocab_size=tokenizer.vocab_size + settings.text_len,
        grid=round(length**0.5),
        image_vocab_size=1 + max(int(loader.image_tokens.max()) for loader in loaders),
    )


@torch.inference_mode()
def _image_loss(student: Student, exam: TokenLoader, batch_samples: int) -> float:
    student.model.eval()
    batches = EVALUATED // batch_samples
    losses = [student.image_loss(exam.batch(step)) for step in range(batches)]
    student.model.train()
    return torch.stack(losses).mean().item()


if __name__ == "__main__":
    sys.exit(main())

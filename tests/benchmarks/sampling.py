"""Pictures' tokens a second: our sampler against dalle-pytorch's and GPT-2's of transformers.

All have the same depth, width, heads and parameters a layer, random weights, and draw every image
token of the same number of candidates. dalle-pytorch 1.6.6 forgets its cache where cond_scale is 1
(`forward_with_cond_scale` takes `cache` and does not hand it on): it is compared with that repaired
and, since its convolutional layer has no cache at all, with a row layer in that one's place.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.prior import START_ID, MLPResblock, Prior, PriorConfig
from pipelines.sampling.decoder import CachedDecoder
from pipelines.sampling.drawing import SamplingConfig
from pipelines.sampling.image_tokens import sample_image_tokens
from pipelines.sampling.packing import PackedPrior, Precision
from tests.benchmarks import peers
from tests.benchmarks.measure import (
    Effort,
    Row,
    cpu_seconds,
    significant,
    versions,
)

DALLE_PYTORCH, GPT2 = "dalle-pytorch 1.6.6, cache repaired", "transformers GPT-2"
PACKAGES = {
    DALLE_PYTORCH: ("torch", "dalle-pytorch"),
    GPT2: ("torch", "transformers"),
}
MOST_REPEATS = 2  # each takes the peers half a minute to two at 1,024 tokens
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
# dalle-pytorch's MLP is gated and has 12 d² parameters; 4 d wide, as the paper's, it has 8 d².
WIDENING = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size at which all are compared."""

    row: str
    grid: int
    text_len: int
    candidates: int

    @property
    def prior(self) -> PriorConfig:
        return PriorConfig(
            n_layers=8,
            n_heads=4,
            d_model=256,
            text_len=self.text_len,
            text_vocab_size=1024,
            grid=self.grid,
            image_vocab_size=512,
        )


CASES = (
    Case(row="sampling-1024-b16", grid=32, text_len=256, candidates=16),
    Case(row="sampling-tiny-b4", grid=16, text_len=64, candidates=4),
)
SMALL = Case(row="sampling-smoke-b2", grid=4, text_len=8, candidates=2)


def rows(effort: Effort) -> list[Row]:
    """Both sizes; with less than the usual effort, only a very small one."""
    cases = CASES if effort.rows >= Effort().rows else (SMALL,)
    return [row for case in cases for row in compare(case, min(effort.repeats, MOST_REPEATS))]


def compare(case: Case, repeats: int) -> list[Row]:
    """Everybody in turn, so that what changes on the machine changes for all."""
    packed = PackedPrior(our_prior(case.prior))
    check(packed, case)
    ways: dict[str, Callable[[], Tensor]] = {
        precision: partial(ours, packed, case, precision) for precision in PRECISIONS
    }
    ways |= {DALLE_PYTORCH: dalle_pytorch(case), GPT2: gpt2(case)}
    for name, way in ways.items():  # the first run of each is not timed
        assert way().shape[-2:] == (case.candidates, case.grid**2), name
    seconds = [{name: cpu_seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    return [row_of(case, precision, peer, seconds) for peer in PACKAGES for precision in PRECISIONS]


def row_of(case: Case, precision: Precision, peer: str, seconds: list[dict[str, float]]) -> Row:
    work = case.candidates * case.grid**2
    ratios = [one[peer] / one[precision] for one in seconds]
    return Row(
        row=case.row,
        peer=peer,
        precision=precision if precision == "fp32" else f"{precision}, theirs fp32",
        ours=significant(work / statistics.median(one[precision] for one in seconds)),
        theirs=significant(work / statistics.median(one[peer] for one in seconds)),
        unit="tokens/cpu-s",
        ratio_median=significant(statistics.median(ratios)),
        ratio_min=significant(min(ratios)),
        ratio_max=significant(max(ratios)),
        versions=versions(PACKAGES[peer]),
        note=f"{case.candidates} candidates of a prompt, {case.text_len} + {case.grid**2} tokens, "
        "random weights",
    )


def our_prior(config: PriorConfig) -> Prior:
    """A prior with as many parameters a layer as dalle-pytorch's."""
    prior = Prior(config)
    for block in prior.resblocks:
        if isinstance(block, MLPResblock):
            block.c_fc = nn.Linear(config.d_model, WIDENING * config.d_model)
            block.c_proj = nn.Linear(WIDENING * config.d_model, config.d_model)
    prior.init_weights(0)
    return prior.eval()


def prompt(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(2, 512, (1, case.text_len), generator=generator)
    text[:, 0] = START_ID
    return text


def ours(packed: PackedPrior, case: Case, precision: Precision) -> Tensor:
    return sample_image_tokens(
        packed,
        prompt(case),
        candidates=case.candidates,
        seeds=range(case.candidates),
        sampling=SamplingConfig(precision=precision),
    )


@torch.inference_mode()
def check(packed: PackedPrior, case: Case) -> None:
    """What is timed gives the logits of the whole model at once."""
    tokens = torch.randint(512, (1, case.grid**2), generator=torch.Generator().manual_seed(1))
    _, wanted = packed.prior.logits(prompt(case), tokens)
    decoder = CachedDecoder(packed.weights("fp32"), 1)
    got = [decoder.prefill(prompt(case), tokens[:, :0])]
    got += [decoder.step(tokens[:, p], p) for p in range(case.grid**2 - 1)]
    assert float((torch.stack(got, dim=1) - wanted).abs().max()) <= 1e-5


def dalle_pytorch(case: Case) -> Callable[[], Tensor]:
    """`generate_images` without the pictures' decoding."""
    package, config = peers.dalle_pytorch_package(), case.prior
    vae = package.DiscreteVAE(
        image_size=8 * case.grid, num_tokens=512, codebook_dim=16, num_layers=3, hidden_dim=8
    )
    kinds = ["axial_col" if kind == "column" else "axial_row" for kind in config.kinds]
    model = package.DALLE(
        dim=config.d_model,
        vae=vae,
        num_text_tokens=config.text_vocab_size,
        text_seq_len=case.text_len,
        depth=config.n_layers,
        heads=config.n_heads,
        dim_head=config.head_dim,
        attn_types=tuple(kinds),
        optimize_for_inference=True,
        shift_tokens=False,
    ).eval()
    model.vae.decode = lambda tokens: tokens

    def forward(*args: Any, cond_scale: float = 1, cache: Any = None, **more: Any) -> Any:
        return model(*args, cache=cache, **more)

    model.forward_with_cond_scale = forward
    text = prompt(case).expand(case.candidates, -1)
    return lambda: model.generate_images(text, use_cache=True)


def gpt2(case: Case) -> Callable[[], Tensor]:
    """`generate` with its cache, dense causal attention in every layer."""
    package, config = peers.transformers_package(), case.prior
    sizes = package.GPT2Config(
        vocab_size=512,
        n_positions=config.stream_len + 1,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=WIDENING * config.d_model,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = package.GPT2LMHeadModel(sizes).eval()
    text, length = prompt(case).expand(case.candidates, -1), case.grid**2

    def generate() -> Tensor:
        made: Tensor = model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=True,
            top_k=None,
            use_cache=True,
        )
        return made[:, case.text_len :]

    return generate

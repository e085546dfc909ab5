"""Other people's priors, made small enough to train in a benchmark.

They are no dependencies: `make peers` installs them, without what they ask for. DALL-E in PyTorch
also names packages that nothing measured here calls (a VQGAN, its configuration, torchvision) and
that want other versions of torch. Empty ones stand in while it is imported.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from models.prior import PriorConfig
from tests.benchmarks.measure import peer_package

# Imported by dalle_pytorch 1.6.6, never called by what is measured; and what it asks of them.
NEVER_CALLED = {
    "omegaconf": ("OmegaConf",),
    "pkg_resources": (),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "torchvision": (),
    "torchvision.transforms": (),
    "youtokentome": (),
}


def dalle_pytorch(config: PriorConfig) -> nn.Module:
    """lucidrains' DALLE in the paper's pattern, with the parameters of `config`.

    Its convolution is 5×5, always. shift_tokens is off: it is not in the paper, and would take it
    longer.
    """
    layers = geglu_layers(config)
    kinds = ["axial_col" if layer % 4 == 1 else "axial_row" for layer in range(layers)]
    kinds[-1] = "conv_like"
    package = dalle_pytorch_package()
    # Only its sizes are looked at: image tokens are given, not made.
    vae = package.DiscreteVAE(
        image_size=config.grid * 8,
        num_tokens=config.image_vocab_size,
        codebook_dim=16,
        num_layers=3,
        hidden_dim=8,
    )
    model: nn.Module = package.DALLE(
        dim=config.d_model,
        vae=vae,
        # It adds one token a text slot, for padding.
        num_text_tokens=config.text_vocab_size - config.text_len,
        text_seq_len=config.text_len,
        depth=layers,
        heads=config.n_heads,
        dim_head=config.head_dim,
        attn_types=tuple(kinds),
        shift_tokens=False,
    )
    return model.train()


def geglu_layers(config: PriorConfig) -> int:
    """Layers of 4·d² + 12·d² weights, attention and GEGLU, for ours of 4·d² + 8·d²."""
    return config.n_layers * 3 // 4


def gpt2(config: PriorConfig) -> nn.Module:
    """Hugging Face's GPT-2 with our layers' sizes, dense causal attention through SDPA.

    It has one vocabulary, so that every position scores all of it. Its embeddings are untied, as
    ours are, for the sake of equal parameters.
    """
    package = transformers_package()
    settings = package.GPT2Config(
        vocab_size=config.text_vocab_size + config.image_vocab_size,
        n_positions=config.stream_len,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
        loss_type="ForCausalLM",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = package.GPT2LMHeadModel(settings)
    return model.train()


def dalle_pytorch_package() -> ModuleType:
    """lucidrains' dalle_pytorch; raises MissingPeer if it is not installed."""
    transformers_package()  # it would look into the torchvision that stands in
    with _standing_in():
        return peer_package("dalle_pytorch", "dalle-pytorch 1.6.6")


def transformers_package() -> ModuleType:
    """Hugging Face's transformers; raises MissingPeer if it is not installed."""
    return peer_package("transformers", "transformers")


@contextmanager
def _standing_in() -> Iterator[None]:
    """Empty modules for NEVER_CALLED, gone again afterwards."""
    before = {name: sys.modules.get(name) for name in NEVER_CALLED}
    for name, classes in NEVER_CALLED.items():
        module: Any = ModuleType(name)
        module.__path__ = []
        for called in classes:
            setattr(module, called, type(called, (), {}))
        sys.modules[name] = module
    # Its only use of pkg_resources is to learn its own version, which it does not look at.
    sys.modules["pkg_resources"].get_distribution = lambda name: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module

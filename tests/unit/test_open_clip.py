"""Checkpoints of open_clip, against its forward pass written anew from its names of weights."""

import gzip
import re
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.clip import PIXEL_DEVIATION, PIXEL_MEAN
from pipelines.data.open_clip_slots import OpenClipSlots
from pipelines.training.open_clip_checkpoint import read_open_clip
from tests.fixtures.open_clip import HEADS, MERGES, TEXT_WIDTH, VOCAB_SIZE, WIDTH, weights

CAPTIONS = ["the theatre's 12 cats", "thé  &amp; <end_of_text>", "", "the " * 20]


def forward(
    state: dict[str, Tensor], activation: Callable[[Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Both towers on torch's own attention: pictures, and texts, to unit vectors."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def tower(x: Tensor, prefix: str, heads: int, mask: Tensor | None) -> Tensor:
        layers = {int(m[1]) for n in state if (m := re.match(rf"{prefix}resblocks\.(\d+)\.", n))}
        for layer in sorted(layers):
            name = f"{prefix}resblocks.{layer}"
            attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
            own = {
                n.removeprefix(f"{name}.attn."): v for n, v in state.items() if f"{name}.attn." in n
            }
            attention.load_state_dict({n: v for n, v in own.items() if not n.startswith("visual")})
            y = norm(x, f"{name}.ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = F.linear(
                norm(x, f"{name}.ln_2"),
                state[f"{name}.mlp.c_fc.weight"],
                state[f"{name}.mlp.c_fc.bias"],
            )
            x = x + F.linear(
                activation(y), state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"]
            )
        return x

    def images(pixels: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_DEVIATION))
        patches = F.conv2d((pixels - mean) / deviation, state["visual.conv1.weight"], stride=8)
        x = patches.flatten(2).permute(0, 2, 1)
        first = state["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], dim=1) + state["visual.positional_embedding"]
        x = tower(norm(x, "visual.ln_pre"), "visual.transformer.", HEADS, None)
        return F.normalize(norm(x[:, 0], "visual.ln_post") @ state["visual.proj"], dim=-1)

    def texts(tokens: Tensor) -> Tensor:
        x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        x = norm(tower(x, "transformer.", TEXT_WIDTH // 64, mask), "ln_final")
        last = x[torch.arange(len(x)), tokens.argmax(dim=-1)]  # the end's id is the largest
        return F.normalize(last @ state["text_projection"], dim=-1)

    return images, texts


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_imported_model_computes_what_the_reference_computes(
    activation: str, kind: str, tmp_path: Path
) -> None:
    state, file = weights(), tmp_path / f"model.{kind}"
    if kind == "bin":
        # As a module gives it: an OrderedDict with an attribute of its own.
        released = OrderedDict(state)
        released._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
        torch.save(released, file)
    else:
        save_file(state, file)
    clip = read_open_clip(file, activation=activation, image_heads=HEADS).load()  # type: ignore
    images, texts = forward(state, F.gelu if activation == "gelu" else quick_gelu)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    slots = OpenClipSlots(MERGES, VOCAB_SIZE, "merges")
    tokens, ends = map(torch.from_numpy, slots.slots(CAPTIONS, 10))
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_images(pixels), images(pixels), atol=1e-5, rtol=0)
        found = clip.encode_texts(tokens, ends)
        torch.testing.assert_close(found, texts(tokens), atol=1e-5, rtol=0)


def naive_ids(caption: str) -> list[int]:
    """Words by CLIP's rule, their bytes merged one best pair at a time."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    order = [letter[b] for b in [*printable, *others]]
    merges = [tuple(line.split()) for line in MERGES.decode().splitlines()[1:]]
    vocab = [*order, *(f"{c}</w>" for c in order), *("".join(m) for m in merges)]
    ids = []
    for word in re.findall(r"'s|[^\W\d_]+|\d|[^\s\w]+|_+", caption):
        parts = [letter[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while pairs := [m for m in merges if m in list(pairwise(parts))]:
            place = list(pairwise(parts)).index(pairs[0])
            parts[place : place + 2] = ["".join(pairs[0])]
        ids += [vocab.index(part) for part in parts]
    return ids


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("The theatre's 12 cats", "the theatre's 12 cats"),
        ("  thé\n &amp;amp; the ", "thé & the"),
        ("the <end_of_text>", "the <end_of_text>"),
        ("苹果 the", "苹果 the"),
        ("the “cat‘s” hat", 'the "cat\'s" hat'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_captions_become_the_ids_of_a_plain_bpe(caption: str, cleaned: str, packed: bool) -> None:
    data = gzip.compress(MERGES) if packed else MERGES
    ids, ends = OpenClipSlots(data, VOCAB_SIZE, "merges").slots([caption], 60)
    wanted = naive_ids(cleaned)
    assert ids[0, : ends[0] + 1].tolist() == [VOCAB_SIZE - 2, *wanted, VOCAB_SIZE - 1]
    assert not ids[0, ends[0] + 1 :].any()


def test_a_long_caption_is_cut_before_its_end() -> None:
    ids, ends = OpenClipSlots(MERGES, VOCAB_SIZE, "merges").slots(["the " * 50], 8)
    assert ends.tolist() == [7]
    assert ids[0, 7] == VOCAB_SIZE - 1
    assert np.unique(ids[0, 1:7]).size == 1


def test_merges_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold 6 merges"):
        OpenClipSlots(MERGES, VOCAB_SIZE + 1, "merges")
    with pytest.raises(ValueError, match="must be BPE merges"):
        OpenClipSlots(b"\x1f\x8bnot gzip", VOCAB_SIZE, "merges")
    with pytest.raises(ValueError, match="there is no such file"):
        OpenClipSlots.from_file(tmp_path / "none", VOCAB_SIZE)


def changed(**more: Tensor | None) -> dict[str, Tensor]:
    state = weights() | {k.replace("__", "."): v for k, v in more.items() if v is not None}
    return {k: v for k, v in state.items() if more.get(k.replace(".", "__"), v) is not None}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (changed(visual__proj=None), "not there or not so"),
        (changed(logit_bias=torch.zeros(1)), "'logit_bias', which no plain ViT"),
        (changed(visual__attnpool__c=torch.zeros(1)), "which no plain ViT of open_clip has"),
        (changed(ln_final__bias=torch.zeros(3)), "1 weights do not fit: text.ln_final.bias"),
        (changed(ln_final__bias=torch.full((TEXT_WIDTH,), float("nan"))), "not finite"),
    ],
)
def test_what_is_no_plain_vit_is_refused(
    state: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    with pytest.raises(ValueError, match=said):
        read_open_clip(file, activation="gelu", image_heads=HEADS)


def test_heads_that_nobody_knows_must_be_said(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(weights(), file)
    with pytest.raises(ValueError, match=f"its image tower is {WIDTH} wide.*image_heads"):
        read_open_clip(file, activation="gelu")


def test_broken_files_and_trainings_checkpoints_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="it is no safetensors file"):
        read_open_clip(broken, activation="gelu")
    training = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": weights()}, training)
    with pytest.raises(ValueError, match="'epoch' is no fp32 weight"):
        read_open_clip(training, activation="gelu", image_heads=HEADS)
    with pytest.raises(ValueError, match="there is no such file"):
        read_open_clip(tmp_path / "none.bin", activation="gelu")

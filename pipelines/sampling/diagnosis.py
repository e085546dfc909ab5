"""Where a prior's numbers stop being finite: looked up when it has happened, not in every step."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipelines.sampling.decoder import LayerStack


class NonFiniteLogits(RuntimeError):
    """The prior gave NaN or infinite logits: no picture is made of them."""


@torch.inference_mode()
def non_finite_logits(
    token: str,
    stack: LayerStack,
    streams: Iterable[Tensor],
    text_len: int,
    score: Callable[[Tensor], Tensor],
) -> NonFiniteLogits:
    """The error for the logits of `token`, found by running embedded `streams` (1, n, C) again.

    It names the part that gave the first value that is not finite, and the token of the stream.
    """
    found = (_where_it_broke(stack, stream, text_len, score) for stream in streams)
    where = next(filter(None, found), "cannot be found by running it again")
    hint = " in bf16, try fp32" if stack.weights.precision == "bf16" else ""
    return NonFiniteLogits(
        f"the prior's logits of {token} must be finite, got NaN or infinity, which first {where}: "
        f"the model file is not usable{hint}"
    )


def _where_it_broke(
    stack: LayerStack, x: Tensor, text_len: int, score: Callable[[Tensor], Tensor]
) -> str:
    """The sentence's end, or nothing if all is finite."""
    if said := _said(x, "the embeddings", text_len):
        return said
    for passed in stack.walk(x, text_len):
        x = passed.x
        if said := _said(x, passed.where, text_len):
            return said
    return _said(score(x[0])[None], "the head", text_len)


def _said(x: Tensor, where: str, text_len: int) -> str:  # x: (1, n, C)
    finite = torch.isfinite(x).all(dim=-1)[0]
    if bool(finite.all()):
        return ""
    index = int(finite.int().argmin())
    place = f"text slot {index}" if index < text_len else f"image token {index - text_len}"
    return f"came out of {where} at {place}"

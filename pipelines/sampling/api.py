"""What may be asked of the Images API, and how it is to be answered.

Pure functions of bytes and values, no server: a request is taken apart field by field, and whatever
is unknown or unsupported is refused by name instead of ignored.

Letters: H and W the picture's sides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from pipelines.sampling.drawing import ALL_CODES, LARGEST_SEED, SamplingConfig
from pipelines.sampling.openai_errors import ApiError, shown
from pipelines.sampling.openai_fields import Fields, parse_json

MOST_PICTURES = 10  # OpenAI's limit of n
MOST_PARTIALS = 3  # OpenAI's limit of partial_images
BODY_BYTES = 64 * 1024
# Every token stands for at least one byte, and no prior here has more text slots than this.
PROMPT_CHARACTERS = 32_000  # OpenAI's limit
IDENTIFIER_CHARACTERS = 512
LARGEST_GUIDANCE = 100.0  # far beyond what makes pictures; keeps logits far from infinity
FIELDS = (
    *("prompt", "model", "n", "size", "quality", "background", "moderation", "response_format"),
    *("output_format", "output_compression", "stream", "partial_images"),
    *("user", "safety_identifier"),
    *("seed", "temperature", "top_k", "top_p", "cond_scale", "rerank_pool"),
)

OutputFormat = Literal["png", "webp", "jpeg"]
FirstRows = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What requests are checked against."""

    name: str
    created: int
    """Unix time of the model file."""
    image_size: int
    image_tokens: int
    vocab_size: int
    check_prompt: Callable[[str], int]
    """The prompt's length in tokens; raises ValueError if the model cannot take it."""
    first_rows: FirstRows | None = None
    """Image tokens of a picture's (H, W, 3) uint8 upper rows; None: pictures are not completed."""
    guidable: bool = False
    """Whether the prior was trained with caption_dropout, which cond_scale needs."""
    largest_pool: int = 0
    """Most candidates that a request may rank; 0: there is no reranker."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What the model's card says: name and value, shown as text."""

    @property
    def size(self) -> str:
        """As requests name it."""
        return f"{self.image_size}x{self.image_size}"

    @property
    def grid(self) -> int:
        """Rows of image tokens."""
        return round(self.image_tokens**0.5)

    def card(self) -> dict[str, Any]:
        """An entry of GET /v1/models; `manray` is ours."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "manray",
            "manray": {
                "size": self.size,
                "image_tokens": self.image_tokens,
                "vocab_size": self.vocab_size,
                "most_pictures": MOST_PICTURES,
                "largest_pool": self.largest_pool,
                "guidable": self.guidable,
                "edits": self.first_rows is not None,
                "about": dict(self.about),
            },
        }


@dataclass(frozen=True, kw_only=True)
class ImagesRequest:
    """What is to be drawn, by a model that can."""

    prompt: str
    prompt_tokens: int
    n: int
    seed: int
    sampling: SamplingConfig
    partial_images: int = 0
    """Moments at which the pictures are shown while they are drawn."""
    rerank_pool: int = 0
    """Candidates of which the best `n` are wanted; 0: nothing is ranked."""
    start: np.ndarray | None = None
    """The pictures' first image tokens, int64, whole rows of the grid."""

    @property
    def candidates(self) -> int:
        """Pictures that are drawn, whether or not they are given out: what a request costs."""
        return max(self.n, self.rerank_pool)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the pictures are given out."""

    stream: bool = False
    output_format: OutputFormat = "png"
    output_compression: int = 100
    """Quality of WebP and JPEG, 0 to 100."""
    user: str = ""
    """Who is behind the request, as the client says: `safety_identifier`, or else `user`."""


RandomSeed = Callable[[], int]


def parse_request(
    body: bytes, model: ServedModel, random_seed: RandomSeed
) -> tuple[ImagesRequest, Delivery]:
    """The request in a JSON body; raises ApiError naming the first field that is wrong."""
    fields = Fields(parse_json(body), FIELDS, texts=False)
    return wanted_pictures(fields, model, random_seed), wanted_delivery(fields)


def wanted_pictures(fields: Fields, model: ServedModel, random_seed: RandomSeed) -> ImagesRequest:
    """What is to be drawn.

    Fields: prompt, model, n (1), size ("auto"), quality, background and moderation (as the model
    has them: "auto"), partial_images (0), and our own seed (a random one), temperature (1), top_k
    (all codes), top_p (1), cond_scale (1) and rerank_pool (0).
    """
    _check_model(fields, model)
    fields.choice("size", ("auto", model.size))
    fields.choice("quality", ("auto",))
    fields.choice("background", ("auto", "opaque"))
    fields.choice("moderation", ("auto",))
    prompt = fields.string("prompt", None, longest=PROMPT_CHARACTERS)
    try:
        prompt_tokens = model.check_prompt(prompt)
    except ValueError as error:
        raise ApiError(str(error), param="prompt", code="invalid_prompt") from error
    n = fields.integer("n", 1, lowest=1, highest=MOST_PICTURES)
    seed = fields.integer("seed", -1, lowest=0, highest=LARGEST_SEED)
    return ImagesRequest(
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        n=n,
        seed=random_seed() if seed < 0 else seed,
        sampling=_sampling(fields, model),
        partial_images=_partial_images(fields),
        rerank_pool=_rerank_pool(fields, model, n),
    )


def wanted_delivery(fields: Fields) -> Delivery:
    """How it is given out.

    Fields: response_format ("b64_json"), stream (false), output_format ("png"), output_compression
    (100, for webp and jpeg only), user and safety_identifier.
    """
    fields.choice("response_format", ("b64_json",))
    output_format = fields.choice("output_format", ("png", "webp", "jpeg"))
    compression = fields.integer("output_compression", 100, lowest=0, highest=100)
    if output_format == "png" and compression != 100:
        raise ApiError(
            "output_compression must be 100 for png, which loses nothing: ask for webp or jpeg.",
            param="output_compression",
            code="unsupported_value",
        )
    user = fields.string("user", "", longest=IDENTIFIER_CHARACTERS)
    return Delivery(
        stream=fields.boolean("stream"),
        output_format=cast(OutputFormat, output_format),
        output_compression=compression,
        user=fields.string("safety_identifier", "", longest=IDENTIFIER_CHARACTERS) or user,
    )


def no_such_model(name: str, model: ServedModel) -> ApiError:
    """404, as OpenAI answers it."""
    return ApiError(
        f"The model {shown(name)!r} does not exist; this server has {model.name!r}.",
        status=404,
        param="model",
        code="model_not_found",
    )


def _check_model(fields: Fields, model: ServedModel) -> None:
    name = fields.string("model", model.name)
    if name != model.name:
        raise no_such_model(name, model)


def _sampling(fields: Fields, model: ServedModel) -> SamplingConfig:
    cond_scale = fields.number("cond_scale", 1.0, lowest=0, highest=LARGEST_GUIDANCE)
    if cond_scale != 1 and not model.guidable:
        raise ApiError(
            "cond_scale must be 1: this model was trained without caption_dropout, "
            "so it knows no empty caption to be guided away from.",
            param="cond_scale",
            code="unsupported_value",
        )
    return SamplingConfig(
        temperature=fields.number("temperature", 1.0, lowest=0, above=True),
        top_k=fields.integer("top_k", ALL_CODES, lowest=1, highest=model.vocab_size),
        top_p=fields.number("top_p", 1.0, lowest=0, highest=1, above=True),
        cond_scale=cond_scale,
    )


def _partial_images(fields: Fields) -> int:
    count = fields.integer("partial_images", 0, lowest=0, highest=MOST_PARTIALS)
    if count and not fields.boolean("stream"):
        raise ApiError(
            "partial_images must be 0 without stream: true.",
            param="partial_images",
            code="unsupported_value",
        )
    return count


def _rerank_pool(fields: Fields, model: ServedModel, n: int) -> int:
    if "rerank_pool" in fields and not model.largest_pool:
        # 0 asks for what happens anyway.
        if fields.integer("rerank_pool", 0, lowest=0, highest=1 << 31) == 0:
            return 0
        raise ApiError(
            "rerank_pool must be 0: this server has no reranker.",
            param="rerank_pool",
            code="unsupported_value",
        )
    pool = fields.integer("rerank_pool", 0, lowest=0, highest=model.largest_pool)
    if 0 < pool < n:
        raise ApiError(
            f"rerank_pool must be at least n, got {pool} and {n}.",
            param="rerank_pool",
            code="out_of_range",
        )
    return pool

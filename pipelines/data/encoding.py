"""From filtered pictures to token shards: crops (Listing 2) and the dVAE's most likely codes.

A picture gives `crops_per_picture` rows, all under its key; the stage's rows in are pictures times
crops, and an unusable picture is dropped once for each crop that it does not give. So rows in equal
rows kept plus rows dropped here as everywhere.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.stage_one import StageOne
from pipelines.data.crops import (
    ENCODE_CROPS,
    Crop,
    CropConfig,
    UnusablePicture,
    decode_picture,
    random_crop,
)
from pipelines.data.schema import DROPPED, tokens_schema
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.weights import STAGE_ONE, load_stage_one, read_header

STAGE = "encode_pairs"
INPUT_COLUMNS = ["key", "url", "caption", "image"]


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """What is encoded. The defaults are the paper's crops, one of each picture."""

    crops: CropConfig = field(default_factory=lambda: ENCODE_CROPS)
    crops_per_picture: int = 1
    """The paper draws a new crop in every of its 1.76 epochs; we store so many of each picture."""
    batch_samples: int = 64
    """Crops that the dVAE encodes at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crops_per_picture < 1 or self.batch_samples < 1:
            raise ValueError(
                "crops_per_picture and batch_samples must be at least 1, "
                f"got {self.crops_per_picture}, {self.batch_samples}"
            )

    def identity(self) -> dict[str, Any]:
        """What the dataset depends on: an interrupted job may go on with other batches."""
        settings = asdict(self)
        del settings["batch_samples"]
        return settings


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """What is encoded and where to; travels to the workers."""

    filtered: Manifest
    writer: DatasetWriter
    dvae: Path
    stage_one: str
    """Kind of model in `dvae`: dvae or vqvae."""
    config: EncodingConfig


def plan_encoding(
    filtered: Path, tokenizer: Path, dvae: Path, output: Path, config: EncodingConfig
) -> EncodingPlan:
    """Check the inputs and name the shards; raises ValueError on a missing or foreign input."""
    manifest = Manifest.load(filtered.resolve(), stage="filter_pairs")
    header = read_header(dvae, *STAGE_ONE)
    paths = {"filtered": filtered, "tokenizer": tokenizer, "dvae": dvae}
    writer = DatasetWriter(
        path=output.resolve(),
        stage=STAGE,
        config=config.identity(),
        inputs={
            "filtered": manifest.digest,
            "tokenizer": CaptionTokenizer.from_file(tokenizer).digest,
            "dvae": sha256_file(dvae),
        },
        sources={name: str(path.resolve()) for name, path in paths.items()},
        shards=[commit.shard for commit in manifest.shards],
    )
    return EncodingPlan(
        filtered=manifest,
        writer=writer,
        dvae=dvae.resolve(),
        stage_one=header["kind"],
        config=config,
    )


class ShardEncoder:
    """Holds the dVAE and encodes shard after shard: one actor of the pipeline."""

    def __init__(self, plan: EncodingPlan, device: str, threads: int) -> None:
        self.plan, self.device = plan, torch.device(device)
        torch.set_num_threads(threads)
        found, wanted = sha256_file(plan.dvae), plan.writer.inputs["dvae"]
        if found != wanted:
            raise ValueError(f"{plan.dvae} must have SHA-256 {wanted} on every node, got {found}")
        model, _ = load_stage_one(plan.dvae)
        # Channels last: 1.4 times as fast on CPU.
        self.model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        """Encode and commit the shard named by `row`; may be run twice."""
        plan, inputs = self.plan, self.plan.writer.inputs
        pairs = plan.filtered.read(row["shard"], INPUT_COLUMNS)
        grid = self.model.config.grid
        schema = tokens_schema(
            grid,
            stage_one=plan.stage_one,
            dvae_sha256=inputs["dvae"],
            tokenizer_sha256=inputs["tokenizer"],
        )
        kept, dropped = encode_shard(pairs, self.model, plan.config, self.device)
        rows_in = len(pairs) * plan.config.crops_per_picture
        table = pa.Table.from_pylist(kept, schema=schema)
        commit = plan.writer.commit(row["shard"], table, dropped, rows_in=rows_in, schema=schema)
        return {"shard": row["shard"], "rows_out": commit.rows_out}


def encode_shard(
    pairs: pa.Table, model: StageOne, config: EncodingConfig, device: torch.device
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Token rows and the table of dropped rows of one filtered shard, in its order."""
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    squares: list[np.ndarray] = []
    tokens: list[bytes] = []
    for pair in pairs.to_pylist():
        try:
            crops = _crops(pair["key"], pair["image"], model.config.image_size, config)
        except UnusablePicture as error:
            row = {name: pair[name] for name in ("key", "url", "caption")}
            row |= {"reason": error.reason, "detail": error.detail}
            dropped += [row] * config.crops_per_picture
            continue
        for square, crop in crops:
            squares.append(square)
            kept.append({"key": pair["key"], "caption": pair["caption"], **_where(crop)})
        # Encode as soon as there is a batch: a shard's pixels would fill the memory.
        while len(squares) >= config.batch_samples:
            tokens += _encode(squares[: config.batch_samples], model, device)
            squares = squares[config.batch_samples :]
    if squares:
        tokens += _encode(squares, model, device)
    for row, codes in zip(kept, tokens, strict=True):
        row["image_tokens"] = codes
    return kept, pa.Table.from_pylist(dropped, schema=DROPPED)


def _crops(
    key: str, image: bytes, image_size: int, config: EncodingConfig
) -> list[tuple[np.ndarray, Crop]]:
    """The crops are a function of the pair's key, wherever and whenever it is encoded."""
    picture = decode_picture(image)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{key}".encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    return [
        random_crop(picture, image_size, config.crops, rng) for _ in range(config.crops_per_picture)
    ]


def _where(crop: Crop) -> dict[str, int]:
    return {"crop_size": crop.size, "crop_left": crop.left, "crop_top": crop.top}


@torch.inference_mode()
def _encode(squares: Sequence[np.ndarray], model: StageOne, device: torch.device) -> list[bytes]:
    """Codes in raster order, little-endian uint16, of (S, S, 3) uint8 squares."""
    # The channels are last in memory as they come, which is how the convolutions are fastest.
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(device).float().div_(255)
    codes = model.encode(pixels).flatten(1).cpu().numpy().astype("<u2")
    return [row.tobytes() for row in codes]

"""From filtered pictures to token shards: crops (Listing 2) and the most likely codes of a dVAE.

A picture gives `crops_per_picture` rows, all under its key; the stage's rows in are pictures times
crops, and an unusable picture is dropped once for each crop that it does not give. So rows in equal
rows kept plus rows dropped here as everywhere.

Three parts pass a shard on in blocks: `picture_blocks` cuts squares, `block_encoder` makes codes of
them, `token_commits` gathers a shard's codes and commits it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from models.stage_one import StageOneConfig
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.schema import tokens_schema
from pipelines.data.stage import DatasetWriter, Manifest
from pipelines.data.storage import Location, sha256_file
from pipelines.data.tokenizer import CaptionTokenizer
from pipelines.training.weights import STAGE_ONE, read_header, stage_one_config

STAGE = "encode_pairs"
TOKEN_BYTES = 2  # uint16


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """What is encoded, with what and where to."""

    filtered: Manifest
    writer: DatasetWriter
    dvae: Path
    stage_one: str
    """Kind of model in `dvae`: dvae or vqvae."""
    model: StageOneConfig
    config: EncodingConfig

    @property
    def rows_in(self) -> dict[str, int]:
        """Crops of each shard, kept or dropped."""
        crops = self.config.crops_per_picture
        return {part.shard: part.rows_out * crops for part in self.filtered.shards}

    @property
    def schema(self) -> pa.Schema:
        """Columns of the token shards."""
        return tokens_schema(
            self.model.grid,
            stage_one=self.stage_one,
            dvae_sha256=self.writer.inputs["dvae"],
            tokenizer_sha256=self.writer.inputs["tokenizer"],
        )

    def files(self, shards: Sequence[str]) -> list[dict[str, str]]:
        """Where the pictures of these shards are: the input rows of the decoders."""
        files = {part.shard: self.filtered.path / part.file for part in self.filtered.shards}
        return [{"shard": shard, "file": str(files[shard])} for shard in shards]

    def pictures(self, shards: Sequence[str]) -> int:
        """Pictures in these shards."""
        wanted = set(shards)
        return sum(part.rows_out for part in self.filtered.shards if part.shard in wanted)

    def blocks(self, shards: Sequence[str]) -> int:
        """Batches that these shards are cut into, if no picture is dropped; at least one each."""
        rows, size = self.rows_in, self.config.batch_samples
        return sum(max(1, math.ceil(rows[shard] / size)) for shard in shards)

    def token_bytes(self, shards: Sequence[str]) -> int:
        """Bytes of the codes of these shards, before compression."""
        rows = self.pictures(shards) * self.config.crops_per_picture
        return rows * self.model.grid**2 * TOKEN_BYTES


def plan_encoding(
    filtered: Path | Location,
    tokenizer: Path,
    dvae: Path,
    output: Path | Location,
    config: EncodingConfig,
) -> EncodingPlan:
    """Check the inputs and name the shards; raises ValueError on a missing or foreign input."""
    manifest = Manifest.load(filtered.resolve(), stage="filter_pairs")
    header = read_header(dvae, *STAGE_ONE)
    paths: dict[str, Path | Location] = {"filtered": filtered, "tokenizer": tokenizer, "dvae": dvae}
    inputs = {
        "filtered": manifest.digest,
        "tokenizer": CaptionTokenizer.from_file(tokenizer).digest,
        "dvae": sha256_file(dvae),
    }
    settings: dict[str, Any] = asdict(config)
    writer = DatasetWriter(
        path=output.resolve(),
        stage=STAGE,
        config=settings,
        inputs=inputs,
        sources={name: str(path.resolve()) for name, path in paths.items()},
        shards=[commit.shard for commit in manifest.shards],
    )
    return EncodingPlan(
        filtered=manifest,
        writer=writer,
        dvae=dvae.resolve(),
        stage_one=header["kind"],
        model=stage_one_config(header),
        config=config,
    )

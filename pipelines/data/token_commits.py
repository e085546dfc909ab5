"""Gathers the blocks of codes of shards and commits each shard when it is whole, once."""

from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.data.encoding import TOKEN_BYTES, EncodingPlan
from pipelines.data.picture_blocks import KEPT
from pipelines.data.schema import DROPPED
from pipelines.data.stage import ShardCommit


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """One batch of a shard on its way back."""

    shard: str
    number: int
    last: bool
    kept: pa.Table
    dropped: pa.Table
    tokens: pa.Buffer

    @classmethod
    def from_row(cls, row: pa.Table) -> "TokenBlock":
        """A table of one row, see `block_encoder.TOKEN_BLOCK`."""
        return cls(
            shard=row["shard"][0].as_py(),
            number=row["number"][0].as_py(),
            last=row["last"][0].as_py(),
            kept=_rows(row["kept"], KEPT),
            dropped=_rows(row["dropped"], DROPPED),
            tokens=row["tokens"][0].as_buffer(),
        )


@dataclass
class _OpenShard:
    blocks: dict[int, TokenBlock] = field(default_factory=dict)
    last: int | None = None

    @property
    def whole(self) -> bool:
        return self.last is not None and len(self.blocks) == self.last + 1


class TokenCommitter:
    """Takes blocks in any order; what it holds is lost with it, what it committed is not.

    Raises RuntimeError on a block that comes twice, after its shard's commit, or from outside the
    plan: the pipeline has then not done what it promises, and nothing more may be committed.
    """

    def __init__(self, plan: EncodingPlan) -> None:
        self.writer, self.schema, self.rows_in = plan.writer, plan.schema, plan.rows_in
        self.row_bytes = plan.model.grid**2 * TOKEN_BYTES
        self._pending = set(plan.writer.pending())
        self._open: dict[str, _OpenShard] = {}

    def add(self, block: TokenBlock) -> ShardCommit | None:
        """The commit of the block's shard if this was its last missing block."""
        name = f"block {block.number} of shard {block.shard}"
        if block.shard not in self._pending:
            raise RuntimeError(f"{name} came, but the shard is committed or not asked for")
        if len(block.tokens) != len(block.kept) * self.row_bytes:
            raise RuntimeError(
                f"{name} must have {self.row_bytes} bytes of tokens for each of its "
                f"{len(block.kept)} rows, it has {len(block.tokens)}"
            )
        shard = self._open.setdefault(block.shard, _OpenShard())
        if block.number in shard.blocks:
            raise RuntimeError(f"{name} came twice")
        shard.blocks[block.number] = block
        if block.last and shard.last is not None:
            raise RuntimeError(f"shard {block.shard} has two ends: {shard.last}, {block.number}")
        if block.last:
            shard.last = block.number
        if shard.last is not None and max(shard.blocks) > shard.last:
            raise RuntimeError(f"{name}: shard {block.shard} ends at block {shard.last}")
        return self._commit(block.shard) if shard.whole else None

    def close(self) -> None:
        """Raises RuntimeError if a shard is not committed."""
        if self._pending:
            some = ", ".join(sorted(self._pending)[:3])
            raise RuntimeError(
                f"the blocks ended, but {len(self._pending)} shards are not whole ({some})"
            )

    def _commit(self, shard: str) -> ShardCommit:
        blocks = [block for _, block in sorted(self._open.pop(shard).blocks.items())]
        kept = pa.concat_tables([block.kept for block in blocks])
        tokens = pa.py_buffer(b"".join(block.tokens for block in blocks))
        column = pa.Array.from_buffers(pa.binary(self.row_bytes), len(kept), [None, tokens])
        commit = self.writer.commit(
            shard,
            kept.append_column("image_tokens", column).select(self.schema.names),
            pa.concat_tables([block.dropped for block in blocks]),
            rows_in=self.rows_in[shard],
            schema=self.schema,
        )
        self._pending.remove(shard)
        return commit


def _rows(column: pa.ChunkedArray, schema: pa.Schema) -> pa.Table:
    """The rows in a list of structs."""
    structs = column.combine_chunks().flatten()
    return pa.Table.from_arrays(structs.flatten(), names=schema.names).cast(schema)

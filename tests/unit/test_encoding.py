"""A shard's way from pictures to committed codes, without Ray."""

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.configs.encode_pairs import PRESETS, EncodePairsJob
from jobs.encoding_actors import Actors, plan_actors
from models.vqvae import VQVAE, VQVAEConfig
from pipelines.data.block_encoder import BlockEncoder
from pipelines.data.encoding import EncodingPlan, plan_encoding
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.picture_blocks import READ_ROWS, picture_blocks
from pipelines.data.schema import FILTERED
from pipelines.data.stage import Manifest
from pipelines.data.storage import sha256_file
from pipelines.data.token_commits import TokenBlock, TokenCommitter
from pipelines.training.weights import load_stage_one, save_model
from tests.fixtures.datasets import CORPUS, filtered_row, tiny_tokens, write_dataset

ROOT = Path(__file__).parents[2]
SIDE = 64
CONFIG = EncodingConfig(crops_per_picture=2, batch_samples=6, precision="fp32")
ROWS = 20
UNUSABLE = 3
SHARDS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a dVAE, and two shards of ten pictures, three of the first not usable."""
    path = tmp_path_factory.mktemp("encoding")
    tiny_tokens(path / "whole", rows=ROWS)
    corpus = pq.read_table(CORPUS, columns=["caption", "image"]).slice(0, ROWS).to_pylist()
    rows = [
        filtered_row(row["caption"], b"no picture %d" % i if i < UNUSABLE else row["image"])
        for i, row in enumerate(corpus)
    ]
    table = pa.Table.from_pylist(rows, schema=FILTERED)
    write_dataset(
        path / "filtered",
        "filter_pairs",
        table,
        inputs={"raw": "0" * 64},
        rows_per_shard=ROWS // SHARDS,
    )
    return path


def plan_for(inputs: Path, output: Path, config: EncodingConfig = CONFIG) -> EncodingPlan:
    whole = inputs / "whole"
    plan = plan_encoding(
        inputs / "filtered",
        whole / "tokenizer/tokenizer.json",
        whole / "dvae/dvae.safetensors",
        output,
        config,
    )
    plan.writer.claim()
    return plan


def squares(plan: EncodingPlan, shard: str) -> list[pa.Table]:
    (row,) = plan.files([shard])
    return list(picture_blocks(shard, Path(row["file"]), plan.config, plan.model.image_size))


@pytest.fixture(scope="module")
def encoder(inputs: Path) -> BlockEncoder:
    dvae = inputs / "whole/dvae/dvae.safetensors"
    return BlockEncoder(dvae, sha256_file(dvae), CONFIG, "cpu", 1, 2)


@pytest.fixture(scope="module")
def blocks(inputs: Path, encoder: BlockEncoder, tmp_path_factory: pytest.TempPathFactory) -> list:
    """The seven blocks of codes of both shards."""
    plan = plan_for(inputs, tmp_path_factory.mktemp("blocks") / "tokens")
    return [
        TokenBlock.from_row(encoder(block))
        for shard in plan.writer.shards
        for block in squares(plan, shard)
    ]


def committed(plan: EncodingPlan, blocks: list[TokenBlock]) -> Manifest:
    committer = TokenCommitter(plan)
    for block in blocks:
        committer.add(block)
    committer.close()
    return plan.writer.seal()


@pytest.fixture(scope="module")
def manifest(
    inputs: Path, blocks: list[TokenBlock], tmp_path_factory: pytest.TempPathFactory
) -> Manifest:
    """What comes of the blocks in their order."""
    return committed(plan_for(inputs, tmp_path_factory.mktemp("ordered") / "tokens"), blocks)


def test_a_shard_is_cut_into_whole_batches_and_a_rest(inputs: Path, tmp_path: Path) -> None:
    plan = plan_for(inputs, tmp_path / "tokens")
    for shard, sizes in (("00000", [6, 6, 2]), ("00001", [6, 6, 6, 2])):
        cut = squares(plan, shard)
        kept = [len(block["kept"][0].as_py()) for block in cut]
        assert kept == sizes
        assert [block["number"][0].as_py() for block in cut] == list(range(len(cut)))
        assert [block["last"][0].as_py() for block in cut] == [False] * (len(cut) - 1) + [True]
        for block, size in zip(cut, sizes, strict=True):
            assert len(block["pixels"][0].as_buffer()) == size * SIDE * SIDE * 3


def test_a_shard_is_read_in_parts_and_cut_the_same_way_twice(tmp_path: Path) -> None:
    corpus = pq.read_table(CORPUS, columns=["caption", "image"]).slice(0, 5).to_pylist()
    rows = [filtered_row(f"{i}", corpus[i % 5]["image"]) for i in range(2 * READ_ROWS + 1)]
    pq.write_table(pa.Table.from_pylist(rows, schema=FILTERED), tmp_path / "shard.parquet")
    config = EncodingConfig(batch_samples=50)
    once, again = (
        pa.concat_tables(picture_blocks("00000", tmp_path / "shard.parquet", config, 32))
        for _ in range(2)
    )
    assert once.equals(again)
    captions = [row["caption"] for kept in once["kept"].to_pylist() for row in kept]
    assert captions == [row["caption"] for row in rows]


def test_decoders_do_without_torch_which_would_double_their_memory() -> None:
    script = "import sys, pipelines.data.picture_blocks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_shard_without_a_usable_picture_is_one_empty_block(tmp_path: Path) -> None:
    rows = [filtered_row(f"{i}", b"no picture %d" % i) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows, schema=FILTERED), tmp_path / "shard.parquet")
    (block,) = picture_blocks("00000", tmp_path / "shard.parquet", CONFIG, SIDE)
    assert block["last"][0].as_py()
    assert not block["kept"][0].as_py()
    assert len(block["dropped"][0].as_py()) == 3 * CONFIG.crops_per_picture


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    rows = [filtered_row("a", b"x")]
    file = tmp_path / "shard.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=FILTERED), file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"shard\.parquet must be a readable Parquet file"):
        list(picture_blocks("00000", file, CONFIG, SIDE))


def test_codes_are_those_of_the_model_and_two_threads_may_ask(
    inputs: Path, encoder: BlockEncoder, tmp_path: Path
) -> None:
    model, _ = load_stage_one(inputs / "whole/dvae/dvae.safetensors")
    cut = squares(plan_for(inputs, tmp_path / "tokens"), "00001")
    made: dict[int, pa.Table] = {}
    threads = [
        threading.Thread(target=lambda i=i: made.update({i: encoder(cut[i])}))
        for i in range(len(cut))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, block in enumerate(cut):
        pixels = np.frombuffer(block["pixels"][0].as_buffer(), np.uint8).copy()
        wanted = model.encode(
            torch.from_numpy(pixels).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2) / 255
        )
        codes = np.frombuffer(made[i]["tokens"][0].as_buffer(), "<u2").reshape(wanted.shape)
        assert (codes == wanted.numpy()).mean() > 0.99  # another kernel's rounding, at near ties
        assert made[i]["encoder"][0].as_py() == encoder.name
    busy, seconds = encoder.clock.read()
    assert 0 < busy < seconds


def test_another_models_file_is_refused_by_the_encoder(inputs: Path) -> None:
    dvae = inputs / "whole/dvae/dvae.safetensors"
    with pytest.raises(ValueError, match="must have SHA-256 0000"):
        BlockEncoder(dvae, "0" * 64, CONFIG, "cpu", 1, 1)


def test_a_vqvae_encodes_too_and_its_shards_say_so(inputs: Path, tmp_path: Path) -> None:
    config = VQVAEConfig(
        image_size=SIDE, vocab_size=32, n_hid=8, n_init=8, n_blk_per_group=1, code_width=4
    )
    torch.manual_seed(0)
    model = VQVAE(config)
    torch.nn.init.normal_(model.codebook)
    file = tmp_path / "vqvae.safetensors"
    save_model(file, kind="vqvae", config=config, state=model.state_dict(), metadata={})
    tokenizer = inputs / "whole/tokenizer/tokenizer.json"
    plan = plan_encoding(inputs / "filtered", tokenizer, file, tmp_path / "tokens", CONFIG)
    plan.writer.claim()
    encoder = BlockEncoder(file, plan.writer.inputs["dvae"], CONFIG, "cpu", 1, 1)
    cut = [block for shard in plan.writer.shards for block in squares(plan, shard)]
    tokens = committed(plan, [TokenBlock.from_row(encoder(block)) for block in cut])
    assert tokens.read("00000").schema.metadata[b"manray.stage_one"] == b"vqvae"
    codes = [np.frombuffer(row, "<u2") for row in tokens.read("00000")["image_tokens"].to_pylist()]
    assert 1 < len(np.unique(codes)) <= 32


def test_the_shards_hold_every_crop_once_and_drops_have_reasons(manifest: Manifest) -> None:
    assert manifest.rows_in == ROWS * CONFIG.crops_per_picture
    assert manifest.dropped == {"not_a_picture": UNUSABLE * CONFIG.crops_per_picture}
    first = manifest.read("00000")
    assert first["key"].to_pylist()[::2] == first["key"].to_pylist()[1::2]
    assert len({tuple(row.values()) for row in first.select(["key", "crop_left"]).to_pylist()}) > 7
    assert first.schema.metadata[b"manray.stage_one"] == b"dvae"


@given(order=st.permutations(range(7)))
def test_blocks_may_come_in_any_order(
    order: list[int],
    inputs: Path,
    blocks: list[TokenBlock],
    manifest: Manifest,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plan = plan_for(inputs, tmp_path_factory.mktemp("shuffled") / "tokens")
    assert committed(plan, [blocks[i] for i in order]).digest == manifest.digest


@given(data=st.data())
def test_a_block_that_comes_twice_is_refused_and_nothing_is_committed_twice(
    data: st.DataObject,
    inputs: Path,
    blocks: list[TokenBlock],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plan = plan_for(inputs, tmp_path_factory.mktemp("twice") / "tokens")
    order = data.draw(st.permutations(range(len(blocks))))
    first = data.draw(st.integers(0, len(blocks) - 1))
    again = data.draw(st.integers(first + 1, len(blocks)))
    committer = TokenCommitter(plan)
    for i in order[:again]:
        committer.add(blocks[i])
    before = plan.writer.pending()
    with pytest.raises(RuntimeError, match="came"):
        committer.add(blocks[order[first]])
    assert plan.writer.pending() == before


@given(data=st.data())
def test_a_missing_block_is_missed(
    data: st.DataObject,
    inputs: Path,
    blocks: list[TokenBlock],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plan = plan_for(inputs, tmp_path_factory.mktemp("missing") / "tokens")
    order = data.draw(st.permutations(range(len(blocks))))[1:]
    committer = TokenCommitter(plan)
    for i in order:
        committer.add(blocks[i])
    with pytest.raises(RuntimeError, match="1 shards are not whole"):
        committer.close()
    assert len(plan.writer.pending()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard": "00007"}, "not asked for"),
        ({"number": 9}, "ends at block 2"),
        ({"number": 1, "last": True}, "two ends"),
        ({"tokens": pa.py_buffer(b"123")}, "bytes of tokens"),
    ],
)
def test_a_block_that_cannot_be_is_refused(
    changes: dict, words: str, inputs: Path, blocks: list[TokenBlock], tmp_path: Path
) -> None:
    committer = TokenCommitter(plan_for(inputs, tmp_path / "tokens"))
    committer.add(blocks[2])  # the last one of the first shard
    with pytest.raises(RuntimeError, match=words):
        committer.add(replace(blocks[0], **changes))


def test_a_shard_that_lost_a_picture_on_the_way_is_not_committed(
    inputs: Path, blocks: list[TokenBlock], tmp_path: Path
) -> None:
    plan = plan_for(inputs, tmp_path / "tokens")
    committer = TokenCommitter(plan)
    committer.add(replace(blocks[0], dropped=blocks[0].dropped.slice(1)))
    committer.add(blocks[1])
    with pytest.raises(RuntimeError, match="20 rows came in, 14 kept \\+ 5 dropped"):
        committer.add(blocks[2])
    assert "00000" in plan.writer.pending()


def nodes(*resources: tuple[float, float], store: float = 1e12) -> list[dict[str, float]]:
    return [{"CPU": cpu, "GPU": gpu, "object_store_memory": store} for cpu, gpu in resources]


def planned(
    job: EncodePairsJob, nodes: list[dict[str, float]], *, shards: int = 99, blocks: int = 999
) -> Actors:
    return plan_actors(job, nodes, image_size=256, shards=shards, blocks=blocks)


def job_with(**changes: Any) -> EncodePairsJob:
    return replace(PRESETS["tiny"][1], **changes)


def test_the_papers_line_takes_eight_gpus_and_leaves_decoders_the_cpus() -> None:
    actors = planned(PRESETS["paper"][1], nodes((24, 4), (24, 4)))
    assert (actors.encoders, actors.gpus_per_encoder, actors.cpus_per_encoder) == (8, 1, 0)
    assert (actors.decoders, actors.cpus_per_decoder) == (32, 1)
    assert actors.calls_per_encoder == 2


def test_the_same_line_runs_on_cpus_where_there_are_no_gpus() -> None:
    actors = planned(job_with(), nodes((2, 0)))
    assert (actors.gpus_per_encoder, actors.cpus_per_encoder, actors.calls_per_encoder) == (0, 1, 1)
    assert actors.cpus_per_decoder == 1
    assert planned(job_with(), nodes((2, 1))).gpus_per_encoder == 1
    assert planned(job_with(device="cpu"), nodes((2, 1))).gpus_per_encoder == 0


@given(cpus=st.integers(1, 12), encoders=st.integers(1, 6), decoders=st.integers(1, 12))
def test_what_is_planned_fits_or_is_refused(cpus: int, encoders: int, decoders: int) -> None:
    job = job_with(encoders=encoders, decoders=decoders)
    if 4 * (cpus - encoders) < decoders:
        with pytest.raises(ValueError, match="ask for fewer with --encoders or --decoders"):
            planned(job, nodes((cpus, 0)))
        return
    actors = planned(job, nodes((cpus, 0)))
    assert actors.cpus_per_decoder >= 0.25
    assert actors.encoders + actors.decoders * actors.cpus_per_decoder <= cpus


def test_no_more_actors_are_planned_than_there_is_work_for() -> None:
    actors = planned(job_with(encoders=8, decoders=8), nodes((4, 0)), shards=2, blocks=1)
    assert (actors.encoders, actors.decoders) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "cluster", "words"),
    [
        ({"device": "gpu"}, nodes((8, 0)), "places for 0"),
        ({"device": "gpu", "encoders": 3}, nodes((8, 2)), "places for 2"),
        ({}, nodes((1, 0)), "it has 1 CPUs for 1 encoders and 1 decoders"),
        ({"encoding": EncodingConfig()}, nodes((8, 0)), "must be fp32 or bf16 on CPUs, got fp16"),
        ({}, nodes((8, 0), store=1e8), "object stores must hold"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_in_words(
    changes: dict, cluster: list[dict[str, float]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        planned(job_with(**changes), cluster)


@pytest.mark.parametrize(
    "wrong", [{"encoders": 0}, {"decoders": 0}, {"device": "tpu"}, {"gpus_per_encoder": 0.0}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        job_with(**wrong)


@pytest.mark.parametrize("changes", [{"batch_samples": 7}, {"precision": "bf16"}, {"seed": 1}])
def test_all_that_rounding_depends_on_is_part_of_the_identity(
    changes: dict, inputs: Path, tmp_path: Path
) -> None:
    plan_for(inputs, tmp_path / "tokens")
    with pytest.raises(ValueError, match="other settings or inputs"):
        plan_for(inputs, tmp_path / "tokens", replace(CONFIG, **changes))

"""Perceptual hashes, the index of them, clusters, and what is decided about clusters."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from pipelines.data.decode import decode_picture
from pipelines.data.filtering import FINGERPRINTS_STAGE, filter_shard, fingerprint_shard
from pipelines.data.near_duplicates import SURE_DISTANCE, Clusters, HashIndex, bands
from pipelines.data.overlap import OverlapConfig, read_evaluation
from pipelines.data.picture_groups import DECISIONS, Groups, NearDuplicatesConfig, find_groups
from pipelines.data.picture_hashes import HASH_BITS, HASHES, WORDS, distances, picture_hashes
from pipelines.data.row_rules import RowRulesConfig
from pipelines.data.schema import FINGERPRINTS, RAW
from pipelines.data.stage import Manifest
from tests.fixtures.datasets import CORPUS, filtered_row, write_dataset

NEAR = NearDuplicatesConfig()
RULES = RowRulesConfig(min_side=64)


def scene(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    """Random colours whose contrast falls as their frequency rises, as photographs' does."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for cells in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = coarse.resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer) - 128.0) * 3 / cells
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def hashes_of(picture: Image.Image) -> np.ndarray:
    hashes = picture_hashes(np.asarray(picture))
    assert hashes is not None
    return hashes


def jpeg(picture: Image.Image, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def trimmed(picture: Image.Image, percent: float) -> Image.Image:
    width, height = picture.size
    x, y = round(width * percent / 100), round(height * percent / 100)
    return picture.crop((x // 2, y, width - x + x // 2, height))


ALTERED = {
    "half the size": lambda picture: picture.resize((100, 75)),
    "recompressed": lambda picture: Image.open(io.BytesIO(jpeg(picture, 30))),
    "trimmed by 2 %": lambda picture: trimmed(picture, 2),
    "trimmed by 4 %": lambda picture: trimmed(picture, 4),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
    "more colourful": lambda picture: ImageEnhance.Color(picture).enhance(1.2),
}


def rows(pictures: list[bytes]) -> list[dict[str, object]]:
    pairs = [filtered_row(f"a red kite number {i}", data) for i, data in enumerate(pictures)]
    return [{name: row[name] for name in RAW.names} for row in pairs]


def fingerprints(path: Path, pairs: list[dict[str, object]], per_shard: int = 7) -> Manifest:
    table = pa.Table.from_pylist(pairs, schema=RAW)
    prints, _ = fingerprint_shard(table, RULES, look=True)
    assert prints.schema == FINGERPRINTS
    return write_dataset(path, FINGERPRINTS_STAGE, prints, inputs={}, rows_per_shard=per_shard)


def groups_of(manifest: Manifest, near: NearDuplicatesConfig = NEAR, **overlap: object) -> Groups:
    config = OverlapConfig(**overlap)  # type: ignore[arg-type]
    evaluation = read_evaluation(config.pictures)
    return find_groups(manifest, near, config, evaluation, validation_fraction=0.5)


def decided(groups: Groups) -> dict[str, tuple[str | None, str | None]]:
    table = pa.concat_tables([DECISIONS.empty_table(), *groups.decisions.values()])
    return {row["key"]: (row["reason"], row["detail"]) for row in table.to_pylist()}


def random_hashes(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, (count, WORDS), dtype=np.uint64)


def with_flipped_bits(hashes: np.ndarray, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    copies = hashes.copy()
    for row in copies:
        for bit in rng.choice(HASH_BITS, count, replace=False):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return copies


@pytest.mark.parametrize("flipped", [0, 1, 10, SURE_DISTANCE])
def test_the_index_finds_every_hash_within_the_sure_distance(flipped: int) -> None:
    hashes = random_hashes(300)
    found = set()
    for query, place in HashIndex(hashes, 48).near(with_flipped_bits(hashes, flipped)):
        found |= set(zip(query.tolist(), place.tolist(), strict=True))
    assert found == {(row, row) for row in range(300)}


def test_what_the_index_finds_depends_on_the_pair_alone() -> None:
    hashes = random_hashes(200)
    queries = with_flipped_bits(hashes, 34)  # far enough for some to be missed
    found = {
        (int(a), int(b))
        for q, h in HashIndex(hashes, 48).near(queries)
        for a, b in zip(q, h, strict=True)
    }
    apart = bands(hashes), bands(queries)
    expected = np.zeros(200, bool)
    for mine, other in zip(*apart, strict=True):
        expected |= np.bitwise_count(mine ^ other) <= 1
    assert found == {(row, row) for row in np.flatnonzero(expected).tolist()}
    assert 0 < len(found) < 200


def test_nothing_is_near_in_an_empty_index() -> None:
    assert not list(HashIndex(random_hashes(0), 48).near(random_hashes(3)))


def test_clusters_are_the_connected_rows_whatever_the_order_of_the_pairs() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 500, (300, 2))
    expected = list(range(500))  # the slow way: the smaller number spreads until nothing changes
    changed = True
    while changed:
        changed = False
        for a, b in pairs.tolist():
            low = min(expected[a], expected[b])
            changed |= expected[a] != low or expected[b] != low
            expected[a] = expected[b] = low
    for order in (pairs, pairs[::-1], pairs[:, ::-1]):
        clusters = Clusters(500)
        for part in np.array_split(order, 7):
            clusters.join(part[:, 0], part[:, 1])
        assert clusters.labels().tolist() == expected


@pytest.mark.parametrize("name", ALTERED)
def test_altered_copies_are_near_and_other_pictures_are_not(name: str) -> None:
    scenes = [scene(seed) for seed in range(24)]
    hashes = np.stack([hashes_of(picture) for picture in scenes])
    index = HashIndex(hashes[:, 0], NEAR.max_distance)
    for number, picture in enumerate(scenes):
        copy = hashes_of(ALTERED[name](picture).convert("RGB"))
        found = {int(row) for _, places in index.near(copy) for row in places}
        # The copy's own hash may be near that of the trimmed original, as that of the copy is not.
        back = HashIndex(copy[:1], NEAR.max_distance).near(hashes.reshape(-1, WORDS))
        found |= {int(row) // HASHES for queries, _ in back for row in queries}
        assert found == {number}


def test_a_flat_picture_has_no_hash() -> None:
    assert picture_hashes(np.full((80, 90, 3), 200, np.uint8)) is None


def test_emoji_of_other_things_are_told_apart() -> None:
    corpus = pq.read_table(CORPUS, columns=["image"]).slice(0, 120)["image"].to_pylist()
    hashes = np.stack([hashes_of(Image.fromarray(decode_picture(data))) for data in corpus])
    apart = distances(hashes[:, None, 0], hashes[None, :, 0])[np.triu_indices(len(hashes), 1)]
    assert (apart <= NEAR.max_distance).mean() < 0.005


def family() -> list[bytes]:
    """Ten scenes, altered copies of three of them, and one picture twice."""
    scenes = [scene(seed) for seed in range(10)]
    copies = [jpeg(change(scenes[number])) for number in range(3) for change in ALTERED.values()]
    originals = [jpeg(picture) for picture in scenes]
    return [*originals, *copies, originals[7]]


def test_one_of_a_cluster_stays_and_the_others_name_it(tmp_path: Path) -> None:
    pairs = rows(family())
    groups = groups_of(fingerprints(tmp_path / "prints", pairs))
    found = decided(groups)
    content = {str(row["key"]): str(row["sha256"]) for row in pairs}
    for number in range(3):
        members = [number, *range(10 + 6 * number, 16 + 6 * number)]
        keys = [str(pairs[member]["key"]) for member in members]
        first = min(keys, key=content.__getitem__)
        assert found[first] == (None, None)
        assert {found[key] for key in keys if key != first} == {("near_duplicate", first)}
    twice = sorted(str(pairs[member]["key"]) for member in (7, -1))
    assert [found[key] for key in twice] == [(None, None), ("duplicate_picture", twice[0])]
    assert len(found) == 3 * 7 + 2
    assert groups.figures["near_duplicate_clusters"] == 3
    assert groups.figures["equal_pictures"] == 1


def test_decisions_do_not_depend_on_shards_or_order(tmp_path: Path) -> None:
    pairs = rows(family())
    results = []
    for number, per_shard in enumerate((3, 50)):
        order = np.random.default_rng(number).permutation(len(pairs)).tolist()
        manifest = fingerprints(tmp_path / str(number), [pairs[i] for i in order], per_shard)
        groups = groups_of(manifest)
        results.append((decided(groups), groups.figures))
    assert results[0] == results[1]


def test_a_shard_loses_what_was_decided_and_no_row_else(tmp_path: Path) -> None:
    pairs = rows([*family(), b"no picture"])
    pairs[5]["caption"] = "a dog"
    table = pa.Table.from_pylist(pairs, schema=RAW)
    prints, dropped = fingerprint_shard(table, RULES, look=True)
    assert sorted(dropped["reason"].to_pylist()) == ["not_a_picture", "short_caption"]
    manifest = write_dataset(tmp_path, FINGERPRINTS_STAGE, prints, inputs={}, rows_per_shard=100)
    decisions = groups_of(manifest).decisions["00000"]
    kept, lost = filter_shard(table, prints, dropped, decisions, validation_fraction=0.5)
    assert len(kept) + len(lost) == len(table)
    assert len(kept) == 9
    assert set(lost["detail"].to_pylist()[2:]) <= set(kept["key"].to_pylist())


def test_all_of_a_cluster_are_on_one_side_when_all_are_kept(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(family()), schema=RAW)
    prints, dropped = fingerprint_shard(table, RULES, look=True)
    manifest = write_dataset(tmp_path, FINGERPRINTS_STAGE, prints, inputs={}, rows_per_shard=100)
    decisions = groups_of(manifest, NearDuplicatesConfig(action="keep")).decisions["00000"]
    kept, lost = filter_shard(table, prints, dropped, decisions, validation_fraction=0.5)
    assert lost["reason"].to_pylist() == ["duplicate_picture"]
    side = dict(zip(kept["key"].to_pylist(), kept["split"].to_pylist(), strict=True))
    for number in range(3):
        members = [number, *range(10 + 6 * number, 16 + 6 * number)]
        assert len({side[table["key"][member].as_py()] for member in members}) == 1
    assert set(side.values()) == {"train", "validation"}


@pytest.mark.parametrize("remove", [False, True])
def test_pictures_of_an_evaluation_are_found(tmp_path: Path, remove: bool) -> None:
    pairs = rows([jpeg(scene(seed)) for seed in range(8)])
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "one.jpg").write_bytes(jpeg(ALTERED["half the size"](scene(3)), 60))
    (shown / "else.jpg").write_bytes(jpeg(scene(99)))
    manifest = fingerprints(tmp_path / "prints", pairs)
    groups = groups_of(manifest, pictures=str(shown), remove=remove)
    key = pairs[3]["key"]
    assert [(pair["key"], pair["picture"]) for pair in groups.overlap] == [(key, "one.jpg")]
    assert groups.figures["overlapping_pictures"] == 1
    expected = {key: ("overlaps_evaluation", "one.jpg")} if remove else {}
    assert decided(groups) == expected


def test_an_evaluation_can_be_a_parquet_file(tmp_path: Path) -> None:
    images = [jpeg(scene(1)), jpeg(Image.new("RGB", (64, 64)))]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    evaluation = read_evaluation(str(tmp_path / "a.parquet"))
    assert (evaluation.names, evaluation.flat) == (["row 0"], ["row 1"])
    expected = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in images))
    assert evaluation.digest == expected.hexdigest()


def test_evaluations_that_cannot_be_looked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a directory of pictures or a Parquet file"):
        read_evaluation(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="must hold pictures with contrast, got 0 without"):
        read_evaluation(str(tmp_path))
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="must have a column image, it has picture"):
        read_evaluation(str(tmp_path / "a.parquet"))
    (tmp_path / "broken.jpg").write_bytes(jpeg(scene(0))[:500])
    with pytest.raises(ValueError, match=r"picture broken.jpg is broken_picture"):
        read_evaluation(str(tmp_path))


def test_the_state_of_the_driver_is_arrays_of_few_bytes() -> None:
    index, clusters = HashIndex(random_hashes(1000), 48), Clusters(1000)
    arrays = [index.hashes, *index._order, *index._values, clusters._parent]
    assert sum(array.nbytes for array in arrays) == 1000 * (32 + 80 + 8)

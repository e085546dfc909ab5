"""Files of torch.save are read without torch.load; what a file claims is held against its size."""

import contextlib
import io
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipelines.training.torch_file import TensorView, TorchFile, read_torch_file

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(path: Path, value: Any, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def read(path: Path) -> TorchFile:
    return read_torch_file(path, classes=frozenset(), functions=frozenset())


def tensors_of(path: Path) -> dict[str, Tensor]:
    file = read(path)
    return file.load(file.value)


def rewrite(
    path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], compression: int = 0
) -> None:
    """The archive with other members, and the right checksums for them."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for changed in filter(None, (change(*member) for member in members)):
            archive.writestr(*changed)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


@FORMATS
def test_tensors_and_parameters_come_out_as_they_went_in(tmp_path: Path, legacy: bool) -> None:
    saved = {
        "w": torch.randn(3, 4, 5, 5),
        "b": nn.Parameter(torch.randn(7)),
        "frozen": nn.Parameter(torch.randn(2, 2), requires_grad=False),
        "transposed": torch.randn(6, 2).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "slice": torch.randn(4, 10)[1:3, ::2],
    }
    loaded = tensors_of(save(tmp_path / "x.pkl", saved, legacy=legacy))
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes_are_refused(tmp_path: Path, legacy: bool, dtype: torch.dtype) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3, dtype=dtype)}, legacy=legacy)
    with pytest.raises(ValueError, match=r"x\.pkl must be .* it names torch\.\w+Storage"):
        read(path)


@FORMATS
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(1).expand(3), "not positive"),
        (torch.arange(10.0).unfold(0, 3, 1), "overlap"),
        (torch.arange(20.0).as_strided((3, 3), (2, 1)), "overlap"),
        (torch.ones(2, 0), "neither a float storage nor a class"),
        (torch.ones(1, 1, 1, 1, 1), "more than four"),
    ],
)
def test_views_that_no_weight_has_are_refused(
    tmp_path: Path, legacy: bool, tensor: Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        read(save(tmp_path / "x.pkl", {"w": tensor}, legacy=legacy))


@FORMATS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, legacy: bool, value: float
) -> None:
    weights = torch.zeros(100)
    weights[57] = value
    path = save(tmp_path / "x.pkl", {"a": torch.ones(2), "w": weights}, legacy=legacy)
    with pytest.raises(ValueError, match=r"x\.pkl must hold finite weights, but w is not"):
        tensors_of(path)


@FORMATS
def test_a_storage_belongs_to_one_weight(tmp_path: Path, legacy: bool) -> None:
    both = torch.ones(10)
    path = save(tmp_path / "x.pkl", {"a": both[:5], "b": both[5:]}, legacy=legacy)
    with pytest.raises(ValueError, match="two share a storage"):
        tensors_of(path)


@FORMATS
@pytest.mark.parametrize(
    ("old", "new"),
    [
        # BININT1 3 and 5, the sizes; TUPLE2. Then strides, numel, offset.
        (b"K\x03K\x05\x86", b"K\x04K\x05\x86"),
        (b"K\x03K\x05\x86", b"K\x03J\xff\xff\xff\x7f\x86"),
        (b"K\x03K\x05\x86", b"K\x03J\xff\xff\xff\xff\x86"),
        (b"K\x03K\x05\x86", b"K\x03\x8a\x09" + b"\xff" * 8 + b"\x00\x86"),
        (b"K\x03K\x05\x86", b"K\x03G" + bytes(8) + b"\x86"),
        (b"K\x05K\x01\x86", b"K\x06K\x01\x86"),
        (b"K\x05K\x01\x86", b"K\x05\x85"),
        (b"K\x0f", b"K\x10"),
        (b"K\x0f", b"J\xff\xff\xff\x7f"),
        (b"K\x0f", b"J\xff\xff\xff\xff"),
        (b"K\x0f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
        (b"storage", b"storaga"),
        (b"QK\x00", b"QK\x01"),
        (b"QK\x00", b"QJ\xff\xff\xff\xff"),
        (b"cpu", b"cp\xff"),
    ],
)
def test_claims_that_do_not_fit_the_file_are_refused(
    tmp_path: Path, legacy: bool, old: bytes, new: bytes
) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3, 5)}, legacy=legacy)
    if legacy:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))
    else:
        rewrite(path, lambda name, data: (name, data.replace(old, new)))
    with pytest.raises(ValueError, match=r"x\.pkl must be a model that torch\.save wrote, but"):
        tensors_of(path)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x/data/1",
        "x/../../data/1",
        "x/data/../1",
        "../data/1",
        "x\\data\\1",
        "x/data/a",
        "x/constants.pkl",
        "x/code/model.py",
        "other/data/1",
        "x/data/0",
        "x/data.pkl",
    ],
)
def test_members_that_torch_does_not_write_are_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)})
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some are there already
        archive.writestr(name, b"x")
    with pytest.raises(ValueError, match="its archive has"):
        read(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)})
    rewrite(path, lambda name, data: (name, data), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is not plain"):
        read(path)


@pytest.mark.parametrize(
    ("missing", "said"),
    [("x/data.pkl", r"no data\.pkl"), ("x/data/0", "storage 0 has not the size")],
)
def test_a_missing_member_is_said(tmp_path: Path, missing: str, said: str) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)})
    rewrite(path, lambda name, data: None if name == missing else (name, data))
    with pytest.raises(ValueError, match=said):
        read(path)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)})
    rewrite(path, lambda name, data: (name, data.replace(b"little", b"big")))
    with pytest.raises(ValueError, match="not little-endian"):
        read(path)
    data = save(path, {"w": torch.ones(3)}, legacy=True).read_bytes()
    place = data.index(b"little_endian")
    path.write_bytes(data[:place] + data[place:].replace(b"\x88", b"\x89", 1))  # NEWTRUE: NEWFALSE
    with pytest.raises(ValueError, match="not little-endian"):
        read(path)


def test_a_changed_bit_in_the_weights_of_an_archive_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.full((100,), 3.0)})
    path.write_bytes(path.read_bytes().replace(b"\x00\x00\x40\x40", b"\x00\x00\x40\x41", 1))
    with pytest.raises(ValueError, match="must hold w, but its bytes do not have the checksum"):
        tensors_of(path)


def test_what_follows_the_pickle_is_refused_too(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)})
    more = pickle.dumps({}, 2)
    rewrite(path, lambda name, data: (name, data + more if name.endswith(".pkl") else data))
    with pytest.raises(ValueError, match="goes on after its end"):
        read(path)
    path.write_bytes(save(path, {"w": torch.ones(3)}, legacy=True).read_bytes() + b"x")
    with pytest.raises(ValueError, match="not the size that its storages add up to"):
        read(path)


@pytest.mark.parametrize("index", range(5))
def test_every_pickle_of_a_legacy_file_is_scanned_before_any_is_read(
    tmp_path: Path, index: int
) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)}, legacy=True)
    file = io.BytesIO(path.read_bytes())
    pickles = []
    for _ in range(5):
        start = file.tell()
        list(pickletools.genops(file))
        pickles.append(file.getvalue()[start : file.tell()])
    pickles[0] = pickle.dumps("no magic number", 2)  # would be refused if it were read first
    pickles[index] = b"\x80\x02cos\nsystem\n."
    path.write_bytes(b"".join(pickles) + file.read())
    with pytest.raises(ValueError, match=r"it names os\.system, which is no part of one"):
        read(path)


def test_an_archive_whose_directory_lies_before_its_start_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3)})
    data = path.read_bytes()
    path.write_bytes(data[:4] + data[40:])  # every offset of the directory is now too large
    with pytest.raises(ValueError, match=r"x\.pkl must be a model that torch\.save wrote"):
        read(path)


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04", b"\x80\x02.", b"GIF89a", bytes(5000)])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.pkl must be a model that torch\.save wrote"):
        read(tmp_path / "x.pkl")


@FORMATS
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "x.pkl", {"w": torch.ones(3, 5), "b": torch.ones(2)}, legacy=legacy)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(ValueError):
            tensors_of(path)


@settings(max_examples=500)
@given(st.booleans(), st.data())
def test_flipped_bits_give_an_error_or_tensors(
    room: Path, legacy: bool, data: st.DataObject
) -> None:
    path = save(room / "x.pkl", {"w": torch.ones(3, 5), "b": torch.ones(2)}, legacy=legacy)
    broken = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(broken)
    with contextlib.suppress(ValueError):
        file = read(path)
        if isinstance(file.value, dict) and all(
            isinstance(view, TensorView) for view in file.value.values()
        ):
            assert all(tensor.isfinite().all() for tensor in file.load(file.value).values())
    assert [entry.name for entry in room.iterdir()] == ["x.pkl"]

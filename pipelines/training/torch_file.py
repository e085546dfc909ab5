"""Files of torch.save, in the zip format or the one before it (torch < 1.6), without torch.load.

What the file describes is read by `restricted_pickle`; the weights are read after that, one by
one, and only float32. Nothing of what a file claims is believed before it was held against the
file's size.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.training.restricted_pickle import Global, Vocabulary, execute, scan

# The released sizes, saved by torch 2.13, take 59 kB of pickles and 100 names in the archive.
MAX_READ_BYTES = 1 << 20
ELEMENT_BYTES = 4
FLOAT_STORAGE = Global("torch", "FloatStorage")
ZIP_START = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip's member: lengths of its name and extra field
MEMBER = re.compile(
    r"(?P<root>[^/\\]+)/(?P<name>data\.pkl|data/(?P<key>[0-9]+)|version|byteorder"
    r"|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
# The three pickles before the object, torch.serialization (torch 2.13).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
LEGACY_PICKLES = 5
BROKEN = (
    *(ValueError, zipfile.BadZipFile, struct.error, EOFError),
    *(NotImplementedError, OverflowError),  # zipfile: a version or an offset that cannot be
)


@dataclass(frozen=True)
class Storage:
    """A row of `numel` floats, known by its key."""

    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * ELEMENT_BYTES


@dataclass(frozen=True)
class TensorView:
    """Where a tensor's elements lie in a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (*self.size, *self.stride)
        if any(type(n) is not int or n < 1 for n in numbers) or self.offset < 0:
            raise ValueError("it has a tensor whose sizes or strides are not positive numbers")
        if len(self.size) != len(self.stride) or len(self.size) > 4:
            raise ValueError("it has a tensor with more than four sizes, or not a stride for each")
        end = 0  # the last element of the dimensions seen so far, smallest stride first
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1 and stride <= end:
                raise ValueError("it has a tensor whose elements overlap")
            end += (size - 1) * stride
        if self.offset + end >= self.storage.numel:
            raise ValueError("it has a tensor that ends outside of its storage")


@dataclass(frozen=True)
class Place:
    """Where bytes lie in the file, and their CRC-32 if the format has one."""

    offset: int
    nbytes: int
    crc: int | None = None


@dataclass(frozen=True)
class TorchFile:
    """A saved object, its tensors as views, and where their storages lie."""

    path: Path
    value: Any
    places: Mapping[str, Place]

    def load(self, views: Mapping[str, TensorView]) -> dict[str, Tensor]:
        """The named tensors; a storage belongs to one, so that they are no larger than the file."""
        if len({view.storage.key for view in views.values()}) < len(views):
            raise ValueError(f"{self.path} must hold every weight once, but two share a storage")
        with _Careful(self.path) as file:
            return {name: self._tensor(file, name, view) for name, view in views.items()}

    def _tensor(self, file: "_Careful", name: str, view: TensorView) -> Tensor:
        try:
            data = file.bytes_at(self.places[view.storage.key])
        except ValueError as error:
            raise ValueError(f"{self.path} must hold {name}, but {error}") from None
        storage = torch.frombuffer(data, dtype=torch.float32)
        tensor = storage.as_strided(view.size, view.stride, view.offset).contiguous()
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path} must hold finite weights, but {name} is not")
        return tensor


def read_torch_file(
    path: Path, *, classes: frozenset[Global], functions: frozenset[Global]
) -> TorchFile:
    """What torch.save wrote, if it names nothing but float tensors and what is given.

    `functions` stand for values that we have no use for, and give None. Raises ValueError with the
    file's name on everything else.
    """
    vocabulary = Vocabulary(
        classes=classes,
        functions=TENSOR_FUNCTIONS | dict.fromkeys(functions, lambda _: None),
        values=frozenset({FLOAT_STORAGE}),
    )
    try:
        with _Careful(path) as file:
            start = file.read(len(ZIP_START))
            file.seek(0)
            value, places = (_read_zip if start == ZIP_START else _read_legacy)(file, vocabulary)
    except BROKEN as error:
        raise ValueError(
            f"{path} must be a model that torch.save wrote, but {error}; nothing of it was run"
        ) from None
    return TorchFile(path, value, places)


class _Careful(io.FileIO):
    """A file that gives a megabyte at most, however much is asked for, and storages in full."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        most = size if size is not None and 0 <= size <= MAX_READ_BYTES else MAX_READ_BYTES
        return super().read(most) or b""

    def bytes_at(self, place: Place) -> bytearray:
        if not 0 <= place.offset <= place.offset + place.nbytes <= self.size:
            raise ValueError("it ends too early")
        data = bytearray(place.nbytes)
        self.seek(place.offset)
        if self.readinto(data) != place.nbytes:
            raise ValueError("it ends too early")
        if place.crc is not None and zlib.crc32(data) != place.crc:
            raise ValueError("its bytes do not have the checksum that they had when written")
        return data


def _read_zip(file: _Careful, vocabulary: Vocabulary) -> tuple[Any, dict[str, Place]]:
    members = _members(file)
    if "data.pkl" not in members:
        raise ValueError("its archive has no data.pkl")
    pickled = members["data.pkl"]
    if pickled.nbytes > MAX_READ_BYTES:
        raise ValueError(f"its pickle is larger than {MAX_READ_BYTES:,} bytes")
    if "byteorder" in members and file.bytes_at(members["byteorder"])[:7] != b"little":
        raise ValueError("its numbers are not little-endian")
    storages: dict[str, Storage] = {}
    data = io.BytesIO(file.bytes_at(pickled))
    program = scan(data, vocabulary)
    if data.read(1):
        raise ValueError("its pickle goes on after its end")
    value = execute(program, vocabulary, _persistent(storages))
    places = {}
    for storage in storages.values():
        place = members.get(f"data/{storage.key}")
        if place is None or place.nbytes != storage.nbytes:
            raise ValueError(f"its storage {storage.key[:20]} has not the size that is stated")
        places[storage.key] = place
    return value, places


def _members(file: _Careful) -> dict[str, Place]:
    """Where the archive's members lie, by their names below the root directory."""
    members: dict[str, Place] = {}
    roots = set()
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            match = MEMBER.fullmatch(info.filename)
            if not match or match["root"] in (".", "..") or match["name"] in members:
                raise ValueError(f"its archive has a member {info.filename[:80]!r}")
            roots.add(match["root"])
            # Encrypted, compressed: torch.save writes neither.
            if info.flag_bits & 1 or info.compress_type or info.compress_size != info.file_size:
                raise ValueError(f"its archive's member {info.filename[:80]!r} is not plain")
            header = file.bytes_at(Place(info.header_offset, LOCAL_HEADER.size))
            if not header.startswith(ZIP_START):
                raise ValueError(f"its archive's member {info.filename[:80]!r} is not there")
            offset = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
            members[match["name"]] = Place(offset, info.file_size, info.CRC)
    if len(roots) != 1:
        raise ValueError("its archive has not one root directory")
    return members


def _read_legacy(file: _Careful, vocabulary: Vocabulary) -> tuple[Any, dict[str, Place]]:
    """Five pickles (magic number, version, machine, object, keys), then every storage's floats."""
    pickled = io.BytesIO(file.read())
    programs = [scan(pickled, vocabulary) for _ in range(LEGACY_PICKLES)]
    storages: dict[str, Storage] = {}
    magic, version, machine, value, keys = (
        execute(program, vocabulary, _persistent(storages)) for program in programs
    )
    if type(magic) is not int or (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
        raise ValueError("it does not begin as torch.save begins a file")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    if not isinstance(keys, list) or any(type(key) is not str for key in keys):
        raise ValueError("its storages have no list of names")
    if sorted(keys) != sorted(storages):
        raise ValueError("its storages are not those that its tensors use")
    places = {}
    file.seek(pickled.tell())
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storages[key].numel:
            raise ValueError(f"its storage {key[:20]} has not the size that is stated")
        places[key] = Place(file.tell(), storages[key].nbytes)
        file.seek(places[key].offset + places[key].nbytes)
    if file.tell() != file.size:
        raise ValueError("it has not the size that its storages add up to")
    return value, places


def _persistent(storages: dict[str, Storage]) -> Callable[[Any], Any]:
    """Notes every storage that a persistent id names; a class (old format) is given back."""

    def load(saved: Any) -> Any:
        match saved:
            case ("storage", Global() as kind, str() as key, str(), int() as numel) | (
                "storage",
                Global() as kind,
                str() as key,
                str(),
                int() as numel,
                None,
            ) if kind == FLOAT_STORAGE and numel > 0 and key.isascii() and key.isdigit():
                storage = storages.setdefault(key, Storage(key, numel))
                if storage.numel != numel:
                    raise ValueError(f"its storage {key[:20]} has two sizes")
                return storage
            case ("module", Global() as cls, str() | None, str() | None):  # and its source code
                return cls
        raise ValueError("it has a persistent id that is neither a float storage nor a class")

    return load


def _tensor(arguments: tuple[Any, ...]) -> TensorView:
    match arguments:
        case (Storage() as storage, int() as offset, tuple() as size, tuple() as stride, bool(), _):
            return TensorView(storage, offset, size, stride)  # without hooks
    raise ValueError("it has a tensor with arguments that torch.save does not write")


def _parameter(arguments: tuple[Any, ...]) -> TensorView:
    match arguments:
        case (TensorView() as view, bool(), _):
            return view
    raise ValueError("it has a parameter with arguments that torch.save does not write")


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if len(arguments):
        raise ValueError("it has an OrderedDict with arguments")
    return {}


def _empty_set(arguments: tuple[Any, ...]) -> frozenset[Any]:
    match arguments:
        case ([],):
            return frozenset()
    raise ValueError("it has a set that is not empty")


TENSOR_FUNCTIONS: dict[Global, Callable[[tuple[Any, ...]], Any]] = {
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("__builtin__", "set"): _empty_set,
}

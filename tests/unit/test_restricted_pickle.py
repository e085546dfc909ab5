"""Pickles are read as data: what they describe comes out, what they would run is refused."""

import contextlib
import functools
import io
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.training import restricted_pickle
from pipelines.training.restricted_pickle import Global, Instance, Vocabulary, execute, scan

VOCABULARY = Vocabulary(
    classes=frozenset({Global("house", "Room")}),
    functions={Global("house", "double"): lambda arguments: arguments * 2},
    values=frozenset({Global("house", "WOOD")}),
)
ROOM, DOUBLE, WOOD = b"chouse\nRoom\n", b"chouse\ndouble\n", b"chouse\nWOOD\n"
NEW = ROOM + b")\x81"  # NEWOBJ without arguments


def read(data: bytes) -> Any:
    """As the readers of files do it: everything is scanned first."""
    file = io.BytesIO(data)
    return execute(scan(file, VOCABULARY), VOCABULARY, lambda saved: ("persistent", saved))


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def write(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


# What each of them names first, and the pickle; all write the canary if they are run.
BITING: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "system": ("posix.system", lambda c: pickle.dumps(Call(os.system, f"touch {c}"), 2)),
    "eval": ("__builtin__.eval", lambda c: pickle.dumps(Call(eval, write(c)), 2)),
    "exec": ("__builtin__.exec", lambda c: pickle.dumps(Call(exec, write(c)), 2)),
    "getattr chain": (
        "__builtin__.getattr",
        lambda c: pickle.dumps(Call(getattr, Call(eval, write(c)), "__class__"), 2),
    ),
    "inside a list": (
        "posix.system",
        lambda c: pickle.dumps([1, {"a": (Call(os.system, f"touch {c}"),)}], 2),
    ),
    "partial": (
        "functools.partial",
        lambda c: pickle.dumps(Call(functools.partial(os.system, f"touch {c}")), 2),
    ),
    "python 2 spelling": (
        "os.system",
        lambda c: pickled(b"cos\nsystem\n" + text(f"touch {c}") + b"\x85R"),
    ),
    "before it breaks": (
        "os.system",
        lambda c: pickled(b"cos\nsystem\n" + text(f"touch {c}") + b"\x85Rcno\nsuch\n"),
    ),
}
NAMED = {
    "torch.hub.load": b"ctorch.hub\nload\n" + text("me/mine") + b"\x85R",
    "torch.load": b"ctorch\nload\n" + text("x.pkl") + b"\x85R",
    "builtins.__import__": b"cbuiltins\n__import__\n" + text("os") + b"\x85R",
    "os.system": b"c\\x6fs\nsystem\n" + text("true") + b"\x85R",  # escaped letters
    "house.Room.build": b"chouse\nRoom.build\n)R",
    "house.Window": NEW + b"}" + text("window") + b"chouse\nWindow\n)\x81sb",  # in a state
    "shutil.rmtree": b"(" + text("storage") + b"cshutil\nrmtree\ntQ",  # in a persistent id
    "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n" + ROOM + b"NN\x87R",
}
OPCODES = {
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(" + ROOM + b"o",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "STACK_GLOBAL": text("house") + text("Room") + b"\x93",
    "NEWOBJ_EX": ROOM + b")}\x92",
    "PERSID": b"Pstorage\n",
    "POP": b"NN0",
    "POP_MARK": b"N(1",
    "DUP": b"N2",
    "SHORT_BINSTRING": b"U\x02os",
    "BINSTRING": b"T\x02\x00\x00\x00os",
    "STRING": b"S'os'\n",
    "UNICODE": b"Vos\n",
    "INT": b"I1\n",
    "LONG": b"L1L\n",
    "LONG4": b"\x8b\x01\x00\x00\x00\x01",
    "GET": b"Ng0\n",
    "PUT": b"Np0\n",
    "SHORT_BINBYTES": b"C\x02os",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1) + b"x",
    "FROZENSET": b"(\x91",
    "FRAME": b"\x95" + struct.pack("<Q", 1) + b"N",
    "PROTO": b"\x80\x02N",
}
MISFITS = {
    "calls House.Room": (ROOM + b")R", "house.Room, which is no admitted function"),
    "calls a value": (WOOD + b")R", "house.WOOD, which is no admitted function"),
    "calls a text": (text("double") + b")R", "a str, which is no admitted function"),
    "calls a result": (DOUBLE + b")R)R", "a tuple, which is no admitted function"),
    "calls an object": (NEW + b")R", "a Instance, which is no admitted function"),
    "calls with a list": (DOUBLE + b"]R", "without a tuple"),
    "makes a function": (DOUBLE + b")\x81", "house.double, which is no admitted class"),
    "makes a text": (text("Room") + b")\x81", "a str, which is no admitted class"),
    "makes with arguments": (ROOM + b"N\x85\x81", "with arguments"),
    "state of a dict": (b"}}b", "the state of a dict"),
    "state of a class": (ROOM + b"}b", "the state of house.Room"),
    "state twice": (NEW + b"}b}b", "twice"),
    "state of slots": (NEW + b"}}\x86b", "something else than a dict"),
    "state None": (NEW + b"Nb", "something else than a dict"),
    "__setstate__": (NEW + b"}" + text("__setstate__") + DOUBLE + b"sb", "__setstate__"),
    "__dict__": (NEW + b"}" + text("__dict__") + b"}sb", "__dict__"),
    "__class__": (NEW + b"}" + text("__class__") + ROOM + b"sb", "__class__"),
    "item of an object": (NEW + text("a") + b"Ns", "only a dict"),
    "item of a class": (ROOM + text("a") + b"Ns", "only a dict"),
    "key of a number": (b"}K\x01Ns", "no text"),
    "key of a tuple": (b"}))\x86Ns", "no text"),
    "odd items": (b"}(" + text("a") + b"u", "keys and values"),
    "append to a tuple": (b")Na", "only a list"),
    "append to an object": (NEW + b"(Ne", "only a list"),
    "empty": (b"", "what is not there"),
    "no mark": (b"Nt", "what is not there"),
    "no arguments": (ROOM + b"\x81", "what is not there"),
    "two below a mark": (b"N(\x85", "what is not there"),
    "unwritten memo": (b"h\x07", "what is not there"),
    "leftover": (b"NN", "left over"),
    "leftover mark": (b"(N", "left over"),
}


@pytest.fixture(scope="module")
def cage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cage")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
)


@given(values)
def test_plain_values_come_out_as_they_went_in(value: Any) -> None:
    assert read(pickle.dumps(value, 2)) == value


def test_objects_calls_and_persistent_ids_come_out_as_data() -> None:
    state = b"}" + text("wall") + WOOD + b"s"
    call = DOUBLE + b"K\x07\x85R"
    room, doubled, saved = read(pickled(NEW + state + b"b" + call + text("id") + b"Q\x87"))
    assert isinstance(room, Instance)
    assert (room.cls, room.state) == (Global("house", "Room"), {"wall": Global("house", "WOOD")})
    assert doubled == (7, 7)
    assert saved == ("persistent", "id")


def test_one_object_that_is_named_twice_is_one_object() -> None:
    first, second = read(pickle.dumps((shared := [1], shared), 2))
    assert first is second


@pytest.mark.parametrize("name", BITING)
def test_the_hostile_pickles_would_bite(name: str, tmp_path: Path) -> None:
    """Without this, the tests below might pass on pickles that do nothing anyway."""
    canary = tmp_path / "canary"
    with contextlib.suppress(ImportError):  # "before it breaks" does
        pickle.loads(BITING[name][1](canary))
    assert canary.exists()


@pytest.mark.parametrize("name", BITING)
def test_a_name_that_is_not_admitted_is_refused_before_anything_runs(
    name: str, tmp_path: Path
) -> None:
    said, make = BITING[name]
    with pytest.raises(ValueError, match=f"it names {said}, which is no part of one"):
        scan(io.BytesIO(make(tmp_path / "canary")), VOCABULARY)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", NAMED)
def test_a_foreign_name_is_refused_wherever_it_stands(name: str) -> None:
    with pytest.raises(ValueError, match=f"it names {name}, which is no part of one"):
        scan(io.BytesIO(pickled(NAMED[name])), VOCABULARY)


@pytest.mark.parametrize("name", OPCODES)
def test_an_opcode_that_torch_does_not_write_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"must not hold the opcode {name}$"):
        scan(io.BytesIO(pickled(OPCODES[name])), VOCABULARY)


def test_every_opcode_of_pickle_is_admitted_or_refused_by_a_test() -> None:
    others = {"BINBYTES", "BINBYTES8", "BINUNICODE8", "SHORT_BINUNICODE", "MEMOIZE", "FLOAT"}
    others |= {"LIST", "DICT", "EMPTY_SET", "ADDITEMS", "NEXT_BUFFER", "READONLY_BUFFER"}
    every = {opcode.name for opcode in pickletools.opcodes}
    assert restricted_pickle.ADMITTED | set(OPCODES) | others == every
    assert not restricted_pickle.ADMITTED & others


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_another_protocol_is_refused(protocol: int) -> None:
    with pytest.raises(ValueError, match="must begin with protocol 2"):
        read(pickle.dumps({"a": [1]}, protocol))


@pytest.mark.parametrize("name", MISFITS)
def test_opcodes_that_do_not_fit_each_other_are_refused(name: str) -> None:
    body, said = MISFITS[name]
    with pytest.raises(ValueError, match=said):
        read(pickled(body))


def test_a_name_cannot_write_to_the_terminal() -> None:
    with pytest.raises(ValueError) as caught:
        scan(io.BytesIO(pickled(b"c\\x1b[2J\nx\n")), VOCABULARY)
    assert "\x1b" not in str(caught.value)


def test_endless_claims_are_refused_without_memory() -> None:
    """A text of 4 GB, a memo index of 4 billion, a million lists, nesting without end."""
    with pytest.raises(ValueError):
        read(pickled(b"X\xff\xff\xff\xffos"))
    assert read(pickled(b"Nr\xff\xff\xff\xff")) is None
    with pytest.raises(ValueError, match="at most 131,072 opcodes"):
        read(pickled(b"]" * 1_000_000))
    nested = read(pickled(b")" + b"\x85" * 100_000))
    assert len(nested) == 1
    with pytest.raises(ValueError, match="no text"):
        read(pickled(b"})" + b"\x85" * 100_000 + b"Ns"))
    with pytest.raises(ValueError, match="a tuple, which is no admitted function"):
        read(pickled(b")" + b"\x85" * 100_000 + b")R"))


def test_a_pickle_cut_anywhere_is_refused() -> None:
    data = pickled(NEW + b"}" + text("wall") + WOOD + b"sb" + DOUBLE + b"K\x07\x85R\x86")
    for length in range(len(data)):
        with pytest.raises(ValueError):
            read(data[:length])


@settings(max_examples=1500)
@given(st.sampled_from(sorted(BITING)), st.data())
def test_hostile_pickles_with_flipped_bits_do_nothing(
    cage: Path, name: str, data: st.DataObject
) -> None:
    broken = bytearray(BITING[name][1](cage / "canary"))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(broken) - 1))
        broken[place] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ValueError):
        read(bytes(broken))
    assert not list(cage.iterdir())

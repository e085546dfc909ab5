"""Pickles read as data: a stack machine for the opcodes of torch.save that calls nothing.

A pickle is a program. `pickle.Unpickler` with a closed `find_class` still reserves the memory that
a memo index asks for and hashes whatever stands as a key. Here an object of an admitted class is an
`Instance`, an admitted function is one of ours, and all else is refused by its name before the
first opcode takes effect. One parser (`pickletools`) feeds both the check and the machine, so that
no byte means one thing to the first and another to the second.
"""

import io
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROTOCOL = 2  # torch.serialization.DEFAULT_PROTOCOL, torch 2.13
MAX_OPCODES = 1 << 17  # the released sizes, saved by torch 2.13, have 13,200 at most
LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
ARGUMENTS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Written by the pickler of protocol 2 for the values above, objects and persistent ids.
OTHERS = ("PROTO", "STOP", "MARK", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS")
REFERENCES = ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET")
OBJECTS = ("GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID")
ADMITTED = frozenset((*LITERALS, *ARGUMENTS, *EMPTY, *TUPLES, *OTHERS, *REFERENCES, *OBJECTS))

Opcode = tuple[str, Any]


@dataclass(frozen=True)
class Global:
    """A module and a name in it, which stay names: nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """All that a pickle may name."""

    classes: frozenset[Global]
    """Classes whose objects become instances."""
    functions: Mapping[Global, Callable[[tuple[Any, ...]], Any]]
    """What stands in for a function; it is given the tuple of arguments and checks it."""
    values: frozenset[Global] = frozenset()
    """Names that may stand in a persistent id, and are never called."""

    def __contains__(self, name: Global) -> bool:
        return name in self.classes or name in self.functions or name in self.values


@dataclass(eq=False)
class Instance:
    """An object of a pickle: the name of its class, and its attributes once they were read."""

    cls: Global
    state: dict[str, Any] | None = None


def scan(file: io.BytesIO, vocabulary: Vocabulary) -> list[Opcode]:
    """The opcodes of the pickle at the file's position, all admitted; nothing is executed.

    Raises ValueError on a broken pickle, another protocol, a foreign opcode or a foreign name.
    """
    program: list[Opcode] = []
    for opcode, argument, _ in pickletools.genops(file):
        if not program and (opcode.name, argument) != ("PROTO", PROTOCOL):
            raise ValueError(f"a pickle must begin with protocol {PROTOCOL}, as torch.save writes")
        if opcode.name not in ADMITTED or (program and opcode.name == "PROTO"):
            raise ValueError(f"a pickle must not hold the opcode {opcode.name}")
        if opcode.name == "GLOBAL":
            argument = _name(str(argument))
            if argument not in vocabulary:
                raise ValueError(f"it names {_short(str(argument))}, which is no part of one")
        if len(program) == MAX_OPCODES:
            raise ValueError(f"a pickle must have at most {MAX_OPCODES:,} opcodes")
        program.append((opcode.name, argument))
    return program


def execute(
    program: Sequence[Opcode], vocabulary: Vocabulary, persistent: Callable[[Any], Any]
) -> Any:
    """The value that a scanned pickle describes; `persistent` maps a persistent id to its value.

    Raises ValueError if the opcodes do not fit each other.
    """
    machine = _Machine(vocabulary, persistent)
    try:
        for name, argument in program[:-1]:  # without STOP, which `scan` has seen
            machine.step(name, argument)
        value = machine.stack.pop()
    except (IndexError, KeyError):  # an empty stack, or a memo entry that was never written
        raise ValueError("its pickle is broken: an opcode uses what is not there") from None
    if machine.stack or machine.below:
        raise ValueError("its pickle is broken: it ends with values left over")
    return value


class _Machine:
    """Stack and memo. `below` holds the stacks under the open marks, as in the pickle module."""

    def __init__(self, vocabulary: Vocabulary, persistent: Callable[[Any], Any]) -> None:
        self.vocabulary = vocabulary
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(LITERALS[name])
        elif name in ARGUMENTS or name == "GLOBAL":
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self._put_tuple([self.stack.pop() for _ in range(TUPLES[name])][::-1])
        elif name in REFERENCES:
            self._refer(name, argument)
        elif name in OBJECTS:
            self._object(name)
        else:
            self._collect(name)

    def _collect(self, name: str) -> None:
        match name:
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                self._put_tuple(self._since_mark())
            case "APPEND":
                self._extend([self.stack.pop()])
            case "APPENDS":
                self._extend(self._since_mark())
            case "SETITEM":
                self._update([self.stack.pop(), self.stack.pop()][::-1])
            case "SETITEMS":
                self._update(self._since_mark())

    def _put_tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def _since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("its pickle is broken: only a list may be appended to")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("its pickle is broken: only a dict may be given keys and values")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # deep tuples, say, cannot be hashed safely
                raise ValueError("its pickle has a key that is no text")
            target[key] = value

    def _refer(self, name: str, index: int) -> None:
        if name.endswith("PUT"):
            self.memo[index] = self.stack[-1]
        else:
            self.stack.append(self.memo[index])

    def _object(self, name: str) -> None:
        argument = self.stack.pop()
        match name:
            case "BINPERSID":
                self.stack.append(self.persistent(argument))
            case "REDUCE":
                self.stack.append(self._call(self.stack.pop(), argument))
            case "NEWOBJ":
                self.stack.append(self._make(self.stack.pop(), argument))
            case "BUILD":
                self._build(self.stack[-1], argument)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or function not in self.vocabulary.functions:
            raise ValueError(f"it calls {_kind(function)}, which is no admitted function")
        if not isinstance(arguments, tuple):
            raise ValueError(f"it calls {function} without a tuple of arguments")
        return self.vocabulary.functions[function](arguments)

    def _make(self, cls: Any, arguments: Any) -> Instance:
        if not isinstance(cls, Global) or cls not in self.vocabulary.classes:
            raise ValueError(f"it makes an object of {_kind(cls)}, which is no admitted class")
        if not isinstance(arguments, tuple) or len(arguments):
            raise ValueError(f"it makes a {cls} with arguments")
        return Instance(cls)

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, dict) and isinstance(state, dict) and state.keys() == {"_metadata"}:
            return  # a state_dict's attribute: versions of its modules, nothing to us
        if not isinstance(target, Instance) or target.state is not None:
            raise ValueError(f"it sets the state of {_kind(target)}, or sets a state twice")
        if not isinstance(state, dict):
            raise ValueError(f"it sets the state of a {target.cls} to something else than a dict")
        dunder = [key for key in state if key.startswith("__")]
        if dunder:
            raise ValueError(f"it sets {_short(dunder[0])} of a {target.cls}")
        target.state = state


def _name(argument: str) -> Global:
    """What pickletools joins with one blank; a name that holds another blank is nobody's."""
    module, _, name = argument.partition(" ")
    return Global(module, name)


def _kind(value: Any) -> str:
    """A value in a message: its name or its type, never its contents, which may be endless."""
    return str(value) if isinstance(value, Global) else f"a {type(value).__name__}"


def _short(text: str) -> str:
    return repr(text[:80])[1:-1]  # a terminal must not obey it

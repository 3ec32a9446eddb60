"""An interpreter for the pickles in torch checkpoints that imports nothing and calls nothing.

A pickle is a program for a small stack machine, written by whoever made the file; Python's own machine runs
any function the program names. This one builds inert records (`pickle_records`) and knows the names of
`pickle_policy` alone. It reads protocols 2 to 5, the opcodes that Python and torch write for data, and counts
what it spends: opcodes, bytes, open marks and memo entries, each bounded; no recursion, linear time.

Opcodes as in CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sfumato.checkpoints.ckpt.policy import MAX_NAME, PLAIN, Forbidden, Use, judge
from sfumato.checkpoints.ckpt.records import Global, Placeholder, Table, call, create

MAX_PICKLE = 16 << 20  # bytes; Stable Diffusion 1.5 has 0.2 MiB, with its optimizer's state 1 MiB
MAX_OPCODES = 500_000  # Stable Diffusion 1.5: 34,000; SDXL with EMA and the state of its optimizer: 290,000
MAX_MEMORY = 40 << 20  # bytes of records, estimated from above
MAX_MEMO = 250_000
MAX_DEPTH = 256  # marks that are open at once
MAX_TEXT = 1 << 20  # bytes of one text or of one string of bytes
MAX_CLASSES = 1000  # different names that a file may mention
CALLING: Final = {0x69: "INST", 0x6F: "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x50: "PERSID"}

SMALL, CONTAINER, MEMO_ENTRY = 32, 150, 100  # bytes that a number, a container, an entry of the memo may take


@dataclass(frozen=True)
class Unpickled:
    """value: the top record. end: where the pickle stops. classes: names that became inert placeholders."""

    value: object
    end: int
    classes: tuple[str, ...]


def unpickle(data: bytes, persistent: Callable[[object], object], start: int = 0) -> Unpickled:
    """Read the pickle that begins at `start`; `persistent` resolves what the file refers to outside of it.

    Raises ValueError for a damaged or oversized pickle, `Forbidden` naming what must not be asked for.
    """
    machine = _Machine(data, start, persistent)
    value = machine.run()
    known = {each.name for each in machine.globals.values() if each.use is Use.MEANING} | PLAIN
    return Unpickled(
        value, machine.at, tuple(sorted({each.name for each in machine.globals.values()} - known))
    )


class _Machine:
    __slots__ = ("at", "data", "globals", "marks", "memo", "memory", "persistent", "stack")

    def __init__(self, data: bytes, start: int, persistent: Callable[[object], object]) -> None:
        self.data = data
        self.at = start
        self.persistent = persistent
        self.stack: list[object] = []
        self.marks: list[list[object]] = []  # the stacks below the open marks
        self.memo: dict[int, object] = {}
        self.memory = MAX_MEMORY
        self.globals: dict[tuple[str, str], Global] = {}

    def run(self) -> object:
        data, stop = self.data, len(self.data)
        if self.at + 2 > stop or data[self.at] != 0x80 or not 2 <= data[self.at + 1] <= 5:
            raise ValueError("it does not begin with a pickle of protocol 2 to 5")
        self.at += 2
        try:
            for _ in range(MAX_OPCODES):
                if self.at >= stop:
                    break
                opcode = data[self.at]
                self.at += 1
                if opcode == 0x2E:  # STOP
                    return self.result()
                step = _STEPS[opcode]
                if step is None:
                    raise self.unknown(opcode)
                step(self)
            else:
                raise ValueError(f"it has more than {MAX_OPCODES} opcodes")
        except IndexError:  # of the lists above: every read of the bytes goes through `take`
            raise ValueError("its pickle takes from an empty stack") from None
        raise ValueError("its pickle ends too early")

    def unknown(self, opcode: int) -> ValueError:
        if opcode in CALLING:
            return Forbidden(f"it has the opcode {CALLING[opcode]}, which makes objects as torch never does")
        return ValueError(f"its pickle has the opcode {bytes([opcode])!r}, which torch never writes")

    def result(self) -> object:
        if self.marks or len(self.stack) != 1:
            raise ValueError("its pickle leaves other than one object")
        return self.stack.pop()

    def spend(self, count: int) -> None:
        self.memory -= count
        if self.memory < 0:
            raise ValueError(f"its pickle needs more than {MAX_MEMORY >> 20} MiB of memory")

    def take(self, count: int) -> bytes:
        """The next `count` bytes; nothing is copied where there are fewer."""
        end = self.at + count
        if end > len(self.data):
            raise ValueError("its pickle ends too early")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def push(self, value: object, cost: int) -> None:
        self.spend(cost)
        self.stack.append(value)

    def items(self) -> list[object]:
        """What lies above the last mark, which is closed."""
        if not self.marks:
            raise ValueError("its pickle closes a mark that it never set")
        above, self.stack = self.stack, self.marks.pop()
        return above

    def mention(self, module: str, name: str) -> None:
        key = (module, name)
        if key not in self.globals:
            if len(self.globals) >= MAX_CLASSES:
                raise ValueError(f"it mentions more than {MAX_CLASSES} classes")
            self.globals[key] = Global(*judge(module, name))
        self.push(self.globals[key], SMALL)


def _nothing(_: object) -> None:
    """What recursive objects leave behind is dropped."""


def _mark(machine: _Machine) -> None:
    if len(machine.marks) >= MAX_DEPTH:
        raise ValueError(f"its pickle nests deeper than {MAX_DEPTH}")
    machine.spend(CONTAINER)
    machine.marks.append(machine.stack)
    machine.stack = []


def _constant(value: object) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value, SMALL)


def _natural(count: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(count), SMALL)


def _int32(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(4), "little", signed=True), SMALL)


def _long1(machine: _Machine) -> None:
    count = machine.number(1)
    machine.push(int.from_bytes(machine.take(count), "little", signed=True), SMALL + count)


def _float(machine: _Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0], SMALL)


def _content(machine: _Machine, width: int) -> bytes:
    count = machine.number(width)
    if count > MAX_TEXT:
        raise ValueError(f"its pickle has a text of {count} bytes, at most {MAX_TEXT} are read")
    return machine.take(count)


def _text(width: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        content = _content(machine, width)
        text = content.decode("utf-8")  # UnicodeDecodeError is a ValueError
        machine.push(text, 2 * SMALL + len(content) * (1 if text.isascii() else 4))

    return step


def _bytes(width: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        content = _content(machine, width)
        machine.push(content, 2 * SMALL + len(content))

    return step


def _old_text(width: int) -> Callable[[_Machine], None]:
    """Python 2's `str`: names as a rule, raw bytes in the numbers of numpy."""

    def step(machine: _Machine) -> None:
        content = _content(machine, width)
        machine.push(content.decode("ascii") if content.isascii() else content, 2 * SMALL + len(content))

    return step


def _global(machine: _Machine) -> None:
    words: list[str] = []
    for _ in range(2):
        end = machine.data.find(b"\n", machine.at, machine.at + MAX_NAME + 1)
        if end < 0:
            raise Forbidden("it mentions a name without an end")
        words.append(machine.take(end + 1 - machine.at)[:-1].decode("utf-8"))
    machine.mention(*words)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Forbidden("it mentions a name that is no text")
    machine.mention(module, name)


def _put(width: int) -> Callable[[_Machine], None]:
    return lambda machine: _remember(machine, machine.number(width))


def _remember(machine: _Machine, index: int) -> None:
    if len(machine.memo) >= MAX_MEMO:
        raise ValueError(f"its pickle remembers more than {MAX_MEMO} objects")
    machine.spend(MEMO_ENTRY)
    machine.memo[index] = machine.stack[-1]


def _get(width: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        index = machine.number(width)
        if index not in machine.memo:
            raise ValueError(f"its pickle asks for object {index}, which it never stored")
        machine.push(machine.memo[index], 8)

    return step


def _tuple(machine: _Machine) -> None:
    items = machine.items()
    machine.push(tuple(items), CONTAINER + 8 * len(items))


def _short_tuple(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise ValueError("its pickle takes from an empty stack")
        stack[-count:] = [tuple(stack[-count:])]
        machine.spend(CONTAINER)

    return step


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    _extend(machine, [value])


def _extend(machine: _Machine, values: list[object]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        machine.spend(16 * len(values))
        target += values
    elif not isinstance(target, Placeholder):
        raise ValueError("its pickle appends to something that is no list")


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _store(machine, [key, value])


def _store(machine: _Machine, items: list[object]) -> None:
    if len(items) % 2:
        raise ValueError("its pickle has a key without a value")
    target = machine.stack[-1]
    if isinstance(target, Table):
        machine.spend(80 * (len(items) // 2))
        target.pairs += zip(items[::2], items[1::2], strict=True)
    elif not isinstance(target, Placeholder):
        raise ValueError("its pickle sets entries of something that is no dictionary")


def _frozenset(machine: _Machine) -> None:
    machine.items()
    machine.push(Placeholder("builtins.frozenset"), CONTAINER)


def _new_object(machine: _Machine) -> None:
    arguments, cls = machine.stack.pop(), machine.stack.pop()
    machine.push(create(cls, arguments), 2 * CONTAINER)


def _new_object_with_keywords(machine: _Machine) -> None:
    machine.stack.pop()
    _new_object(machine)


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.push(call(function, arguments, machine.spend), 2 * CONTAINER)


def _build(machine: _Machine) -> None:
    """The state of an object; that of tables and tensors (`_metadata` of a state dict) is of no use here."""
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Placeholder):
        target.state = state
    elif isinstance(target, Global):
        raise Forbidden(f"it changes {target.name} itself")
    elif isinstance(target, (list, tuple, str, bytes, int, float, bool)) or target is None:
        raise Forbidden("it gives a state to something that has none")


def _persistent(machine: _Machine) -> None:
    machine.push(machine.persistent(machine.stack.pop()), CONTAINER)


def _frame(machine: _Machine) -> None:
    if machine.number(8) > len(machine.data) - machine.at:
        raise ValueError("its pickle has a frame beyond its end")


_NAMED: Final[dict[bytes, Callable[[_Machine], None]]] = {
    b"(": _mark,
    b"N": _constant(None), b"\x88": _constant(True), b"\x89": _constant(False),
    b"K": _natural(1), b"M": _natural(2), b"J": _int32, b"\x8a": _long1, b"G": _float,
    b"\x8c": _text(1), b"X": _text(4), b"\x8d": _text(8), b"U": _old_text(1), b"T": _old_text(4),
    b"C": _bytes(1), b"B": _bytes(4), b"\x8e": _bytes(8), b"\x96": _bytes(8),
    b")": lambda machine: machine.push((), 8), b"]": lambda machine: machine.push([], CONTAINER),
    b"}": lambda machine: machine.push(Table(), 2 * CONTAINER),
    b"\x8f": lambda machine: machine.push(Placeholder("builtins.set"), CONTAINER),
    b"0": lambda machine: _nothing(machine.stack.pop()), b"1": lambda machine: _nothing(machine.items()),
    b"t": _tuple, b"\x85": _short_tuple(1), b"\x86": _short_tuple(2), b"\x87": _short_tuple(3),
    b"a": _append, b"e": lambda machine: _extend(machine, machine.items()),
    b"s": _set_item, b"u": lambda machine: _store(machine, machine.items()),
    b"\x90": lambda machine: _extend(machine, machine.items()), b"\x91": _frozenset,
    b"c": _global, b"\x93": _stack_global, b"R": _reduce, b"b": _build,
    b"\x81": _new_object, b"\x92": _new_object_with_keywords,
    b"q": _put(1), b"r": _put(4), b"\x94": lambda machine: _remember(machine, len(machine.memo)),
    b"h": _get(1), b"j": _get(4), b"Q": _persistent, b"\x95": _frame,
}  # fmt: skip
_STEPS: Final = [_NAMED.get(bytes([opcode])) for opcode in range(256)]

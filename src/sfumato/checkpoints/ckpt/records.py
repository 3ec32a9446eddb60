"""What a pickle turns into here: plain records without behaviour, for tensors, tables and everything else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from sfumato.checkpoints.ckpt.policy import MAPPINGS, Forbidden, Use


class Global:
    """A name that the file mentions; it stands for nothing that could be run."""

    __slots__ = ("name", "use")

    def __init__(self, name: str, use: Use) -> None:
        self.name = name
        self.use = use


class Table:
    """A dictionary as the list of its pairs: keys are never hashed, so none can be made to collide."""

    __slots__ = ("pairs",)

    def __init__(self) -> None:
        self.pairs: list[tuple[object, object]] = []

    def named(self) -> dict[str, object]:
        """The entries under texts, in order. ValueError where one text is there twice."""
        found: dict[str, object] = {}
        for key, value in self.pairs:
            if isinstance(key, str):
                if key in found:
                    raise ValueError(f"it has two entries of the name {key[:80]!r}")
                found[key] = value
        return found


class Placeholder:
    """An object of any class: its name, and the state that the file gave it."""

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: object = None) -> None:
        self.name = name
        self.state = state


class Storage:
    """Numbers somewhere in the file. `start`: the first element of it that counts, in a legacy view."""

    __slots__ = ("dtype", "elements", "key", "start", "total")

    def __init__(self, key: str, dtype: str, total: int, start: int, elements: int) -> None:
        self.key = key
        self.dtype = dtype
        self.total = total
        self.start = start
        self.elements = elements


class TensorRecord:
    """A tensor as the file describes it, unchecked. dtype: what the bytes of an untyped storage mean."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(
        self, storage: object, offset: object, shape: object, stride: object, dtype: object = None
    ) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.stride = stride
        self.dtype = dtype


Arguments = tuple[object, ...]
Spend = Callable[[int], object]


def create(cls: object, arguments: object) -> object:
    """A new object of a class, as `cls.__new__` would make it."""
    if not isinstance(cls, Global) or not isinstance(arguments, tuple):
        raise Forbidden("it makes an object of something that is no class")
    if cls.name in MAPPINGS:
        return Table()
    if cls.use not in (Use.CALL, Use.CREATE):
        raise Forbidden(f"it makes an object of {cls.name}, which is no class")
    return Placeholder(cls.name)


def call(function: object, arguments: object, spend: Spend) -> object:
    """The record of what a call would give; `Forbidden` for whatever is not in the tables.

    spend: told the bytes that a call takes, where they depend on its arguments; raises where it is too much.
    """
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Forbidden("it calls something that is no name")
    if function.use is Use.MEANING:
        return _CALLS[function.name](function.name, arguments, spend)
    if function.use is not Use.CALL:
        raise Forbidden(f"it calls {function.name}, which is not known here")
    return Placeholder(function.name)


def _mapping(name: str, arguments: Arguments, spend: Spend) -> object:
    table = Table()
    first = arguments[0] if arguments else None
    if isinstance(first, list):  # Python 2 wrote OrderedDict([[key, value], ...])
        spend(64 * len(first))
        for pair in first:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError(f"{name} is given something other than pairs")
            table.pairs.append((pair[0], pair[1]))
    return table


def _tensor(name: str, arguments: Arguments, spend: Spend) -> object:
    if len(arguments) < 4:
        raise ValueError(f"{name} has {len(arguments)} arguments, at least 4 are needed")
    dtype = arguments[6] if name.endswith("_v3") and len(arguments) > 6 else None
    return TensorRecord(*arguments[:4], dtype)


def _parameter(name: str, arguments: Arguments, spend: Spend) -> object:
    if not arguments:
        raise ValueError(f"{name} has no arguments")
    return arguments[0]


def _typed(name: str, arguments: Arguments, spend: Spend) -> object:
    """A tensor of a subclass, or with attributes: (function, class, its arguments, state)."""
    match arguments:
        case (Global(name=inner) as function, Global(), tuple() as given, _) if inner.startswith(
            "torch._utils."
        ):
            return call(function, given, spend)
    raise Forbidden(f"it calls {name} with other things than a tensor")


def _reconstructor(name: str, arguments: Arguments, spend: Spend) -> object:
    """Protocol 1's (class, base, state of the base)."""
    if len(arguments) != 3:
        raise ValueError(f"{name} has {len(arguments)} arguments instead of 3")
    return create(arguments[0], ())


def _size(name: str, arguments: Arguments, spend: Spend) -> object:
    return arguments[0] if arguments and isinstance(arguments[0], tuple) else ()


def _encode(name: str, arguments: Arguments, spend: Spend) -> object:
    """Bytes, as protocol 2 spells them."""
    match arguments:
        case (str() as text, "latin1" | "latin-1"):
            spend(len(text))
            return text.encode("latin-1")  # UnicodeEncodeError is a ValueError
    raise Forbidden(f"it calls {name} for something other than bytes")


class Kind:
    """A numpy dtype by its code, "f8" for example."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code


def _kind(name: str, arguments: Arguments, spend: Spend) -> object:
    return Kind(arguments[0] if arguments and isinstance(arguments[0], str) else "")


NUMBERS: Final = {  # numpy's code of a dtype -> struct's
    "f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "b1": "<?",
    "u8": "<Q", "u4": "<I", "u2": "<H", "u1": "<B",
}  # fmt: skip


def _scalar(name: str, arguments: Arguments, spend: Spend) -> object:
    match arguments:
        case (Kind(code=code), bytes() as content) if code in NUMBERS:
            return (
                struct.unpack(NUMBERS[code], content)[0]
                if struct.calcsize(NUMBERS[code]) == len(content)
                else None
            )
    return Placeholder(name)


_CALLS: Final[dict[str, Callable[[str, Arguments, Spend], object]]] = {
    **dict.fromkeys(MAPPINGS, _mapping),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": _size,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "numpy.dtype": _kind,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}

"""Checkpoints of `torch.save` (.ckpt, .pt, .bin) as sources of tensors; nothing in them is ever run.

`unpickle` reads the description, this file checks what it says against the bytes that are there, and picks
the state dict out of what training programs put around it. SECURITY.md says what is promised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sfumato.checkpoints.ckpt.archive import read_archive
from sfumato.checkpoints.ckpt.legacy import extents, read_legacy
from sfumato.checkpoints.ckpt.policy import STORAGES, Forbidden
from sfumato.checkpoints.ckpt.records import Global, Placeholder, Storage, Table, TensorRecord
from sfumato.checkpoints.ckpt.tensors import Bytes, Extent, View, storage_dtype, view
from sfumato.checkpoints.ckpt.unpickle import Unpickled, unpickle
from sfumato.checkpoints.source import Source

MAX_TENSORS = 20_000  # SDXL with EMA: 6,000
MAX_EMPTY = 1000  # tensors without an element: they cost a file nothing and us memory
MAX_ENTRIES = 60_000  # entries of the tables that are walked through
MAX_NESTING = 32
MAX_NAME = 1024  # characters of a tensor's name
MAX_NAMES = 4 << 20  # characters of all names, dotted
MAX_TEXTS = 10_000  # scalars that become metadata
SLACK = 1 << 20  # bytes that views may have in common in a file of any size
PARAMETERS = "_parameters"  # where torch.nn.ParameterDict keeps them (textual inversions)
SETTINGS = ("hyper_parameters", "hparams")  # Lightning's, whose scalars tell of the model


@dataclass
class _Storages:
    """What the pickle says of its storages, by key; one key must mean one storage."""

    by_key: dict[str, Storage] = field(default_factory=dict)

    def persistent(self, identifier: object) -> object:
        """The record of ("storage", type, key, device, elements[, view]) or ("module", class, file, text)."""
        match identifier:
            case ("module", Global() as cls, *_):
                return cls
            case ("storage", Global(name=kind), str() as key, _, int() as total):
                place = (0, total)
            case ("storage", Global(name=kind), str() as key, _, int() as total, None):
                place = (0, total)
            case (
                "storage",
                Global(name=kind),
                str() as key,
                _,
                int() as total,
                (_, int() as start, int() as size),
            ):
                place = (start, size)
            case _:
                raise Forbidden("it refers to something outside of it that is no storage")
        name = kind.removeprefix("torch.storage.").removeprefix("torch.")
        if name not in STORAGES or not 0 <= place[0] <= place[0] + place[1] <= total:
            raise ValueError(f"its storage {key[:80]!r} is of no kind or size that exists")
        storage = Storage(key, STORAGES[name], total, *place)
        first = self.by_key.setdefault(key, storage)
        if (first.dtype, first.total) != (storage.dtype, storage.total):
            raise ValueError(f"its storage {key[:80]!r} is described in two ways")
        return storage


def open_zip(path: Path, file: BinaryIO, size: int, *, mmap: bool) -> Source:
    """A checkpoint in torch's zip container. ValueError where it is damaged, `Forbidden` where hostile."""
    archive = read_archive(file, size)
    storages = _Storages()
    unpickled = unpickle(archive.pickle, storages.persistent)
    found: dict[str, Extent] = {}
    for key, storage in storages.by_key.items():
        dtype, entry = storage_dtype(storage), archive.storages.get(key)
        if entry is None or entry.size != storage.total * dtype.itemsize:
            have = "none" if entry is None else f"{entry.size} bytes"
            raise ValueError(f"its storage {key[:80]!r} should have {storage.total} {dtype} and has {have}")
        found[key] = Extent(dtype, entry.start, storage.total)
    return _source(path, "ckpt, zip", unpickled, found, Bytes(path, file, mmap), size)


def open_legacy(path: Path, file: BinaryIO, size: int, *, mmap: bool) -> Source:
    """A checkpoint in the container before torch 1.6; errors as `open_zip`."""
    storages = _Storages()
    legacy = read_legacy(file, size, storages.persistent)
    found = extents(file, size, legacy, storages.by_key.values())
    return _source(path, "ckpt, legacy", legacy.data, found, Bytes(path, file, mmap), size)


def _source(
    path: Path, kind: str, unpickled: Unpickled, found: Mapping[str, Extent], content: Bytes, size: int
) -> Source:
    chosen = _choose(unpickled.value)
    views: dict[str, View] = {}
    logical = empty = 0
    for name, record in chosen.tensors.items():
        try:
            views[name] = view(record, _extent(record, found))
        except ValueError as error:
            raise ValueError(f"its tensor {name} {error}") from None
        logical += views[name].elements * views[name].info.dtype.itemsize
        empty += not views[name].elements
    if logical > 2 * size + SLACK:
        raise ValueError(f"its tensors would have {logical} bytes, twice what the file has")
    if empty > MAX_EMPTY:
        raise ValueError(f"it has {empty} tensors without an element, at most {MAX_EMPTY} are read")
    notes = list(chosen.notes)
    if unpickled.classes:
        notes.append(f"classes that are not run, kept as placeholders: {', '.join(unpickled.classes)}")
    infos = {name: each.info for name, each in views.items()}
    return Source(
        path, kind, infos, lambda name: content.tensor(name, views[name]), chosen.metadata, tuple(notes)
    )


def _extent(record: TensorRecord, found: Mapping[str, Extent]) -> Extent:
    storage = record.storage
    if not isinstance(storage, Storage):
        raise ValueError("has no storage")
    whole = found[storage.key]
    return Extent(whole.dtype, whole.start + storage.start * whole.dtype.itemsize, storage.elements)


@dataclass
class _Chosen:
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _choose(top: object) -> _Chosen:
    """The tensors of the state dict, the scalars around it, and notes on what is left out."""
    table = _table(top)
    if table is None:
        what = f"an object of {top.name}" if isinstance(top, Placeholder) else "no table of tensors"
        raise ValueError(
            f"it holds {what}, not a state dict; save one with torch.save(model.state_dict(), ...)"
        )
    chosen, entries = _Chosen(), table.named()
    state = _table(entries.get("state_dict"))
    left_out: list[str] = []
    for name, value in _walk(table if state is None else state):
        if isinstance(value, TensorRecord):
            chosen.tensors[_fit(name, chosen)] = value
        elif not _tell(chosen, name, value):
            left_out.append(name)
    if state is not None:
        for name, value in entries.items():
            if value is not entries["state_dict"] and not _tell(chosen, name, value):
                left_out.append(name)
            if name in SETTINGS and (settings := _table(value)) is not None:
                for key, setting in settings.named().items():
                    _tell(chosen, f"{name}.{key}", setting)
    if not chosen.tensors:
        raise ValueError("it holds no tensors")
    if left_out:
        more = f" and {len(left_out) - 20} more" if len(left_out) > 20 else ""
        chosen.notes.append(f"left out, no tensors: {', '.join(map(_shown, left_out[:20]))}{more}")
    return chosen


def _shown(name: str) -> str:
    """A name as it may be printed: a terminal obeys control characters."""
    return name[:80] if name.isprintable() else ascii(name[:80])


def _table(value: object) -> Table | None:
    """A table, or the one inside a torch.nn.ParameterDict."""
    if isinstance(value, Placeholder) and isinstance(value.state, Table):
        value = next((inner for key, inner in value.state.pairs if key == PARAMETERS), None)
    if not isinstance(value, Table):
        return None
    if len(value.pairs) > MAX_ENTRIES:
        raise ValueError(f"it has a table of {len(value.pairs)} entries, at most {MAX_ENTRIES} are read")
    return value


def _walk(top: Table) -> Iterator[tuple[str, object]]:
    """(dotted name, what is no table) of nested tables, without recursion; tables may contain themselves."""
    waiting: list[tuple[str, int, object]] = [("", 0, top)]
    seen = letters = 0
    while waiting:
        prefix, depth, value = waiting.pop()
        table = _table(value)
        if table is None:
            yield prefix, value
            continue
        seen += len(table.pairs)
        if depth > MAX_NESTING or seen > MAX_ENTRIES:
            raise ValueError(
                f"its tables nest deeper than {MAX_NESTING}, or have more than {MAX_ENTRIES} entries"
            )
        entries = table.named()
        dotted = prefix + "." if prefix else ""
        for key, inner in reversed(entries.items()):
            letters += len(dotted) + len(key)
            if letters > MAX_NAMES:
                raise ValueError(f"its names have more than {MAX_NAMES} letters together")
            waiting.append((dotted + key, depth + 1, inner))
        if len(entries) < len(table.pairs):
            yield dotted + "*", None


def _fit(name: str, chosen: _Chosen) -> str:
    """`name` as the name of one more tensor; ValueError where that cannot be."""
    if name in chosen.tensors:
        raise ValueError(f"it has two tensors of the name {name[:80]!r}")
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(
            f"it has a tensor of the name {name[:80]!r}, which holds control characters or is too long"
        )
    if len(chosen.tensors) >= MAX_TENSORS:
        raise ValueError(f"it has more than {MAX_TENSORS} tensors")
    return name


def _tell(chosen: _Chosen, name: str, value: object) -> bool:
    """Take a scalar into the metadata, as far as there is room; False for what is none."""
    if not isinstance(value, (str, int, float)):
        return False
    if len(chosen.metadata) < MAX_TEXTS and 0 < len(name) <= MAX_NAME and name.isprintable():
        chosen.metadata[name] = str(value)
    return True

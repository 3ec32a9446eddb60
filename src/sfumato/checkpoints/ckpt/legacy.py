"""The container of `torch.save` before version 1.6: five pickles, then the numbers of each storage."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Final

from sfumato.checkpoints.ckpt.archive import read_at
from sfumato.checkpoints.ckpt.records import Storage, Table
from sfumato.checkpoints.ckpt.tensors import Extent, storage_dtype
from sfumato.checkpoints.ckpt.unpickle import MAX_PICKLE, Unpickled, unpickle

MAGIC: Final = 0x1950A86A20F9469CFC6C  # torch/serialization.py
PROTOCOL: Final = 1001
HEAD = 4096  # bytes; magic, protocol and the table of sizes have 120
MAX_STORAGES = 20_000


@dataclass(frozen=True)
class Legacy:
    """What the pickles say, and where the storages begin."""

    data: Unpickled
    keys: tuple[str, ...]
    start: int


def read_legacy(file: BinaryIO, file_size: int, persistent: object) -> Legacy:
    """Read the five pickles. ValueError where they are none of torch's, `Forbidden` as `unpickle`."""
    assert callable(persistent)
    head = read_at(file, 0, min(HEAD, file_size))
    magic = unpickle(head, _nothing)
    if type(magic.value) is not int or magic.value != MAGIC:
        raise ValueError("it is a pickle that torch.save did not write; only files of tensors can be read")
    protocol = unpickle(head, _nothing, magic.end)
    if type(protocol.value) is not int or protocol.value != PROTOCOL:
        raise ValueError("it has another version of torch's format than 1001")
    system = unpickle(head, _nothing, protocol.end)
    if not isinstance(system.value, Table) or system.value.named().get("little_endian") is not True:
        raise ValueError("its numbers are not in little-endian order")
    data = unpickle(read_at(file, system.end, min(MAX_PICKLE, file_size - system.end)), persistent)
    start = system.end + data.end
    listed = unpickle(read_at(file, start, min(MAX_PICKLE, file_size - start)), _nothing)
    keys = listed.value
    if (
        not isinstance(keys, list)
        or len(keys) > MAX_STORAGES
        or not all(isinstance(key, str) for key in keys)
    ):
        raise ValueError(f"it does not list its storages by at most {MAX_STORAGES} names")
    return Legacy(data, tuple(keys), start + listed.end)


def _nothing(_: object) -> object:
    raise ValueError("it refers to a storage outside of its data")


def extents(file: BinaryIO, file_size: int, legacy: Legacy, storages: Iterable[Storage]) -> dict[str, Extent]:
    """Storage key -> where its numbers lie. ValueError where counts and file differ."""
    wanted = {storage.key: storage for storage in storages}
    if len(set(legacy.keys)) != len(legacy.keys) or wanted.keys() != set(legacy.keys):
        raise ValueError("its list of storages is not that of its tensors")
    found: dict[str, Extent] = {}
    at = legacy.start
    for key in legacy.keys:
        storage = wanted[key]
        if at + 8 > file_size:
            raise ValueError(f"it ends before storage {key[:80]!r}")
        (elements,) = struct.unpack("<q", read_at(file, at, 8))
        if elements != storage.total:
            raise ValueError(f"storage {key[:80]!r} has {elements} elements, its tensors say {storage.total}")
        dtype = storage_dtype(storage)
        found[key] = Extent(dtype, at + 8, elements)
        at += 8 + elements * dtype.itemsize
        if at > file_size:
            raise ValueError(f"storage {key[:80]!r} would have {elements} elements, which the file has not")
    if at != file_size:
        raise ValueError(f"it has {file_size - at} bytes after its last storage")
    return found

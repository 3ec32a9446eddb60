"""Rows of tensors computed once and kept in memory-mapped files of weights, part by part."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.errors import CheckpointError, ResourceError
from sfumato.training.data import WHOLE, Share

PART_BYTES = 256 << 20
POLL = 0.5  # seconds between two looks for the parts of other processes
PATIENCE = 12 * 3600  # seconds without a new part after which they are given up


Columns = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape of one row and number format."""


class Part(NamedTuple):
    """Rows that share a file, by their numbers."""

    rows: Sequence[int]
    columns: Columns

    def described(self) -> str:
        """All of it, as a text that differs where anything does."""
        columns = {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.columns.items()}
        return json.dumps([list(self.rows), columns], sort_keys=True)


Make = Callable[[Part], Mapping[str, Tensor]]


def planned(rows: Sequence[int], columns: Columns, multiple: int = 1) -> list[Part]:
    """Parts of about 256 MB of rows with these columns; all but the last have a multiple of rows."""
    row_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in columns.values())
    count = max(1, PART_BYTES // max(1, row_bytes) // multiple) * multiple
    return [Part(rows[start : start + count], columns) for start in range(0, len(rows), count)]


def columns_of(path: Path, key: str) -> Columns | None:
    """The columns of the kept cache of this key; None where there is none."""
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError:
        return None
    columns = {name: (tuple(value.shape[1:]), value.dtype) for name, value in tensors.items()}
    count = {len(value) for value in tensors.values() if value.ndim}
    if len(count) != 1 or metadata.get("key") != _key(key, Part(range(count.pop()), columns)):
        return None
    return columns


def filled(
    path: Path, key: str, parts: Sequence[Part], make: Make, share: Share = WHOLE
) -> list[dict[str, Tensor]]:
    """The tensors (rows, ...) of every part, memory-mapped, made where they are not kept yet.

    The first part is the file `path`, the others stand beside it with a number. Each is written whole or not
    at all, so work that was killed goes on with the part it was at. key: changes with whatever the values
    hang on. share: of several processes with the same folder each makes its parts and waits for the rest.
    Raises `ResourceError` for a full disk, and if the other processes make nothing for twelve hours.
    """
    wanted = [_key(key, part) for part in parts]
    found: dict[int, dict[str, Tensor]] = {}
    for number in range(share.rank, len(parts), share.world):
        place = part_path(path, number)
        kept = _kept(place, wanted[number], parts[number])
        if kept is None:
            place.unlink(missing_ok=True)  # others wait for a file of this key, and space is needed
            write_tensors(place, make(parts[number]), {"key": wanted[number]})
            kept = read_tensors(place)[0]
        found[number] = kept
    _awaited(path, parts, wanted, found)
    if share.rank == 0:
        _remove_beyond(path, len(parts))
    return [found[number] for number in range(len(parts))]


def part_path(path: Path, number: int) -> Path:
    """The file of a part: `latents.safetensors`, `latents-00001.safetensors`, ..."""
    return path if number == 0 else path.with_stem(f"{path.stem}-{number:05d}")


def _key(key: str, part: Part) -> str:
    return hashlib.sha256(f"{key} {part.described()}".encode()).hexdigest()


def _kept(path: Path, key: str, part: Part) -> dict[str, Tensor] | None:
    """The tensors of a file of this key; None where there is none, or a damaged or another one."""
    if not path.exists():
        return None
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError:
        return None  # it costs nothing but time to make again
    shapes = {name: ((len(part.rows), *shape), dtype) for name, (shape, dtype) in part.columns.items()}
    whole = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()} == shapes
    return tensors if whole and metadata.get("key") == key else None


def _awaited(
    path: Path, parts: Sequence[Part], wanted: Sequence[str], found: dict[int, dict[str, Tensor]]
) -> None:
    """Fill `found` with the parts that other processes make."""
    since = time.monotonic()
    while missing := [number for number in range(len(parts)) if number not in found]:
        for number in missing:
            kept = _kept(part_path(path, number), wanted[number], parts[number])
            if kept is not None:
                found[number] = kept
                since = time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise ResourceError(
                f"{part_path(path, missing[0])} was not made by the process it belongs to",
                "Every process of a run needs the same `out` folder.",
            )
        if len(found) < len(parts):
            time.sleep(POLL)


def _remove_beyond(path: Path, count: int) -> None:
    """Delete parts of a longer cache that stood here."""
    for old in path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"):
        number = old.stem.removeprefix(f"{path.stem}-")
        if number.isdigit() and len(number) == 5 and int(number) >= count:
            old.unlink(missing_ok=True)

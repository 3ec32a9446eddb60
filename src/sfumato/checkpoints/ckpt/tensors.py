"""Tensors of a checkpoint as views into a file: checked against their storage first, read when asked for."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sfumato.checkpoints.ckpt.policy import DTYPES
from sfumato.checkpoints.ckpt.records import Global, Storage, TensorRecord
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import CheckpointError

MAX_RANK = 8
MAX_SIDES = 2**40  # product of a shape's sides other than 0: no tensor that anybody has is larger


@dataclass(frozen=True)
class Extent:
    """A storage: `elements` numbers of `dtype` from byte `start` of the file on."""

    dtype: torch.dtype
    start: int
    elements: int


@dataclass(frozen=True)
class View:
    """A tensor inside the file: `span` elements at byte `start`, seen through shape and stride."""

    info: TensorInfo
    stride: tuple[int, ...]
    start: int
    span: int

    @property
    def elements(self) -> int:
        return prod(self.info.shape)


def view(record: TensorRecord, extent: Extent) -> View:
    """The view that a record describes; ValueError where it leaves its storage, or holds more than that."""
    shape, stride = _sides(record.shape, "shape"), _sides(record.stride, "stride")
    (offset,) = _sides((record.offset,), "offset")
    dtype, total = extent.dtype, extent.elements
    if record.dtype is not None:
        dtype = _dtype(record.dtype)
        total = extent.elements * extent.dtype.itemsize // dtype.itemsize
    if len(shape) != len(stride):
        raise ValueError(f"has {len(shape)} sides and {len(stride)} strides")
    if prod(side for side in shape if side) > MAX_SIDES:
        raise ValueError("has a shape that no file could hold")
    elements = prod(shape)
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if elements and last >= total:
        raise ValueError(f"reaches to element {last} of a storage of {total}")
    if elements > total:
        raise ValueError(f"would have {elements} elements out of a storage of {total}")
    start, span = (
        (extent.start + offset * dtype.itemsize, last + 1 - offset) if elements else (extent.start, 0)
    )
    return View(TensorInfo(dtype, shape), stride, start, span)


def _sides(values: object, what: str) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > MAX_RANK:
        raise ValueError(f"has a {what} that is no list of at most {MAX_RANK} numbers")
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"has a {what} with something other than numbers from 0 up")
    return tuple(values)


def _dtype(value: object) -> torch.dtype:
    name = value.name.removeprefix("torch.") if isinstance(value, Global) else ""
    if name not in DTYPES:
        raise ValueError("has a number format that is not known here")
    return getattr(torch, name)


def storage_dtype(storage: Storage) -> torch.dtype:
    """torch's name for the elements of a storage."""
    return getattr(torch, storage.dtype)


class Bytes:
    """The bytes of a file that was opened and checked: mapped, or read again piece by piece."""

    def __init__(self, path: Path, file: BinaryIO, mapped: bool) -> None:
        self.path = path
        self.identity = _identity(file)
        # private: what is written to a tensor reaches no disk
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None

    def tensor(self, name: str, where: View) -> Tensor:
        """The tensor of a view; `CheckpointError` where the file changed since it was opened."""
        dtype, shape = where.info.dtype, where.info.shape
        if not where.span:
            return torch.empty(shape, dtype=dtype)
        size = where.span * dtype.itemsize
        if self.map is None:
            flat = self._read(name, where.start, size).view(dtype)
        elif where.start % dtype.itemsize:  # legacy files align nothing, torch's kernels expect it
            flat = (
                torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=where.start)
                .clone()
                .view(dtype)
            )
        else:
            flat = torch.frombuffer(self.map, dtype=dtype, count=where.span, offset=where.start)
        return flat.as_strided(shape, where.stride)

    def _read(self, name: str, start: int, count: int) -> Tensor:
        content = torch.empty(count, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                if _identity(file) != self.identity:
                    raise CheckpointError(
                        f"{self.path} changed since it was opened, {name} cannot be read", "Open it again."
                    )
                os.lseek(file.fileno(), start, os.SEEK_SET)
                left = memoryview(content.numpy()).cast("B")  # type: ignore[arg-type]
                while left and (got := file.readinto(left)):
                    left = left[got:]
        except OSError as error:
            cause = error.strerror or error
            raise CheckpointError(f"cannot read {name} in {self.path}: {cause}", "Check the disk.") from error
        if left:
            raise CheckpointError(f"{self.path} ends inside {name}", "Download or copy it again.")
        return content


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

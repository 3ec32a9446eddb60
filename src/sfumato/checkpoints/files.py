"""Safetensors files: opened after their sizes are checked, written so that a crash leaves the old file whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import CheckpointError, ResourceError

MAX_HEADER = 100 << 20  # bytes; the format's own limit


def _check(path: Path) -> None:
    """Refuse what is no whole safetensors file before it is mapped: a file cut short kills a process that maps it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a safetensors file, or is cut short", "Download or copy it again."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(
            f"cannot open {path}: {error.strerror}", "Check the path and its permissions."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header is damaged", "Get it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is no table", "Get it again.")
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise CheckpointError(
            f"{path} is {size} bytes long, its header describes another length", "Get it again."
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> memory-mapped tensor, metadata) of a safetensors file; `CheckpointError` where it is damaged."""
    _check(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}", "Download or copy it again.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone; no tensor is read."""
    _check(path)
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's disk errors while writing `path` into one that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"cannot write {path}: {cause}", "Check free space and permissions, or choose another folder."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, rename it; on any failure the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors are copied to contiguous CPU memory first."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, temporary, {"format": "pt", **metadata}))

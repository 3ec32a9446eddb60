"""Safetensors files: opened once their sizes are checked, written so that a crash spares the old one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import CheckpointError, ResourceError

MAX_HEADER = 16 << 20  # bytes; the format's 100 MiB fill gigabytes once parsed, Stable Diffusion has 0.2 MiB
MAX_TENSORS = 50_000
MAX_RANK = 8


def _check(path: Path) -> None:
    """Refuse what is no whole safetensors file before it is mapped: reading past its end would kill us."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder or a device")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"its header would be {length} bytes long, at most {MAX_HEADER} are read")
            size = 8 + length + _data_size(json.loads(file.read(length)))
        if size != status.st_size:
            raise ValueError(f"it has {status.st_size} bytes and its header describes {size}")
    except OSError as error:
        cause = error.strerror or error
        raise CheckpointError(
            f"cannot open {path}: {cause}", "Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}", "Download or copy it again."
        ) from error


def _data_size(header: Any) -> int:
    """Bytes of all tensors together; ValueError for a header of another form."""
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError(f"its header is no table of at most {MAX_TENSORS} tensors")
    end = 0
    for name, entry in header.items():
        match entry:
            case {"shape": [*sides], "data_offsets": [int(), int(last)]} if len(sides) <= MAX_RANK:
                end = max(end, last)
            case _ if name != "__metadata__":
                raise ValueError(f"its header does not say where {name[:80]!r} lies")
    return end


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> memory-mapped tensor, metadata) of a safetensors file; `CheckpointError` if it is damaged."""
    _check(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's own are RuntimeErrors
        raise CheckpointError(f"{path} is damaged: {error}", "Download or copy it again.") from error


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
    """Let `write` fill a temporary file beside `path`, sync it, rename it; until then the old file stays.

    Raises `ResourceError` for a full disk or a place that cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # the umask decides; files of safetensors are private
            write(temporary)
            temporary.chmod(mode)
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
    """Write a safetensors file atomically; tensors are copied to contiguous CPU memory first.

    With one key of metadata at most, equal contents give equal bytes; the library shuffles several.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, temporary, dict(metadata) or {"format": "pt"}))

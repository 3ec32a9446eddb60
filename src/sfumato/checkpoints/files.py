"""Files of weights: opened once their sizes are checked, written so that a crash spares the old one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.checkpoints.ckpt.policy import Forbidden
from sfumato.checkpoints.ckpt.sources import MAX_EMPTY, MAX_NAME, MAX_TENSORS, open_legacy, open_zip
from sfumato.checkpoints.ckpt.tensors import MAX_RANK, MAX_SIDES, Bytes, View
from sfumato.checkpoints.source import Source, TensorInfo
from sfumato.errors import CheckpointError, NumericalError, ResourceError, UnsafeCheckpointError

__all__ = [
    "MAX_HEADER", "MAX_TENSORS", "converted", "disk_errors", "open_file", "read_tensors", "sha256", "sync",
    "write_atomically", "write_tensors",
]  # fmt: skip

MAX_HEADER = 16 << 20  # bytes; the format's 100 MiB fill gigabytes once parsed, Stable Diffusion has 0.2 MiB
MAX_WIDE = 4 << 20  # bytes of a header beyond ASCII: one rare letter makes every letter four bytes wide
MAX_NESTED, MAX_COMMAS = 200_000, 800_000  # brackets or colons, and commas, in a header, texts included
SIGNATURE = 512  # bytes that tell the format
STRANGERS: Final = (  # (what people get instead of weights, where its sign is, the sign in lower case)
    ("a web page: the download failed", 0, b"<!doctype html"),
    ("a web page: the download failed", 0, b"<html"),
    ("a pointer of git-lfs: the weights themselves were not fetched", 0, b"version https://git-lfs"),
    ("a tar archive, which torch wrote before 0.1.11: save it again with a newer torch", 257, b"ustar"),
    ("an empty zip archive", 0, b"pk\5\6"),
    ("compressed: unpack it first", 0, b"\x1f\x8b"),
    ("compressed: unpack it first", 0, b"7z\xbc\xaf"),
    ("compressed: unpack it first", 0, b"rar!"),
    ("a GGUF file, which is quantised for other programs", 0, b"gguf"),
    ("an HDF5 file of Keras", 0, b"\x89hdf"),
    ("a picture", 0, b"\x89png"),
)
DTYPES: Final = {  # safetensors' names of what torch has
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def open_file(path: Path, *, mmap: bool = True) -> Source:
    """Open a file of weights, whatever its format, which its first bytes tell; no tensor is read yet.

    mmap: map the tensors instead of copying them when they are read. A mapped file that is cut off under us
    kills the process, so servers copy. Raises `CheckpointError` naming the file and the cause,
    `UnsafeCheckpointError` where a pickle asks for code; neither costs in proportion to what a file claims.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is a folder or a device")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _opener(file.read(SIGNATURE))(path, file, size, mmap=mmap)
    except Forbidden as error:
        raise UnsafeCheckpointError(
            f"{path} is not safe: {error}",
            "Nothing was run. Get the weights as safetensors, from a source you trust.",
        ) from error
    except OSError as error:
        cause = error.strerror or error
        raise CheckpointError(
            f"cannot open {path}: {cause}", "Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole file of weights: {error}", "Download or copy it again."
        ) from error


def _opener(first: bytes) -> Callable[..., Source]:
    if first.startswith(b"PK\3\4"):
        return open_zip
    if first[4:9] == b"\0\0\0\0{":  # asked first: a header of 640 bytes begins as a pickle does
        return _open_safetensors
    if first[:1] == b"\x80" and b"\2" <= first[1:2] <= b"\5":
        return open_legacy
    if first[8:9] == b"{":
        return _open_safetensors
    if not first:
        raise ValueError("it is empty")
    for what, at, signature in STRANGERS:
        if first[at : at + len(signature)].lower() == signature:
            raise ValueError(f"it is {what}")
    raise ValueError("its first bytes are neither those of safetensors nor of a torch checkpoint")


def _open_safetensors(path: Path, file: BinaryIO, size: int, *, mmap: bool) -> Source:
    table, metadata = _header(file, size)
    infos = {name: each.info for name, each in table.items()}
    if not mmap:
        content = Bytes(path, file, mapped=False)
        return Source(path, "safetensors", infos, lambda name: content.tensor(name, table[name]), metadata)
    handle = safe_open(path, framework="pt")

    def read(name: str) -> Tensor:
        try:
            tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:  # torch's own are RuntimeErrors
            raise CheckpointError(
                f"{path} is damaged at {name}: {error}", "Download or copy it again."
            ) from error
        if TensorInfo(tensor.dtype, tuple(tensor.shape)) != infos[name]:
            raise CheckpointError(
                f"{path} changed since it was opened, {name} cannot be read", "Open it again."
            )
        # torch's kernels expect alignment, which writers of this format mostly keep but need not
        return tensor.clone() if tensor.data_ptr() % tensor.dtype.itemsize else tensor

    return Source(path, "safetensors", infos, read, metadata)


def _header(file: BinaryIO, size: int) -> tuple[dict[str, View], dict[str, str]]:
    """(name -> where it lies, metadata), every byte accounted for; ValueError for anything else."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header would be {length} bytes long, at most {MAX_HEADER} are read")
    if 8 + length > size:
        raise ValueError(f"its header would be {length} bytes long, the file has {size}")
    text = file.read(length)
    if len(text) > MAX_WIDE and not text.isascii():
        raise ValueError(f"its header of {length} bytes is not plain ASCII")
    nested = max(text.count(b"[") + text.count(b"{"), text.count(b":"))
    if nested > MAX_NESTED or text.count(b",") > MAX_COMMAS:
        raise ValueError("its header has far more lists or entries than tensors")
    header = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # as the format's own reader has it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header)} tensors, at most {MAX_TENSORS} are read")
    return _placed(header, 8 + length, size), metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has one name twice")
    return found


def _placed(header: dict[str, Any], start: int, size: int) -> dict[str, View]:
    """Check that the tensors follow each other from `start` to the file's end, without hole or overlap."""
    described: list[tuple[int, int, str, TensorInfo]] = []
    empty = 0
    for name, entry in header.items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ValueError(f"the name {name[:80]!r} in its header has control characters or is too long")
        match entry:
            case {"dtype": str() as kind, "shape": [*sides], "data_offsets": [begin, end]} if (
                kind in DTYPES and len(sides) <= MAX_RANK and all(map(_natural, (*sides, begin, end)))
            ):
                info = TensorInfo(DTYPES[kind], tuple(sides))
            case _:
                raise ValueError(f"its header does not say where and what {name!r} is")
        if prod(filter(None, sides)) > MAX_SIDES or end - begin != prod(sides) * info.dtype.itemsize:
            raise ValueError(f"{name!r} is {kind} of shape {sides} in {end - begin} bytes")
        empty += begin == end
        described.append((begin, end, name, info))
    if empty > MAX_EMPTY:
        raise ValueError(f"it has {empty} tensors without an element, at most {MAX_EMPTY} are read")
    at, views = 0, {}
    for begin, end, name, info in sorted(described, key=lambda each: each[:2]):
        if begin != at:
            raise ValueError(f"{name!r} begins at {begin}, the tensor before it ends at {at}")
        views[name] = View(info, _contiguous(info.shape), start + begin, prod(info.shape))
        at = end
    if start + at != size:
        raise ValueError(f"it has {size} bytes and its header describes {start + at}")
    return {name: views[name] for name in header}


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a bool is an int to Python


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[place + 1 :]) for place in range(len(shape)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> memory-mapped tensor, metadata) of a file of weights; errors as `open_file`."""
    source = open_file(path)
    return {name: source.tensor(name) for name in source.infos}, dict(source.metadata)


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


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors to be written, in `dtype`; `NumericalError` for the first that is not finite in it."""
    found = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(
                f"{name} is not finite as {dtype}; nothing was written",
                "Training diverged, or the value is too large for this number format.",
            )
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors are copied to contiguous CPU memory first.

    With one key of metadata at most, equal contents give equal bytes; the library shuffles several.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, temporary, dict(metadata) or {"format": "pt"}))

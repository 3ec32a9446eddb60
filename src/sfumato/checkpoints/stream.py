"""Writing a safetensors file tensor by tensor: its memory is one tensor, however large the file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.files import write_atomically
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import ResourceError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
ALIGNMENT = 8  # of the header's length, and so of the widest numbers behind it
RESERVE = 16 << 20  # bytes that stay free beside a written file


def write_stream(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the tensors of `infos`, each asked of `read` once and let go, into one file, atomically.

    Equal contents give equal bytes. Wide numbers come first, then names in order, so that each lies aligned.
    Raises `ResourceError` before anything is written where the disk has no room.
    """
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        info = infos[name]
        end = offset + math.prod(info.shape) * info.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    check_space(path, 8 + len(text) + offset)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                tensor = read(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (infos[name].dtype, infos[name].shape), name
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    write_atomically(path, write)


def check_space(path: Path, size: int) -> None:
    """`ResourceError` where `size` bytes at `path` would not fit onto its disk."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size + RESERVE > free:
        raise ResourceError(
            f"{path} takes {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free",
            "Free some space, or write to another disk.",
        )

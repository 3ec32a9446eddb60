"""A file of weights as names, shapes and a way to read one tensor, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor, without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """An opened file of weights; nothing of its tensors has been read yet.

    format: in words ("safetensors", "ckpt, zip", "ckpt, legacy"). infos: what lies in it, by the names of the
    file. read: one tensor by name, memory-mapped where the format allows it. metadata: the file's own texts.
    notes: what a reader should be told, such as the classes that became inert placeholders.
    """

    path: Path
    format: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name; `CheckpointError` where the file has none."""
        if name not in self.infos:
            raise CheckpointError(f"{self.path} has no tensor {name!r}", "Get the file again.")
        return self.read(name)

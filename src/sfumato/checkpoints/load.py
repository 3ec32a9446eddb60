"""From anything that holds a model to its networks, each of them loaded when it is first used."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.build import assign, build, check_fit, copy_into
from sfumato.checkpoints.detect.families import family_of
from sfumato.checkpoints.detect.plan import explain_unknown
from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.metadata import METADATA_KEY
from sfumato.checkpoints.open import open_anything
from sfumato.checkpoints.opened import Opened, Part
from sfumato.checkpoints.probe import probe_prediction
from sfumato.checkpoints.report import report
from sfumato.checkpoints.source import Source
from sfumato.errors import CheckpointError
from sfumato.families import AUTOENCODERS
from sfumato.presets import ModelConfig

__all__ = ["METADATA_KEY", "ModelFile", "check_fit", "copy_into", "load_file", "open_model"]

DIGESTED = 256 << 20  # bytes of a file that is hashed without being asked: under a second of sha256


class Modules(Mapping[str, nn.Module]):
    """The networks of a model, each in evaluation mode, built and given its weights when first asked for.

    Weights of the wanted number format stay where they lie in the mapped file; others are converted. Asking
    raises `CheckpointError`, naming file and tensor, for weights that are not finite.
    """

    def __init__(self, opened: Opened, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self._opened, self._dtype, self._device = opened, dtype, device
        self._loaded: dict[str, nn.Module] = {}
        self._lock = threading.RLock()
        self._empty = {name: empty(name, part) for name, part in opened.parts.items() if _may_fail(opened)}

    def __getitem__(self, part: str) -> nn.Module:
        with self._lock:
            if part not in self._loaded:
                each = self._opened.parts[part]
                module = self._empty.pop(part, None) or empty(part, each)
                self._loaded[part] = load_part(module, each, self._dtype, self._device)
            return self._loaded[part]

    def __contains__(self, part: object) -> bool:
        return part in self._opened.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.parts)

    def __len__(self) -> int:
        return len(self._opened.parts)


def _may_fail(opened: Opened) -> bool:
    """Whether a network may turn out not to build, which is to be told at once.

    Options that were read from shapes always build, and so do those of released models; what else a
    description asks for may not.
    """
    described = METADATA_KEY in opened.metadata or opened.layout == "diffusers"
    unet, autoencoder = opened.config.unet, opened.config.autoencoder
    released = (unet is None or family_of(unet) is not None) and (
        autoencoder is None or autoencoder in AUTOENCODERS.values()
    )
    return described and not released


@dataclass(frozen=True)
class ModelFile:
    """A model that can be used: its configuration, its networks, and what is known of where it came from."""

    config: ModelConfig
    modules: Mapping[str, nn.Module]
    opened: Opened

    @cached_property
    def digest(self) -> str | None:
        """Hex sha256 of the model's file; None where there are several, or more than 256 MB to hash."""
        files = self.opened.files
        small = len(files) == 1 and files[0].stat().st_size <= DIGESTED
        return self.identity if small else None

    @cached_property
    def identity(self) -> str:
        """Hex sha256 of the model's file, or of the sums of its files; reads them all, three seconds a GB."""
        return identity(self.opened.files)

    @property
    def report(self) -> dict[str, Any]:
        """What `sfumato inspect` tells of it, as JSON values."""
        return report(self.opened)

    def module(self, part: str) -> nn.Module:
        """One of the networks; `CheckpointError` where the model lacks it."""
        if part not in self.modules:
            raise CheckpointError(
                f"the model {self.config.name!r} has no {part}, only {', '.join(self.modules)}",
                "Give another model.",
            )
        return self.modules[part]


def identity(files: Sequence[Path]) -> str:
    """Hex sha256 of a file, or of the sums of several."""
    sums = [sha256(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def open_model(
    source: str | Path,
    *,
    vae: str | Path | None = None,
    prediction: str | None = None,
    ema: bool = False,
    offline: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    vocab: str | Path | None = None,
    mmap: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> ModelFile:
    """A model from a file of any format, a diffusers folder, a component alone, or a name on the hub.

    Names and shapes of all tensors are checked now, their values when a network is first asked for. dtype
    and device: what the networks are converted and moved to, None for what the file has. mmap: whether
    weights stay in the mapped file; one that is cut off while it is mapped ends the process, so that servers
    copy (False). The other options are those of `sfumato.load`. Raises `CheckpointError`.
    """
    described = partial(
        open_anything, source, vae=vae, ema=ema, offline=offline, revision=revision, variant=variant,
        vocab=vocab, mmap=mmap,
    )  # fmt: skip
    opened = described(prediction=prediction)
    check_parts(opened)
    modules = Modules(opened, dtype, device)
    if opened.uncertain:
        found, evidence = probe_prediction(modules["unet"])
        # What goes with the answer, such as the size of pictures, is described anew.
        opened = dataclasses.replace(described(prediction=found), evidence=evidence, uncertain=False)
    return ModelFile(opened.config, modules, opened)


def load_file(path: Path, dtype: torch.dtype | None = None) -> ModelFile:
    """`open_model` of a path, as training recipes give it. `dtype` None keeps the file's own."""
    return open_model(path, dtype=dtype)


def check_parts(opened: Opened) -> None:
    """`CheckpointError` where the files hold what no part takes and no rule knows."""
    if opened.unknown:
        raise explain_unknown(opened.unknown, opened.place, opened.parts)


def empty(name: str, part: Part) -> nn.Module:
    """The network of a part, of shapes without values."""
    return build(name, part.config, limit=len(part.mapping))


def load_part(
    module: nn.Module, part: Part, dtype: torch.dtype | None, device: torch.device | None
) -> nn.Module:
    """Give a network without values its tensors, which are read and checked here; returns it."""
    tensors: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}  # what the last pair was made of: q, k and v may lie in one tensor
    for pair in part.mapping:
        read = {key: read[key] if key in read else part.source.tensor(key) for key in pair.foreign}
        tensor = pair.transform.to_native(list(read.values()))
        ready = tensor.to(device=device, dtype=dtype)
        if not is_finite(ready):
            cause = f"too large for {ready.dtype}" if is_finite(tensor) else "not finite"
            raise CheckpointError(
                f"{part.source.path}: {', '.join(pair.foreign)} holds values that are {cause}",
                "Ask for a wider --dtype." if is_finite(tensor) else "The file is damaged. Get it again.",
            )
        tensors[pair.native] = ready
    assign(module, tensors, str(part.source.path))
    return module


def read_finite(
    source: Source, name: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tensor of a file of ours; `CheckpointError` for one that holds an infinity or no number."""
    tensor = source.tensor(name).to(device=device, dtype=dtype)
    if not is_finite(tensor):
        raise CheckpointError(
            f"{source.path}: {name} holds values that are not finite", "The file is damaged. Get it again."
        )
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite: their sum tells, and only an odd one is looked into."""
    if tensor.dtype.itemsize == 1:  # torch knows no sum of 8-bit floats
        tensor = tensor.float()
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())

"""The start noise that a request gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.files import read_tensors
from sfumato.diffusion.noise import ImageNoise
from sfumato.errors import InputError
from sfumato.request import Request


def start_noise(request: Request, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor | None:
    """The given start noise, or that of the first seed for all; None lets every picture have its own."""
    given = request.start_noise
    if given is None:
        own = ImageNoise(seeds[:1], shape, device=torch.device("cpu"))
        return own.initial() if request.shared_start else None
    noise = read_noise(given) if isinstance(given, Path) else torch.as_tensor(given)
    if not bool(torch.isfinite(noise).all()):
        raise InputError(
            "the start noise holds values that are not finite", "Give normally distributed noise."
        )
    return noise[:1] if request.shared_start and noise.ndim > len(shape) else noise


def read_noise(path: Path) -> Tensor:
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
        if len(tensors) != 1:
            raise InputError(
                f"{path} holds {len(tensors)} tensors", "Give a file with the start noise alone."
            )
        return next(iter(tensors.values()))
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise InputError(
            f"the start noise {path} cannot be read: {error}", "Give a .npy or .safetensors file."
        ) from error

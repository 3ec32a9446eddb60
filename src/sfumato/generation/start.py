"""The noise of a request: that of its start, and that of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.files import read_tensors
from sfumato.diffusion.brownian import BrownianNoise
from sfumato.diffusion.noise import ImageNoise, NoiseConfig
from sfumato.errors import InputError
from sfumato.model import StableDiffusion
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


def noise_config(model: StableDiffusion, request: Request) -> NoiseConfig:
    """Which noise the seeds of a request stand for; `InputError` for what does not fit together."""
    resize = None
    if request.seed_resize_width is not None or request.seed_resize_height is not None:
        height, width = (
            request.seed_resize_height or request.height,
            request.seed_resize_width or request.width,
        )
        assert height is not None and width is not None
        resize = model.latent_shape(height, width)[1:]
    return NoiseConfig(
        source=request.noise_source,
        eta_seed_delta=request.eta_seed_delta,
        variation_seed=request.variation_seed,
        variation_strength=request.variation_strength,
        seed_resize=resize,
    )


def brownian(
    model: StableDiffusion,
    seeds: Sequence[int],
    shape: Sequence[int],
    sigmas: Sequence[float],
    config: NoiseConfig,
) -> BrownianNoise:
    """The noise of SDE samplers, in the schedule's range: runs of other numbers of steps share its paths."""
    low = min(model.schedule.sigma_min, *(sigma for sigma in sigmas if sigma > 0))
    high = max(model.schedule.sigma_max, *sigmas)
    own = [(seed + config.eta_seed_delta) % 2**64 for seed in seeds]
    return BrownianNoise(own, shape, low=low, high=high, device=model.device)

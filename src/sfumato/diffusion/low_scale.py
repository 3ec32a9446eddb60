"""The small picture that latent upscalers enlarge, noised as in training (Ho et al. 2022, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError

# Stable Diffusion's x4 upscaler: x4-upscaling.yaml, low_scale_config.
NOISE = ScheduleConfig(beta_start=0.0001, beta_end=0.02)
MAX_NOISE_LEVEL = 350


def low_scale(pictures: Tensor, level: int, noise: Tensor) -> Conditioning:
    """The conditions of an upscaler that is told how noisy its picture is: `concat` and `vector`.

    pictures: (b, 3, h, w) in -1..1, whose own size is that of the sample's latents. level: 0 for a clean
    picture to 350; 20 is usual, more lets the network invent more. noise: like pictures, standard normal; the
    same for all branches of guidance. Raises InputError for another level or size.
    """
    if not 0 <= level <= MAX_NOISE_LEVEL:
        raise InputError(f"the noise level is {level}; it must be 0 to {MAX_NOISE_LEVEL}")
    if noise.shape != pictures.shape:
        raise InputError(
            f"the noise has shape {tuple(noise.shape)}, the pictures have {tuple(pictures.shape)}"
        )
    levels = torch.full((pictures.shape[0],), level, device=pictures.device)
    return Conditioning(concat=Schedule(NOISE).add_noise(pictures, noise, levels), vector=levels)

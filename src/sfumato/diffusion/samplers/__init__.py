"""Samplers as generator functions over noise levels, one row each in `SAMPLERS`.

All work in variance-exploding coordinates, x = x0 + sigma * noise, on a denoiser D(x, sigma) -> x0.
"""

from __future__ import annotations

from sfumato import errors
from sfumato.diffusion.samplers.base import Noise, Sampler, Step
from sfumato.diffusion.samplers.first_order import ddim, ddpm, euler, euler_a, posterior, transition
from sfumato.diffusion.samplers.multistep import dpmpp_2m
from sfumato.diffusion.samplers.runge_kutta import heun

__all__ = ["SAMPLERS", "Noise", "Sampler", "Step", "ddpm", "posterior", "sampler", "transition"]

HO = "Ho et al. 2020"
SONG = "Song et al. 2021"
KARRAS = "Karras et al. 2022"
LU = "Lu et al. 2022b"

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, 1, 1, True, "trailing", "DDPM", HO),
    "ddim": Sampler(ddim, 1, 1, False, "leading", "DDIM", SONG),
    "euler": Sampler(euler, 1, 1, False, "uniform", "Euler", KARRAS),
    "euler_a": Sampler(euler_a, 1, 1, True, "uniform", "Euler a", SONG),
    "heun": Sampler(heun, 2, 2, False, "uniform", "Heun", KARRAS),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, 1, False, "karras", "DPM++ 2M", LU),
}


def sampler(name: str) -> Sampler:
    """The row of `SAMPLERS` with that name; `InputError` with the nearest name where there is none."""
    if name not in SAMPLERS:
        raise errors.InputError(f"there is no sampler {name!r}", errors.nearest(name, SAMPLERS))
    return SAMPLERS[name]

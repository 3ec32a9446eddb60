"""Samplers as generator functions over noise levels, one row each in `SAMPLERS`.

All work in variance-exploding coordinates, x = x0 + sigma * noise, on a denoiser D(x, sigma) -> x0.
"""

from __future__ import annotations

from sfumato import errors
from sfumato.diffusion.samplers.base import Noise, Sampler, Step
from sfumato.diffusion.samplers.cfg_pp import dpmpp_2m_cfg_pp, euler_a_cfg_pp, euler_cfg_pp
from sfumato.diffusion.samplers.distilled import lcm, tcd
from sfumato.diffusion.samplers.dpm_solver import dpm_adaptive, dpm_fast
from sfumato.diffusion.samplers.first_order import ddim, ddpm, euler, euler_a, posterior, transition
from sfumato.diffusion.samplers.inversion import ddim_inversion
from sfumato.diffusion.samplers.multistep import deis, dpmpp_2m, ipndm, lms, plms
from sfumato.diffusion.samplers.restart import restart
from sfumato.diffusion.samplers.runge_kutta import dpm2, dpm2_a, dpmpp_2s_a, heun
from sfumato.diffusion.samplers.sde import dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, dpmpp_sde
from sfumato.diffusion.samplers.unipc import unipc

__all__ = [
    "INVERSIONS",
    "SAMPLERS",
    "Noise",
    "Sampler",
    "Step",
    "ddpm",
    "posterior",
    "sampler",
    "transition",
]

CHUNG = "Chung et al. 2024"
CROWSON = "Crowson 2022"  # k-diffusion
HO = "Ho et al. 2020"
KARRAS = "Karras et al. 2022"
LIU = "Liu et al. 2022"
LU_A = "Lu et al. 2022a"  # DPM-Solver
LU_B = "Lu et al. 2022b"  # DPM-Solver++
SONG = "Song et al. 2021"
ZHANG = "Zhang and Chen 2023"

# order, evaluations, stochastic, spacing, title, paper
SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, 1, 1, False, "uniform", "Euler", KARRAS),
    "euler_a": Sampler(euler_a, 1, 1, True, "uniform", "Euler a", SONG),
    "heun": Sampler(heun, 2, 2, False, "uniform", "Heun", KARRAS),
    "lms": Sampler(lms, 4, 1, False, "uniform", "LMS", CROWSON),
    "dpm2": Sampler(dpm2, 2, 2, False, "karras", "DPM2", LU_A, discard_penultimate=True),
    "dpm2_a": Sampler(dpm2_a, 2, 2, True, "karras", "DPM2 a", LU_A, discard_penultimate=True),
    "dpm_fast": Sampler(dpm_fast, 3, 1, False, "uniform", "DPM fast", LU_A, ends_only=True),
    "dpm_adaptive": Sampler(
        dpm_adaptive, 3, 3, False, "uniform", "DPM adaptive", LU_A, noise="brownian", ends_only=True
    ),
    "dpmpp_2s_a": Sampler(dpmpp_2s_a, 2, 2, True, "karras", "DPM++ 2S a", LU_B),
    "dpmpp_sde": Sampler(dpmpp_sde, 2, 2, True, "karras", "DPM++ SDE", LU_B, noise="brownian"),
    "dpmpp_2m": Sampler(dpmpp_2m, 2, 1, False, "karras", "DPM++ 2M", LU_B),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, 2, 1, True, "exponential", "DPM++ 2M SDE", LU_B, noise="brownian"),
    "dpmpp_2m_sde_heun": Sampler(
        dpmpp_2m_sde_heun, 2, 1, True, "exponential", "DPM++ 2M SDE Heun", LU_B, noise="brownian"
    ),
    "dpmpp_3m_sde": Sampler(
        dpmpp_3m_sde,
        3,
        1,
        True,
        "exponential",
        "DPM++ 3M SDE",
        CROWSON,
        noise="brownian",
        discard_penultimate=True,
    ),
    "ddim": Sampler(ddim, 1, 1, False, "leading", "DDIM", SONG),
    "ddpm": Sampler(ddpm, 1, 1, True, "trailing", "DDPM", HO),
    "plms": Sampler(plms, 2, 1, False, "leading", "PLMS", LIU),
    "unipc": Sampler(unipc, 2, 1, False, "uniform", "UniPC", "Zhao et al. 2023"),
    "deis": Sampler(deis, 3, 1, False, "uniform", "DEIS", ZHANG),
    "ipndm": Sampler(ipndm, 2, 1, False, "uniform", "iPNDM", ZHANG),
    "ipndm_v": Sampler(lms, 4, 1, False, "uniform", "iPNDM_v", ZHANG),
    "restart": Sampler(restart, 2, 2, True, "karras", "Restart", "Xu et al. 2023"),
    "lcm": Sampler(lcm, 1, 1, True, "lcm", "LCM", "Luo et al. 2023"),
    "tcd": Sampler(tcd, 1, 1, True, "lcm", "TCD", "Zheng et al. 2024"),
    "euler_cfg_pp": Sampler(euler_cfg_pp, 1, 1, False, "uniform", "Euler CFG++", CHUNG, guidance=0.6),
    "euler_a_cfg_pp": Sampler(euler_a_cfg_pp, 1, 1, True, "uniform", "Euler a CFG++", CHUNG, guidance=0.6),
    "dpmpp_2m_cfg_pp": Sampler(dpmpp_2m_cfg_pp, 2, 1, False, "karras", "DPM++ 2M CFG++", CHUNG, guidance=0.6),
    "ddim_cfg_pp": Sampler(euler_cfg_pp, 1, 1, False, "leading", "DDIM CFG++", CHUNG, guidance=0.6),
}

INVERSIONS: dict[str, Sampler] = {
    "ddim_inversion": Sampler(ddim_inversion, 1, 1, False, "leading", "DDIM inversion", SONG),
}
"""What leads from a picture to noise: called like a sampler, with steps from the end of `sigmas` upwards."""


def sampler(name: str) -> Sampler:
    """The row of `SAMPLERS` with that name; `InputError` with the nearest name where there is none."""
    if name not in SAMPLERS:
        raise errors.InputError(f"there is no sampler {name!r}", errors.nearest(name, SAMPLERS))
    return SAMPLERS[name]

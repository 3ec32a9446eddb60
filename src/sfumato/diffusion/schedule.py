"""Noise schedules and the map between timestep and noise level (Ho et al. 2020; Nichol and Dhariwal 2021).

Networks live in variance-preserving coordinates, x = sqrt(abar) * x0 + sqrt(1 - abar) * noise; samplers
live in variance-exploding ones, x / sqrt(abar) = x0 + sigma * noise with sigma^2 = (1 - abar) / abar.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sfumato import errors

KINDS = ("scaled_linear", "linear", "sigmoid", "cosine", "betas")
ALIASES = {"squaredcos_cap_v2": "cosine"}  # other tools' names -> ours
TERMINAL_ABAR = 2.0**-24  # in place of the 0 of Lin et al. 2024, so that sigma stays finite: sigma_max = 4096
COSINE_OFFSET = 0.008  # Nichol and Dhariwal 2021, eq. 17
COSINE_BETA_MAX = 0.999  # Nichol and Dhariwal 2021, below eq. 17
SIGMOID_REACH = 6.0  # Xu et al. 2022 (GeoDiff): beta follows the logistic function between -6 and 6


@dataclass(frozen=True)
class ScheduleConfig:
    """How much noise each timestep holds; the defaults are Stable Diffusion 1's.

    kind: "scaled_linear" (linear in sqrt(beta): LDM calls it "linear"), "linear" (linear in beta: DDPM's, LDM
    calls it "sqrt_linear"), "sigmoid" (beta_start + (beta_end - beta_start) / (1 + exp(-u)), u evenly from -6
    to 6), "cosine" (Nichol and Dhariwal's squared cosine, "squaredcos_cap_v2" to diffusers; reads no beta_*),
    or "betas" (the given values, one per timestep).
    zero_terminal_snr: rescale so that the last timestep is pure noise (Lin et al. 2024, algorithm 1).
    """

    kind: str = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float = 0.00085  # Stable Diffusion v1-inference.yaml, linear_start
    beta_end: float = 0.012  # Stable Diffusion v1-inference.yaml, linear_end
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", ALIASES.get(self.kind, self.kind))
        if self.kind not in KINDS:
            hint = errors.nearest(self.kind, KINDS)
            raise errors.InputError(f"there is no schedule kind {self.kind!r}", hint)
        if self.num_timesteps < 2:
            raise errors.InputError(f"num_timesteps is {self.num_timesteps}; a schedule has at least 2")
        if (self.kind == "betas") != (self.betas is not None):
            raise errors.InputError("`betas` and kind='betas' go together", "Give both or neither.")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))  # JSON and TOML give a list
            if len(self.betas) != self.num_timesteps:
                raise errors.InputError(
                    f"{len(self.betas)} betas were given for num_timesteps={self.num_timesteps}",
                    f"Set num_timesteps={len(self.betas)}.",
                )


class Schedule:
    """The numbers of a `ScheduleConfig` in float64: index t = 0 ... num_timesteps - 1, noise growing with t.

    betas, alphas, alphas_cumprod (abar), sigmas: float64 CPU tensors (num_timesteps,).
    `InputError` where a beta is not inside (0, 1) or a noise level does not grow.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        betas = _betas(config)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise errors.InputError(
                f"betas run from {float(betas.min()):g} to {float(betas.max()):g}; allowed is inside (0, 1)",
                "Check beta_start, beta_end or the given betas.",
            )
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.zero_terminal_snr:
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
            previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
            betas = 1 - alphas_cumprod / previous
        self.config = config
        self.num_timesteps = config.num_timesteps
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = alphas_cumprod
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self._sigmas: list[float] = self.sigmas.tolist()
        if any(low >= high for low, high in pairwise(self._sigmas)):
            raise errors.InputError(
                "the noise levels of this schedule do not grow with every timestep",
                "Use larger betas, or leave out zero_terminal_snr.",
            )

    @property
    def sigma_min(self) -> float:
        """The noise level of timestep 0."""
        return self._sigmas[0]

    @property
    def sigma_max(self) -> float:
        """The noise level of the last timestep."""
        return self._sigmas[-1]

    def sigma(self, t: float) -> float:
        """The noise level at a timestep: linear in log sigma between whole ones, clamped to the schedule."""
        t = min(max(t, 0.0), self.num_timesteps - 1.0)
        low = int(t)
        weight = t - low
        if weight == 0:
            return self._sigmas[low]
        return math.exp((1 - weight) * math.log(self._sigmas[low]) + weight * math.log(self._sigmas[low + 1]))

    def timestep(self, sigma: float) -> float:
        """The timestep of a noise level, the inverse of `sigma`: exact on whole ones, clamped likewise."""
        if sigma <= self.sigma_min:
            return 0.0
        if sigma >= self.sigma_max:
            return self.num_timesteps - 1.0
        high = bisect.bisect_right(self._sigmas, sigma)
        low_log, high_log = math.log(self._sigmas[high - 1]), math.log(self._sigmas[high])
        return high - 1 + (math.log(sigma) - low_log) / (high_log - low_log)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes of signal and noise, sqrt(abar) and sqrt(1 - abar), at whole timesteps.

        t: (b,) long. Both have shape (b, 1, ...) to multiply `like`, and its rank, device and dtype.
        """
        table = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()]).to(like.dtype)
        alpha, sigma = table.to(t.device)[:, t].to(like.device)
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.reshape(shape), sigma.reshape(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise in one step (Ho et al. 2020, eq. 4).

        x0, noise: (b, ...); t: (b,) long. The result is in variance-preserving coordinates.
        """
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise


def _betas(config: ScheduleConfig) -> Tensor:
    count, start, end = config.num_timesteps, config.beta_start, config.beta_end
    if config.betas is not None:
        return torch.tensor(config.betas, dtype=torch.float64)
    if config.kind == "cosine":
        time = torch.arange(count + 1, dtype=torch.float64) / count
        abar = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=COSINE_BETA_MAX)
    if config.kind == "sigmoid":
        reach = torch.linspace(-SIGMOID_REACH, SIGMOID_REACH, count, dtype=torch.float64)
        return torch.sigmoid(reach) * (end - start) + start
    if config.kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    return torch.linspace(start, end, count, dtype=torch.float64)


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar): the first value stays, the last is 0 (Lin et al. 2024, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled[-1] = TERMINAL_ABAR
    return rescaled

"""The original's `DDPM`: a schedule's numbers as buffers and its closed forms (Ho et al. 2020, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.prediction import paired
from sfumato.diffusion.schedule import Schedule
from sfumato.runtime import resolve_device

POSTERIOR_FLOOR = 1e-20  # the posterior's variance is 0 at the first timestep; its logarithm is not


def schedule_buffers(schedule: Schedule, v_posterior: float = 0.0) -> dict[str, Tensor]:
    """The buffers of the original's `register_schedule`, (num_timesteps,) each, float64.

    v_posterior: the posterior's variance is (1 - v) times its own plus v times beta.
    """
    betas, alphas, abar = schedule.betas, schedule.alphas, schedule.alphas_cumprod
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = (1 - v_posterior) * betas * (1 - previous) / (1 - abar) + v_posterior * betas
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=POSTERIOR_FLOOR).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - abar),
    }


def variational_weights(schedule: Schedule, prediction: str, variance: Tensor) -> Tensor:
    """The original's `lvlb_weights`, (num_timesteps,): each timestep's weight in the variational bound.

    For x0 it is the original's expression as it stands, which is not the bound's.
    """
    abar = schedule.alphas_cumprod
    if prediction == "x0":
        weights = 0.5 * abar.sqrt() / (2 - abar)
    elif prediction == "v":
        weights = torch.ones_like(abar)
    else:
        weights = schedule.betas**2 / (2 * variance * schedule.alphas * (1 - abar))
    weights[0] = weights[1]  # the variance of the first is 0
    return weights


class DDPM(nn.Module):
    """A schedule in the original's buffers, float32 whatever the weights are, and what follows from it.

    parameterization: "eps", "v" or "x0". Errors as `sfumato.diffusion.prediction.paired`.
    In every method t is (b,) long from 0, and samples are (b, ...) in the network's coordinates.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    lvlb_weights: Tensor

    def __init__(self, schedule: Schedule, parameterization: str, v_posterior: float = 0.0) -> None:
        super().__init__()
        self.schedule = schedule
        self.parameterization = paired(parameterization, schedule).name
        self.num_timesteps = schedule.num_timesteps
        self.v_posterior = v_posterior
        self.use_ema = False
        self.linear_start = schedule.config.beta_start
        self.linear_end = schedule.config.beta_end
        tables = schedule_buffers(schedule, v_posterior)
        weights = variational_weights(schedule, self.parameterization, tables["posterior_variance"])
        for name, values in tables.items():
            self.register_buffer(name, values.float())
        self.register_buffer("lvlb_weights", weights.float(), persistent=False)
        self.logvar = torch.zeros(self.num_timesteps)

    @property
    def device(self) -> torch.device:
        """Where the schedule's buffers are."""
        return self.betas.device

    def cuda(self, device: int | torch.device | None = None) -> DDPM:
        """Move to a CUDA device; `ResourceError` where there is none."""
        place = torch.device("cuda", device) if isinstance(device, int) else device
        return self.to(resolve_device("cuda" if place is None else place))

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Does nothing: which weights a model has, averaged or not, was chosen when it was loaded."""
        yield

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_start noised to t; noise None is drawn from torch's global generator."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = at(self.sqrt_alphas_cumprod, t, x_start)
        return signal * x_start + at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of x_t given x_start."""
        mean = at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = at(1 - self.alphas_cumprod, t, x_start)
        return mean, variance, at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of x_{t-1} given x_t and x_start (Ho et al. 2020, eq. 7)."""
        first, second = at(self.posterior_mean_coef1, t, x_t), at(self.posterior_mean_coef2, t, x_t)
        variance = at(self.posterior_variance, t, x_t)
        log_variance = at(self.posterior_log_variance_clipped, t, x_t)
        return first * x_start + second * x_t, variance, log_variance

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 where the noise in x_t is `noise`."""
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return scaled - at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """The noise in x_t where x0 is `pred_xstart`."""
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return (scaled - pred_xstart) / at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x0 where the velocity at x_t is `v` (Salimans and Ho 2022, appendix D)."""
        noise = at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return at(self.sqrt_alphas_cumprod, t, x_t) * x_t - noise * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise in x_t where the velocity at x_t is `v`."""
        noise = at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return at(self.sqrt_alphas_cumprod, t, x_t) * v + noise * x_t

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity of x noised by `noise`."""
        return at(self.sqrt_alphas_cumprod, t, x) * noise - at(self.sqrt_one_minus_alphas_cumprod, t, x) * x

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> DDPM:
        """Moving or converting the weights moves the buffers, and leaves their number format alone."""
        kept = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, values in kept.items():
            moved = self._buffers[name]
            assert values is not None and moved is not None
            self._buffers[name] = moved if moved.dtype == values.dtype else values.to(moved.device)
        self.logvar = self.logvar.to(self.betas.device)
        return self


def at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t], shaped to multiply `like`: (b,) -> (b, 1, ...); the original's `extract_into_tensor`."""
    return values[t].reshape(-1, *[1] * (like.ndim - 1))

"""Every sampler against its reference scheduler, LDM's DDIM and the printed DDPM loop, noise for noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor
from sfumato.diffusion.samplers import SAMPLERS, Step
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS, trailing

Denoise = Callable[[Tensor, float], Tensor]
SD1 = Schedule(ScheduleConfig())
OPTIONS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4, 4)


def tape(steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The noise of a run: the start and one for every step."""
    return list(torch.randn(steps + 1, *SHAPE, generator=torch.Generator().manual_seed(7), dtype=dtype))


def play(tape: list[Tensor]) -> Callable[[float, float], Tensor]:
    values = iter(tape[1:])
    return lambda sigma, target: next(values)


def last(steps: Iterator[Step]) -> Step:
    return list(steps)[-1]


def drawn_from(monkeypatch: pytest.MonkeyPatch, scheduler: Any, tape: list[Tensor]) -> None:
    """Let a scheduler take its noise from the tape."""
    values = iter(tape[1:])
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: next(values))


def exact(scheduler: Any) -> Any:
    """Give a scheduler the float64 tables."""
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = SD1.betas, SD1.alphas, SD1.alphas_cumprod
    return scheduler


def run_exploding(scheduler: Any, denoise: Denoise, x: Tensor) -> Tensor:
    """A diffusers loop in sigma coordinates."""
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = float(scheduler.sigmas[scheduler.step_index])
        x = scheduler.step((x - denoise(x, sigma)) / sigma, t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [20, 50, 1000])
@pytest.mark.parametrize(("variance", "theirs"), [("large", "fixed_large"), ("small", "fixed_small")])
def test_ddpm(
    monkeypatch: pytest.MonkeyPatch, mixture: Denoise, steps: int, variance: str, theirs: Any
) -> None:
    noise = tape(steps)
    scheduler = exact(
        DDPMScheduler(**OPTIONS, variance_type=theirs, clip_sample=False, timestep_spacing="trailing")
    )
    scheduler.set_timesteps(steps)
    drawn_from(monkeypatch, scheduler, noise)
    spacing = trailing(SD1, steps)
    start = noise[0] * spacing.start_scale
    got = list(SAMPLERS["ddpm"](mixture, start, spacing.sigmas, play(noise), variance=variance))
    x = noise[0]
    for t, step in zip(scheduler.timesteps, got, strict=True):
        sigma = SD1.sigma(int(t))
        alpha = 1 / math.sqrt(1 + sigma**2)
        x = scheduler.step((x / alpha - mixture(x / alpha, sigma)) / sigma, t, x).prev_sample
        if step.target > 0 or t == 0:  # on a subset of timesteps it adds noise to the finished sample
            torch.testing.assert_close(step.x / math.sqrt(1 + step.target**2), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["leading", "trailing"])
def test_ddim(mixture: Denoise, steps: int, eta: float, name: Any) -> None:
    noise = tape(steps)
    scheduler = exact(
        DDIMScheduler(
            **OPTIONS,
            clip_sample=False,
            set_alpha_to_one=name == "trailing",
            steps_offset=1,
            timestep_spacing=name,
        )
    )
    scheduler.final_alpha_cumprod = (
        SD1.alphas_cumprod.new_ones(()) if name == "trailing" else SD1.alphas_cumprod[0]
    )
    scheduler.set_timesteps(steps)
    expected, values = noise[0], iter(noise[1:])
    for t in scheduler.timesteps:
        sigma = SD1.sigma(int(t))
        exploding = expected * math.sqrt(1 + sigma**2)
        eps = (exploding - mixture(exploding, sigma)) / sigma
        expected = scheduler.step(eps, t, expected, eta=eta, variance_noise=next(values)).prev_sample
    spacing = SPACINGS[name](SD1, steps)
    step = last(
        SAMPLERS["ddim"](mixture, noise[0] * spacing.start_scale, spacing.sigmas, play(noise), eta=eta)
    )
    torch.testing.assert_close(step.x / math.sqrt(1 + step.target**2), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        ("euler", EulerDiscreteScheduler),
        ("heun", HeunDiscreteScheduler),
        ("dpmpp_2m", DPMSolverMultistepScheduler),
    ],
)
def test_deterministic(name: str, scheduler_class: Any, karras: bool, mixture: Denoise) -> None:
    scheduler = scheduler_class(**OPTIONS, use_karras_sigmas=karras)
    scheduler.set_timesteps(12)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    if name == "heun":
        sigmas = [*sigmas[:-1:2], 0.0]  # every level but the first and the last is listed twice there
    x = tape(0, torch.float32)[0]
    if name == "dpmpp_2m":
        expected = x
        for i, t in enumerate(scheduler.timesteps):
            alpha = 1 / math.sqrt(1 + sigmas[i] ** 2)
            eps = (expected / alpha - mixture(expected / alpha, sigmas[i])) / sigmas[i]
            expected = scheduler.step(eps, t, expected).prev_sample
        start = x * math.sqrt(1 + sigmas[0] ** 2)
    else:
        start = x * sigmas[0]
        expected = run_exploding(scheduler, mixture, start)

    def no_noise(sigma: float, target: float) -> Tensor:
        raise AssertionError("drew noise")

    got = last(SAMPLERS[name](mixture, start, sigmas, no_noise)).x
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_euler_ancestral(monkeypatch: pytest.MonkeyPatch, mixture: Denoise) -> None:
    noise = tape(15, torch.float32)
    scheduler = EulerAncestralDiscreteScheduler(**OPTIONS)
    scheduler.set_timesteps(15)
    drawn_from(monkeypatch, scheduler, noise)
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    expected = run_exploding(scheduler, mixture, noise[0] * sigmas[0])
    got = last(SAMPLERS["euler_a"](mixture, noise[0] * sigmas[0], sigmas, play(noise))).x
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A fixed float64 network of two layers with a timestep embedding; it predicts nothing well."""
    generator = torch.Generator().manual_seed(11)
    first, second = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    hidden = torch.tanh(
        torch.einsum("ij,bjhw->bihw", first, x) + torch.sin(t.double() / 50)[:, None, None, None]
    )
    return 0.7 * x + 0.5 * torch.einsum("ij,bjhw->bihw", second, hidden)


@pytest.mark.parametrize(
    "config",
    [ScheduleConfig("linear", 200, 1e-4, 0.02), ScheduleConfig("linear", 1000, 1e-4, 0.02), ScheduleConfig()],
    ids=["short", "ddpm", "stable diffusion"],
)
def test_ddpm_is_the_printed_loop(config: ScheduleConfig) -> None:
    """Ho et al. 2020, algorithm 2, as textbooks print it: t from T - 1 to 0, and z = 0 at the end."""
    schedule = Schedule(config)
    steps = schedule.num_timesteps
    noise = tape(steps)
    values = iter(noise[1:])
    x_t = noise[0]
    for t_step in reversed(range(steps)):
        z = next(values) if t_step > 0 else 0
        alpha, beta, abar = (
            row[t_step] for row in (schedule.alphas, schedule.betas, schedule.alphas_cumprod)
        )
        eps = network(x_t, torch.full((SHAPE[0],), t_step), Conditioning())
        x_t = torch.sqrt(1 / alpha) * (x_t - (1 - alpha) * eps / torch.sqrt(1 - abar)) + torch.sqrt(beta) * z

    predictor = Predictor(network, schedule, "eps")
    row = SAMPLERS["ddpm"]
    spacing = SPACINGS[row.spacing](schedule, steps)
    got = last(
        row(
            lambda x, sigma: predictor(x, sigma, Conditioning()),
            noise[0] * spacing.start_scale,
            spacing.sigmas,
            play(noise),
        )
    ).x
    assert x_t.abs().max() > 0.5
    torch.testing.assert_close(got, x_t, rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_formula_of_latent_diffusion(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, on timesteps 1, 1 + r ... and at timestep 0 after the last step."""
    steps = 40
    noise = tape(steps)
    values = iter(noise[1:])
    chain = [1 + 25 * i for i in range(steps)]
    before = [0, *chain[:-1]]
    x = noise[0]
    for t, t_before in zip(reversed(chain), reversed(before), strict=True):
        a, a_before = SD1.alphas_cumprod[t].item(), SD1.alphas_cumprod[t_before].item()
        eps = network(x, torch.full((SHAPE[0],), t), Conditioning())
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        deviation = eta * math.sqrt((1 - a_before) / (1 - a) * (1 - a / a_before))
        direction = math.sqrt(1 - a_before - deviation**2) * eps
        x = math.sqrt(a_before) * x0 + direction + deviation * next(values)

    predictor = Predictor(network, SD1, "eps")
    row = SAMPLERS["ddim"]
    spacing = SPACINGS[row.spacing](SD1, steps)
    start = noise[0] * spacing.start_scale
    step = last(
        row(lambda x, s: predictor(x, s, Conditioning()), start, spacing.sigmas, play(noise), eta=eta)
    )
    assert step.target == SD1.sigma_min
    torch.testing.assert_close(step.x / math.sqrt(1 + step.target**2), x, rtol=0, atol=1e-10)

"""Deterministic and ancestral samplers against the reference library's schedulers, noise for noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from sfumato.diffusion.samplers import SAMPLERS, Step
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS, trailing

Denoise = Callable[[Tensor, float], Tensor]
SD1 = Schedule(ScheduleConfig())
OPTIONS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (2, 3, 4, 4)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # its use of numpy
BAR = 1e-5  # of relative difference from the reference library, whose tables and steps may be float32
GRIDS = ["karras", "uniform"]


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


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    assert got.isfinite().all()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def no_noise(sigma: float, target: float) -> Tensor:
    raise AssertionError("drew noise")


def grid(name: str, steps: int = 20, end: float = 0.0) -> list[float]:
    """Levels of that many steps, the last one replaced."""
    return [*SPACINGS[name](SD1, steps).sigmas[:-1], end]


def above_zero(name: str, steps: int = 20) -> list[float]:
    """Levels of that many steps that end at the smallest level above 0."""
    return SPACINGS[name](SD1, steps + 1).sigmas[:-1]


def prepared(scheduler_class: Any, sigmas: list[float], **options: Any) -> Any:
    """A scheduler that steps along `sigmas`, in float64 as far as it can."""
    scheduler = scheduler_class(**OPTIONS, **options)
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = torch.linspace(999, 0, len(sigmas) - 1, dtype=torch.float64)
    scheduler.set_begin_index(0)
    return scheduler


def run_exploding(scheduler: Any, denoise: Denoise, x: Tensor) -> Tensor:
    """A diffusers loop in sigma coordinates."""
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = float(scheduler.sigmas[scheduler.step_index])
        x = scheduler.step((x - denoise(x, sigma)) / sigma, t, x).prev_sample
    return x


def run_preserving(scheduler: Any, sigmas: list[float], denoise: Denoise, x: Tensor) -> Tensor:
    """A diffusers loop in the network's coordinates; x in and out are in sigma coordinates."""
    x = x / math.sqrt(1 + sigmas[0] ** 2)
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        exploding = x * math.sqrt(1 + sigma**2)
        x = scheduler.step((exploding - denoise(exploding, sigma)) / sigma, t, x).prev_sample
    return x * math.sqrt(1 + sigmas[-1] ** 2)


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


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("end", [0.0, 0.02])
def test_euler_and_heun(spacing: str, end: float, mixture: Denoise) -> None:
    sigmas = grid(spacing, end=end)
    start = tape(0)[0] * sigmas[0]
    expected = run_exploding(prepared(EulerDiscreteScheduler, sigmas), mixture, start)
    assert difference(last(SAMPLERS["euler"](mixture, start, sigmas, no_noise)).x, expected) < BAR

    scheduler = prepared(HeunDiscreteScheduler, sigmas)  # every level but the first is listed twice there
    scheduler.sigmas = torch.tensor([sigmas[0], *[sigma for sigma in sigmas[1:] for _ in range(2)]])
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.timesteps = torch.linspace(999, 0, 2 * len(sigmas) - 2 - (end == 0), dtype=torch.float64)
    expected = run_exploding(scheduler, mixture, start)
    assert difference(last(SAMPLERS["heun"](mixture, start, sigmas, no_noise)).x, expected) < BAR


def test_euler_ancestral(monkeypatch: pytest.MonkeyPatch, mixture: Denoise) -> None:
    noise, sigmas = tape(20), grid("uniform")
    scheduler = prepared(EulerAncestralDiscreteScheduler, sigmas)
    drawn_from(monkeypatch, scheduler, noise)
    expected = run_exploding(scheduler, mixture, noise[0] * sigmas[0])
    got = last(SAMPLERS["euler_a"](mixture, noise[0] * sigmas[0], sigmas, play(noise))).x
    assert difference(got, expected) < BAR


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm2(monkeypatch: pytest.MonkeyPatch, eta: float, spacing: str, mixture: Denoise) -> None:
    """With the reference's tables in float64; both take the middle between logarithms of levels."""
    noise, sigmas = tape(20), grid(spacing)
    up = [eta * low * math.sqrt(1 - (low / high) ** 2) for high, low in pairwise(sigmas)]
    down = [math.sqrt(low**2 - added**2) for low, added in zip(sigmas[1:], up, strict=True)]
    middles = [math.sqrt(high * low) for high, low in zip(sigmas, down, strict=False)]
    scheduler = prepared(KDPM2AncestralDiscreteScheduler if eta else KDPM2DiscreteScheduler, sigmas)

    def twice(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(2)

    scheduler.sigmas = twice(sigmas)[1:]
    scheduler.sigmas_interpol = twice(middles)[1:] if eta else twice([sigmas[0], *middles])[1:]
    if eta:
        scheduler.sigmas_up, scheduler.sigmas_down = twice([*up, 0.0])[1:], twice([*down, 0.0])[1:]
        drawn_from(monkeypatch, scheduler, noise)
    start = x = noise[0] * sigmas[0]
    visited = [level for pair in zip(sigmas, middles, strict=False) for level in pair][:-1]
    scheduler.timesteps = torch.linspace(999, 0, len(visited), dtype=torch.float64)
    for sigma, t in zip(visited, scheduler.timesteps, strict=True):
        x = scheduler.step((x - mixture(x, sigma)) / sigma, t, x).prev_sample
    got = SAMPLERS["dpm2_a"](mixture, start, sigmas, play(noise), eta=eta)
    assert difference(last(got).x, x) < BAR
    if eta == 0:
        assert difference(last(SAMPLERS["dpm2"](mixture, start, sigmas, no_noise)).x, x) < BAR


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order: int, spacing: str, mixture: Denoise) -> None:
    """On levels above 0: the reference takes the last step, to 0, in full order."""
    sigmas = above_zero(spacing)
    start = x = tape(0)[0] * sigmas[0]
    scheduler = prepared(LMSDiscreteScheduler, sigmas)
    scheduler.is_scale_input_called = True
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step((x - mixture(x, sigma)) / sigma, t, x, order=order).prev_sample
    for name in ("lms", "ipndm_v"):
        got = last(SAMPLERS[name](mixture, start, sigmas, no_noise, order=order)).x
        assert difference(got, x) < BAR


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("end", [0.0, 0.02])
def test_dpmpp_2m(spacing: str, end: float, mixture: Denoise) -> None:
    sigmas = grid(spacing, end=end)
    start = tape(0)[0] * sigmas[0]
    kind = "sigma_min" if end else "zero"  # with "zero" its last step is Euler's
    scheduler = prepared(
        DPMSolverMultistepScheduler, sigmas, final_sigmas_type=kind, lower_order_final=end == 0
    )
    expected = run_preserving(scheduler, sigmas, mixture, start)
    assert difference(last(SAMPLERS["dpmpp_2m"](mixture, start, sigmas, no_noise)).x, expected) < BAR


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize(("variant", "end"), [("bh1", 0.02), ("bh2", 0.02), ("bh2", 0.0)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(variant: str, order: int, end: float, spacing: str, mixture: Denoise) -> None:
    """The reference's bh1 is not a number at 0."""
    sigmas = grid(spacing, end=end)
    start = tape(0)[0] * sigmas[0]
    for lower in (True, False) if end else (True,):
        scheduler = prepared(
            UniPCMultistepScheduler, sigmas, solver_order=order, solver_type=variant, lower_order_final=lower
        )
        expected = run_preserving(scheduler, sigmas, mixture, start)
        options = {"variant": variant, "order": order, "lower_order_final": lower}
        got = last(SAMPLERS["unipc"](mixture, start, sigmas, no_noise, **options)).x
        assert difference(got, expected) < BAR


def test_unipc_variants_differ(mixture: Denoise) -> None:
    sigmas = grid("uniform", 6)
    start = tape(0)[0] * sigmas[0]
    ends = [last(SAMPLERS["unipc"](mixture, start, sigmas, no_noise, variant=v)).x for v in ("bh1", "bh2")]
    assert difference(ends[0], ends[1]) > 1e-4


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int, spacing: str, mixture: Denoise) -> None:
    sigmas = above_zero(spacing)
    start = tape(0)[0] * sigmas[0]
    scheduler = prepared(DEISMultistepScheduler, sigmas, solver_order=order, lower_order_final=False)
    expected = run_preserving(scheduler, sigmas, mixture, start)
    got = last(SAMPLERS["deis"](mixture, start, sigmas, no_noise, order=order)).x
    assert difference(got, expected) < BAR


@pytest.mark.parametrize("steps", [10, 20])
def test_plms(steps: int, mixture: Denoise) -> None:
    scheduler = exact(PNDMScheduler(**OPTIONS, skip_prk_steps=True, steps_offset=1))
    scheduler.final_alpha_cumprod = SD1.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    expected = tape(0)[0]
    assert len(scheduler.timesteps) == steps + 1
    for t in scheduler.timesteps:
        sigma = SD1.sigma(int(t))
        exploding = expected * math.sqrt(1 + sigma**2)
        eps = (exploding - mixture(exploding, sigma)) / sigma
        expected = scheduler.step(eps, t, expected).prev_sample
    row = SAMPLERS["plms"]
    spacing = SPACINGS[row.spacing](SD1, steps)
    step = last(row(mixture, tape(0)[0] * spacing.start_scale, spacing.sigmas, no_noise))
    assert difference(step.x / math.sqrt(1 + step.target**2), expected) < BAR


@pytest.mark.parametrize("spacing", GRIDS)
def test_ipndm(spacing: str, mixture: Denoise) -> None:
    """The reference's own times are another model's: it gets the amplitudes of ours, and v."""
    sigmas = above_zero(spacing)
    scheduler: Any = IPNDMScheduler()
    scheduler.set_timesteps(len(sigmas) - 1)
    levels = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.alphas, scheduler.betas = 1 / (1 + levels**2).sqrt(), levels / (1 + levels**2).sqrt()
    start = tape(0)[0] * sigmas[0]
    expected = start * scheduler.alphas[0]
    for i, t in enumerate(scheduler.timesteps):
        alpha, beta = scheduler.alphas[i], scheduler.betas[i]
        v = (alpha * expected - mixture(expected / alpha, sigmas[i])) / beta
        expected = scheduler.step(v, t, expected).prev_sample
    got = last(SAMPLERS["ipndm"](mixture, start, sigmas, no_noise)).x
    assert difference(got * scheduler.alphas[-1], expected) < BAR


def test_dpmpp_2s_without_noise(mixture: Denoise) -> None:
    """The reference's single steps go through levels of the grid: it gets the middles as such."""
    sigmas = above_zero("karras")
    middles = [math.sqrt(high * low) for high, low in pairwise(sigmas)]
    both = [level for pair in zip(sigmas, middles, strict=False) for level in pair] + sigmas[-1:]
    scheduler = prepared(
        DPMSolverSinglestepScheduler,
        both,
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    start = tape(0)[0] * sigmas[0]
    expected = run_preserving(scheduler, both, mixture, start)
    got = last(SAMPLERS["dpmpp_2s_a"](mixture, start, sigmas, no_noise, eta=0.0)).x
    assert difference(got, expected) < BAR

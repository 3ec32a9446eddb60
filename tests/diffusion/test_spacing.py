"""Spacings against the reference schedulers, and their heads and tails."""

from __future__ import annotations

import math
from typing import Any

import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS, karras, leading, spacing, trailing, uniform
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())
SHORT = Schedule(ScheduleConfig("linear", 200, 1e-4, 0.02))
OPTIONS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def timesteps(sigmas: list[float]) -> list[float]:
    return [SD1.timestep(sigma) for sigma in sigmas]


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 20, 30, 50, 333, 999])
def test_leading_against_ddim(steps: int) -> None:
    reference = DDIMScheduler(**OPTIONS, steps_offset=1, set_alpha_to_one=False)
    reference.set_timesteps(steps)
    got = leading(SD1, steps)
    assert timesteps(got.sigmas) == [*reference.timesteps.tolist(), 0]
    assert got.sigmas[-1] == SD1.sigma_min == pytest.approx(0.0292, abs=1e-4)
    assert got.start_scale == math.sqrt(1 + got.sigmas[0] ** 2)


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 500])
def test_leading_against_ldm(steps: int) -> None:
    assert timesteps(leading(SD1, steps).sigmas[:-1]) == [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 16, 30, 50, 999, 1000])
def test_trailing_against_ddpm(steps: int) -> None:
    reference = DDPMScheduler(**OPTIONS, timestep_spacing="trailing")
    reference.set_timesteps(steps)
    got = trailing(SD1, steps)
    assert timesteps(got.sigmas[:-1]) == reference.timesteps.tolist()
    assert got.sigmas[-1] == 0
    assert got.start_scale == math.sqrt(1 + got.sigmas[0] ** 2)


@pytest.mark.parametrize("steps", [2, 7, 10, 28, 50])
def test_uniform_against_euler(steps: int) -> None:
    reference = EulerDiscreteScheduler(**OPTIONS)
    reference.set_timesteps(steps)
    got = uniform(SD1, steps)
    assert timesteps(got.sigmas[:-1]) == pytest.approx(reference.timesteps.tolist(), abs=1e-3)
    assert got.sigmas == pytest.approx(
        reference.sigmas.tolist(), rel=1e-3
    )  # it interpolates sigma, not its log
    assert got.sigmas[-1] == 0
    assert got.start_scale == pytest.approx(float(reference.init_noise_sigma), rel=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 20, 1500])
def test_karras_against_euler(steps: int) -> None:
    reference = EulerDiscreteScheduler(**OPTIONS, use_karras_sigmas=True)
    reference.set_timesteps(steps)
    got = karras(SD1, steps)
    assert got.sigmas == pytest.approx(reference.sigmas.tolist(), rel=1e-4)
    assert (got.sigmas[0], got.sigmas[-1]) == (pytest.approx(SD1.sigma_max), 0)
    assert got.start_scale == got.sigmas[0]


def test_every_timestep() -> None:
    for name in ("leading", "trailing", "uniform"):
        sigmas = SPACINGS[name](SHORT, 200).sigmas
        assert sigmas == pytest.approx([*reversed(SHORT.sigmas.tolist()), 0])


def test_start_scales_of_the_short_schedule_are_seven_per_cent_apart() -> None:
    ratio = trailing(SHORT, 200).start_scale / uniform(SHORT, 200).start_scale
    assert ratio == pytest.approx(1.07, abs=5e-3)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.sampled_from(sorted(SPACINGS)), st.integers(1, 200))
def test_shape(name: str, steps: int) -> None:
    got = SPACINGS[name](SHORT, steps)
    assert len(got.sigmas) == steps + 1
    assert all(high > low for high, low in zip(got.sigmas, got.sigmas[1:], strict=False))
    assert got.sigmas[0] <= SHORT.sigma_max * (1 + 1e-12)
    assert got.sigmas[-1] in (0, SHORT.sigma_min)


@pytest.mark.parametrize(
    ("name", "steps"), [("leading", 201), ("trailing", 201), ("uniform", 0), ("karras", -1)]
)
def test_refused_steps(name: str, steps: int) -> None:
    with pytest.raises(InputError, match=f"steps is {steps}"):
        SPACINGS[name](SHORT, steps)


def test_names() -> None:
    assert spacing("karras") is karras
    with pytest.raises(InputError, match="karras"):
        spacing("karas")
    assert {row.spacing for row in SAMPLERS.values()} <= set(SPACINGS)

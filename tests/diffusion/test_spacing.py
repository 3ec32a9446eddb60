"""Spacings against the reference schedulers and literal transcriptions, their heads, tails and options."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as distribution

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS, Spacing, custom, space, spacing, without_penultimate
from sfumato.diffusion.spacing.levels import karras
from sfumato.diffusion.spacing.tables import GITS
from sfumato.diffusion.spacing.timesteps import leading, trailing, uniform
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())
SHORT = Schedule(ScheduleConfig("linear", 200, 1e-4, 0.02))
TERMINAL = Schedule(ScheduleConfig(zero_terminal_snr=True))
OPTIONS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LOW, HIGH = SD1.sigma_min, SD1.sigma_max


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
    kept = space("ddim_uniform", SD1, steps)
    assert kept == Spacing([*got.sigmas[:-1], 0.0], got.sigmas[0])


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


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 28, 29, 50, 100, 300])
def test_quad_against_ldm(steps: int) -> None:
    squares = (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int) + 1  # make_ddim_timesteps
    got = space("quad", SD1, steps)
    timestep, *own = timesteps(got.sigmas)[::-1]
    assert timestep == 0 and got.start_scale == math.sqrt(1 + got.sigmas[0] ** 2)
    if steps <= 28:  # beyond, squares round down to equal numbers: these move up, and no more than needed
        assert own == squares.tolist()
    expected = [max(square, 1 + index) for index, square in enumerate(squares.tolist())]
    assert own[-steps // 2 :] == expected[-steps // 2 :] and own[0] == 1
    assert len(set(own)) == steps


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


@pytest.mark.parametrize("steps", [2, 5, 20, 300])
@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_noise_levels_against_euler(name: str, steps: int) -> None:
    kind: dict[str, Any] = {f"use_{name}_sigmas": True}
    reference = EulerDiscreteScheduler(**OPTIONS, **kind)
    reference.set_timesteps(steps)
    got = space(name, SD1, steps)
    assert got.sigmas == pytest.approx(reference.sigmas.tolist(), rel=1e-4)
    assert (got.sigmas[0], got.sigmas[-1]) == (pytest.approx(SD1.sigma_max), 0)
    assert got.start_scale == got.sigmas[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
def test_lcm_against_lcm(steps: int) -> None:
    reference = LCMScheduler(**OPTIONS)
    reference.set_timesteps(steps)
    got = space("lcm", SD1, steps)
    assert timesteps(got.sigmas[:-1]) == reference.timesteps.tolist()
    assert got.start_scale == math.sqrt(1 + got.sigmas[0] ** 2)


def transcribed(name: str, n: int) -> list[float]:
    """k-diffusion's formulas, and those that AUTOMATIC1111 and ComfyUI are known for, in float64."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    start, end = SD1.timestep(HIGH), SD1.timestep(LOW)
    if name == "karras":
        low, high = LOW ** (1 / 7), HIGH ** (1 / 7)
        return ((high + ramp * (low - high)) ** 7).tolist()
    if name == "exponential":
        return torch.linspace(math.log(HIGH), math.log(LOW), n, dtype=torch.float64).exp().tolist()
    if name == "polyexponential":
        ramp = torch.linspace(1, 0, n, dtype=torch.float64) ** 1.0
        return torch.exp(ramp * (math.log(HIGH) - math.log(LOW)) + math.log(LOW)).tolist()
    if name == "uniform":
        return [SD1.sigma(t) for t in torch.linspace(999, 0, n, dtype=torch.float64).tolist()]
    if name == "normal":
        return [SD1.sigma(t) for t in torch.linspace(start, end, n, dtype=torch.float64).tolist()]
    if name == "sgm_uniform":
        return [SD1.sigma(t) for t in torch.linspace(start, end, n + 1, dtype=torch.float64)[:-1].tolist()]
    if name == "simple":
        return [SD1.sigmas[-(1 + int(x * (1000 / n)))].item() for x in range(n)]
    if name == "ddim_uniform":
        return [SD1.sigmas[1 + x * max(1000 // n, 1)].item() for x in range(n)][::-1]
    if name == "beta":
        shares = distribution.ppf(1 - np.linspace(0, 1, n), 0.6, 0.6)
        return [LOW + float(share) * (HIGH - LOW) for share in shares]
    assert name == "kl_optimal"
    return torch.tan(ramp * math.atan(LOW) + (1 - ramp) * math.atan(HIGH)).tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 50, 777])
@pytest.mark.parametrize(
    "name",
    ["karras", "exponential", "polyexponential", "uniform", "normal", "sgm_uniform", "simple",
     "ddim_uniform", "beta", "kl_optimal"],
)  # fmt: skip
def test_against_a_transcription(name: str, steps: int) -> None:
    got = space(name, SD1, steps)
    assert got.sigmas == pytest.approx([*transcribed(name, steps), 0.0], rel=1e-11)
    assert got.start_scale == got.sigmas[0]


@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_beta_over_timesteps(steps: int) -> None:
    places = np.rint(distribution.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * 999)
    assert timesteps(space("beta", SD1, steps, {"axis": "timestep"}).sigmas)[:-1] == places.tolist()
    many = space("beta", SD1, 900, {"axis": "timestep"})  # more than there are apart
    assert len(many.sigmas) == 901


@pytest.mark.parametrize(("table", "name"), [("sd1", ""), ("sdxl", "XL")])
def test_align_your_steps_as_published(table: str, name: str) -> None:
    got = space("align_your_steps", SD1, 10, {"table": table})
    assert timesteps(got.sigmas[:-1]) == AysSchedules[f"StableDiffusion{name}Timesteps"]
    published = AysSchedules[f"StableDiffusion{name}Sigmas"]  # of three digits, and not all rounded well
    assert got.sigmas == pytest.approx(published, rel=2e-2, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 3, 5, 20, 37])
def test_align_your_steps_interpolated(steps: int) -> None:
    full = [SD1.sigma(t) for t in (*AysSchedules["StableDiffusionTimesteps"], 0)]
    places = np.linspace(0, 1, steps + 1)
    logs = np.interp(places, np.linspace(0, 1, 11), np.log(full))  # NVIDIA's loglinear_interp
    assert space("align_your_steps", SD1, steps).sigmas == pytest.approx([*np.exp(logs[:-1]).tolist(), 0.0])


def test_gits_as_published() -> None:
    for coefficient, levels in [
        (0.80, [14.61464119, 7.49001646]),
        (1.0, [14.61464119, 7.11996698, 3.07277966, 1.56271636, 0.59516323]),
        (0.95, [14.61464119, 11.54541874, 7.49001646, 4.86714602, 3.07277966, 1.91321158, 1.08895338,
                0.50118381]),
        (1.05, [14.61464119, 7.49001646, 5.09240818, 3.46139455, 2.45070267, 1.61558151, 1.08895338,
                0.72133851, 0.45573691, 0.25053367, 0.09824532]),
    ]:  # fmt: skip
        got = space("gits", SD1, len(levels), {"coefficient": coefficient + 0.01})
        assert got.sigmas == pytest.approx([*levels, 0.0], rel=5e-5)


def test_gits_tables_are_whole() -> None:
    assert len(GITS) == 15
    for coefficient, rows in GITS.items():
        assert 0.8 <= coefficient <= 1.5 and {2, 3, 10, 15, 17} <= set(rows) <= set(range(2, 21))
        for steps, levels in rows.items():
            assert len(levels) == steps + 1 and (levels[0], levels[-1]) == (100, 0)
            assert list(levels) == sorted(set(levels), reverse=True)
    assert sorted(set(range(2, 21)) - set(GITS[0.8])) == [16, 18, 20]
    row = space("gits", SD1, 20, {"coefficient": 0.8}).sigmas  # which is missing: 19 levels interpolated
    assert len(row) == 21 and row[0] == SD1.sigma_max


def test_turbo() -> None:
    for steps, expected in [(1, [999]), (2, [999, 499]), (3, [999, 749, 499]), (4, [999, 749, 499, 249])]:
        got = space("turbo", SD1, steps)
        assert timesteps(got.sigmas[:-1]) == expected and got.start_scale == got.sigmas[0]
    assert space("turbo", SD1, 8).sigmas == trailing(SD1, 8).sigmas
    assert timesteps(space("turbo", SD1, 2, {"trained_steps": 8}).sigmas[:-1]) == [999, 499]


def test_every_timestep() -> None:
    for name in ("leading", "trailing", "uniform", "simple", "quad", "ddim_uniform", "turbo", "lcm"):
        sigmas = SPACINGS[name](SHORT, 200).sigmas
        assert sigmas == pytest.approx([*reversed(SHORT.sigmas.tolist()), 0])


def test_start_scales_of_the_short_schedule_are_seven_per_cent_apart() -> None:
    ratio = trailing(SHORT, 200).start_scale / uniform(SHORT, 200).start_scale
    assert ratio == pytest.approx(1.07, abs=5e-3)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.sampled_from(sorted(SPACINGS)), st.integers(1, 199), st.booleans())
def test_shape(name: str, steps: int, discard: bool) -> None:
    for schedule in (SHORT, SD1, TERMINAL):
        got = space(name, schedule, steps, discard_penultimate=discard)
        assert len(got.sigmas) == steps + 1
        assert all(high > low for high, low in pairwise(got.sigmas))
        assert got.sigmas[0] <= schedule.sigma_max * (1 + 1e-12)
        assert got.sigmas[-1] in (0, schedule.sigma_min)
        assert got.start_scale in (got.sigmas[0], math.sqrt(1 + got.sigmas[0] ** 2))


def test_discarding_the_penultimate_level() -> None:
    longer = karras(SD1, 11)
    assert space("karras", SD1, 10, discard_penultimate=True) == without_penultimate(longer)
    assert without_penultimate(longer).sigmas == [*longer.sigmas[:-2], 0.0]
    assert space("leading", SD1, 10, discard_penultimate=True).sigmas[-1] == SD1.sigma_min


def test_overrides() -> None:
    for name, row in SPACINGS.items():
        if "sigma_max" in row.options:
            got = space(name, SD1, 12, {"sigma_min": 0.1, "sigma_max": "10"}).sigmas
            assert got[0] == pytest.approx(10) and (name == "sgm_uniform" or got[-2] == pytest.approx(0.1))
    for name in ("karras", "polyexponential"):
        steep, flat = (space(name, SD1, 9, {"rho": rho}).sigmas[4] for rho in (12.0, 1.5))
        assert steep < flat if name == "karras" else steep != flat
    assert space("beta", SD1, 9, {"alpha": 1, "beta": 1}).sigmas[4] == pytest.approx((LOW + HIGH) / 2)
    assert SPACINGS["karras"].options == {"rho": 7.0, "sigma_min": None, "sigma_max": None}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("uniform", {"rho": 7}, "no option 'rho'\nIt has no options"),
        ("karras", {"roh": 7}, "no option 'roh'\nDid you mean 'rho'"),
        ("karras", {"rho": 0}, "rho is 0; allowed is a finite number above 0"),
        ("karras", {"rho": "seven"}, "rho is 'seven'"),
        ("karras", {"rho": math.inf}, "above 0"),
        ("karras", {"rho": 1e-3}, "do not descend"),
        ("beta", {"alpha": 1e-9}, "do not descend"),
        ("karras", {"sigma_min": 20}, "sigma_min is 20"),
        ("normal", {"sigma_min": 20, "sigma_max": 30}, "one side"),
        ("beta", {"axis": "time"}, "Did you mean 'timestep'"),
        ("align_your_steps", {"table": "sd2"}, "Did you mean 'sd1'"),
        ("turbo", {"trained_steps": 2000}, "trained_steps is 2000"),
        ("karas", {}, "Did you mean 'karras'"),
    ],
)
def test_refused_options(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        space(name, SD1, 5, options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("leading", 201), ("trailing", 201), ("simple", 201), ("quad", 201), ("lcm", 201), ("uniform", 0),
     ("karras", -1), ("gits", 0), ("beta", 0)],
)  # fmt: skip
def test_refused_steps(name: str, steps: int) -> None:
    for call in (lambda: SPACINGS[name](SHORT, steps), lambda: space(name, SHORT, steps)):
        with pytest.raises(InputError, match=f"steps is {steps}"):
            call()


def test_the_number_of_steps_that_a_message_names_is_the_one_given() -> None:
    with pytest.raises(InputError, match="steps is 200; allowed is 1 to 199"):
        space("trailing", SHORT, 200, discard_penultimate=True)
    with pytest.raises(InputError, match="steps is 0; allowed is at least 1"):
        space("karras", SHORT, 0, discard_penultimate=True)


def test_custom() -> None:
    assert custom([14, 3, 1, 0]) == Spacing([14.0, 3.0, 1.0, 0.0], 14.0)
    assert custom((5.0, 0.3)).sigmas == [5.0, 0.3]
    for wrong in (
        [],
        [1.0],
        [1.0, 2.0],
        [1.0, 1.0],
        [1.0, -1.0],
        [math.inf, 1.0],
        [math.nan, 1.0],
        [3, 0, 0],
    ):
        with pytest.raises(InputError, match="two or more that descend"):
            custom(wrong)


def test_names() -> None:
    assert spacing("karras").function is karras
    with pytest.raises(InputError, match="karras"):
        spacing("karas")
    assert {row.spacing for row in SAMPLERS.values()} <= set(SPACINGS)
    assert len({row.title for row in SPACINGS.values()}) == len(SPACINGS)
    whole = {key for key, row in SPACINGS.items() if row.whole}
    assert whole == {"leading", "trailing", "quad", "ddim_uniform", "simple", "turbo", "lcm"}

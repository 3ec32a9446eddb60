"""The numbers of the schedules, and the map between timestep and sigma."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())


@pytest.mark.parametrize(
    ("config", "abar", "amplitude", "snr", "sigma_max"),
    [
        (ScheduleConfig(), 4.660e-3, 0.0683, 4.68e-3, 14.615),
        (ScheduleConfig("linear", 1000, 1e-4, 0.02), 4.036e-5, 0.0064, 4.04e-5, 157.4),
        (ScheduleConfig("linear", 200, 1e-4, 0.02), 0.1322, 0.364, 0.152, 2.562),
    ],
    ids=["stable diffusion", "ddpm", "short"],
)
def test_last_timestep(
    config: ScheduleConfig, abar: float, amplitude: float, snr: float, sigma_max: float
) -> None:
    schedule = Schedule(config)
    last = schedule.alphas_cumprod[-1].item()
    assert last == pytest.approx(abar, rel=5e-4)
    assert math.sqrt(last) == pytest.approx(amplitude, abs=5e-4 if amplitude > 0.1 else 5e-5)
    assert last / (1 - last) == pytest.approx(snr, rel=3e-3)
    assert schedule.sigma_max == pytest.approx(sigma_max, rel=5e-4)
    assert schedule.sigma_max == schedule.sigmas[-1].item()


def test_stable_diffusion_sigma_min() -> None:
    assert SD1.sigma_min == pytest.approx(0.02917, abs=5e-6)


REFERENCES = [
    (ScheduleConfig(), "scaled_linear"),
    (ScheduleConfig("linear", 400, 1e-4, 0.02), "linear"),
    (ScheduleConfig("sigmoid", 300, 1e-4, 0.02), "sigmoid"),
    (ScheduleConfig("sigmoid"), "sigmoid"),
    (ScheduleConfig("cosine", 500), "squaredcos_cap_v2"),
    (ScheduleConfig("betas", 50, betas=tuple(0.001 + 0.0003 * i for i in range(50))), "trained"),
]


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("config", "name"), REFERENCES)
def test_against_diffusers(config: ScheduleConfig, name: str, rescale: bool) -> None:
    schedule = Schedule(replace(config, zero_terminal_snr=rescale))
    reference = DDPMScheduler(
        config.num_timesteps,
        config.beta_start,
        config.beta_end,
        "linear" if name == "trained" else name,  # pyright: ignore[reportArgumentType]
        trained_betas=None if config.betas is None else list(config.betas),
        rescale_betas_zero_snr=rescale,
    )
    rows = slice(0, -1) if rescale else slice(None)  # the last one is 0 there, and 2^-24 here
    for mine, theirs in (
        (schedule.betas, reference.betas),
        (schedule.alphas_cumprod, reference.alphas_cumprod),
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine[rows].float(), theirs[rows], rtol=2e-4, atol=5e-7)  # float32 there


def test_kinds_under_other_names() -> None:
    assert ScheduleConfig("squaredcos_cap_v2") == ScheduleConfig("cosine")
    for config in (ScheduleConfig("sigmoid"), ScheduleConfig("sigmoid", 200, 1e-4, 0.02)):
        betas = Schedule(config).betas
        middle = (config.beta_start + config.beta_end) / 2
        assert betas[0] + betas[-1] == pytest.approx(2 * middle) and float(betas.median()) < middle * 1.01
        share = (betas[0] - config.beta_start) / (config.beta_end - config.beta_start)
        assert float(share) == pytest.approx(1 / (1 + math.exp(6)))


@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "sigmoid", "cosine"])
def test_zero_terminal_snr(kind: str) -> None:
    plain = Schedule(ScheduleConfig(kind))
    schedule = Schedule(ScheduleConfig(kind, zero_terminal_snr=True))
    assert schedule.alphas_cumprod[-1].item() == 2**-24
    assert schedule.sigma_max == pytest.approx(4096, abs=1e-3)
    assert schedule.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    torch.testing.assert_close(torch.cumprod(schedule.alphas, 0), schedule.alphas_cumprod, rtol=1e-9, atol=0)


def test_given_betas() -> None:
    given_betas = [0.1, 0.2, 0.4]
    schedule = Schedule(ScheduleConfig("betas", 3, betas=tuple(given_betas)))
    assert schedule.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.432])
    assert ScheduleConfig("betas", 3, betas=given_betas) == schedule.config  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given_config", "words"),
    [
        ({"kind": "scaled_liner"}, "scaled_linear"),
        ({"num_timesteps": 1}, "at least 2"),
        ({"kind": "betas"}, "betas"),
        ({"betas": (0.1, 0.2)}, "both or neither"),
        ({"kind": "betas", "betas": (0.1, 0.2)}, "num_timesteps=2"),
        ({"kind": "betas", "num_timesteps": 2, "betas": (0.1, 1.0)}, r"inside \(0, 1\)"),
        ({"kind": "linear", "beta_start": 0.0}, r"inside \(0, 1\)"),
        ({"kind": "betas", "num_timesteps": 2, "betas": (0.1, 1e-17)}, "do not grow"),
    ],
)
def test_refused(given_config: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Schedule(ScheduleConfig(**given_config))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "config",
    [
        ScheduleConfig(),
        ScheduleConfig("linear", 200, 1e-4, 0.02),
        ScheduleConfig("cosine"),
        ScheduleConfig(zero_terminal_snr=True),
    ],
)
def test_whole_timesteps_are_exact(config: ScheduleConfig) -> None:
    schedule = Schedule(config)
    for t in range(schedule.num_timesteps):
        assert schedule.sigma(t) == schedule.sigmas[t].item()
        assert schedule.timestep(schedule.sigma(t)) == t


@settings(deadline=None)  # a busy machine is not a failure
@given(st.floats(0, 999))
def test_timestep_inverts_sigma(t: float) -> None:
    assert SD1.timestep(SD1.sigma(t)) == pytest.approx(t, abs=1e-8)


def piecewise(log_sigmas: Tensor, sigma: float) -> float:
    """k-diffusion's rule in its own terms: a weight between the two neighbours in log sigma, clamped."""
    low = int((log_sigmas <= math.log(sigma)).sum().clamp(1, len(log_sigmas) - 1)) - 1
    span = log_sigmas[low + 1] - log_sigmas[low]
    return low + float(((math.log(sigma) - log_sigmas[low]) / span).clamp(0, 1))


@settings(deadline=None)  # a busy machine is not a failure
@given(st.floats(-5, 4))
def test_timestep_is_piecewise_linear_in_log_sigma(log_sigma: float) -> None:
    sigma = math.exp(log_sigma)
    assert SD1.timestep(sigma) == pytest.approx(piecewise(SD1.sigmas.log(), sigma), abs=1e-8)


def test_clamped() -> None:
    assert SD1.timestep(1e-9) == 0
    assert SD1.timestep(0.0) == 0
    assert SD1.timestep(1e9) == 999
    assert SD1.sigma(-1) == SD1.sigma_min
    assert SD1.sigma(5000) == SD1.sigma_max


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=dtype)
    t = torch.tensor([0, 500, 999])
    alpha, sigma = SD1.alpha_sigma(t, x0)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == dtype
    noisy = SD1.add_noise(x0, noise, t)
    for row, step in enumerate(t.tolist()):
        abar = SD1.alphas_cumprod[step].item()
        expected = math.sqrt(abar) * x0[row] + math.sqrt(1 - abar) * noise[row]
        torch.testing.assert_close(noisy[row], expected)

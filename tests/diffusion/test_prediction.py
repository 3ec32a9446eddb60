"""What networks predict, and the predictor that makes a denoiser of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import PREDICTIONS, Predictor, paired
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x0, noise = torch.randn(2, 4, 3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x0, noise


@pytest.mark.parametrize("name", PREDICTIONS)
def test_to_x0_inverts_target(name: str) -> None:
    x0, noise = pair(torch.float64)
    t = torch.tensor([0, 1, 500, 999])
    alpha, sigma = SD1.alpha_sigma(t, x0)
    raw = PREDICTIONS[name].target(x0, noise, alpha, sigma)
    got = PREDICTIONS[name].to_x0(raw, SD1.add_noise(x0, noise, t), alpha, sigma)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-12)


def test_targets() -> None:
    x0, noise = pair(torch.float64)
    assert PREDICTIONS["eps"].target(x0, noise, 0.6, 0.8) is noise
    assert PREDICTIONS["x0"].target(x0, noise, 0.6, 0.8) is x0
    torch.testing.assert_close(PREDICTIONS["v"].target(x0, noise, 0.6, 0.8), 0.6 * noise - 0.8 * x0)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 321, 999])
def test_predictor_with_a_network_that_is_always_right(name: str, t: int) -> None:
    x0, noise = pair(torch.float64)
    seen: list[tuple[Tensor, Tensor, Conditioning]] = []
    steps = torch.full((4,), t)

    def network(x: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        seen.append((x, timesteps, cond))
        return PREDICTIONS[name].target(x0, noise, *SD1.alpha_sigma(steps, x0))

    cond = Conditioning(vector=torch.arange(4))
    got = Predictor(network, SD1, name)(x0 + SD1.sigma(t) * noise, SD1.sigma(t), cond)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-12)
    x, timesteps, passed = seen[0]
    torch.testing.assert_close(x, SD1.add_noise(x0, noise, steps), rtol=0, atol=1e-12)
    assert timesteps.dtype == torch.float32
    assert timesteps.tolist() == [t] * 4
    assert passed is cond


def test_between_timesteps() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append(t)
        return x

    sigma = (SD1.sigma(10) * SD1.sigma(11)) ** 0.5
    Predictor(network, SD1, "eps")(torch.zeros(1, 1, 2, 2), sigma, Conditioning())
    assert seen[0].item() == pytest.approx(10.5, abs=1e-5)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_half_precision_stays_inside_the_network(name: str) -> None:
    seen: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.extend([x.dtype, t.dtype])
        return x

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    got = Predictor(network, SD1, name, torch.bfloat16)(x, 2.0, Conditioning())
    assert seen == [torch.bfloat16, torch.float32]
    assert got.dtype == torch.float32


def test_zero_terminal_snr_is_refused_for_eps() -> None:
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=True))
    with pytest.raises(InputError, match="zero_terminal_snr"):
        Predictor(lambda x, t, cond: x, schedule, "eps")
    x0, noise = pair(torch.float32)
    sigma = schedule.sigma_max
    alpha, sigma_vp = schedule.alpha_sigma(torch.full((4,), 999), x0)
    for name in ("v", "x0"):
        raw = paired(name, schedule).target(x0, noise, alpha, sigma_vp)
        got = Predictor(lambda x, t, cond, raw=raw: raw, schedule, name)(
            x0 + sigma * noise, sigma, Conditioning()
        )
        torch.testing.assert_close(got, x0, rtol=0, atol=2e-6)


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="eps"):
        paired("epsilon", SD1)

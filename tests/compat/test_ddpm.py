"""The schedule's buffers and closed forms against the original's register_schedule, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.compat.ldm import DDPM
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError, ResourceError

SCHEDULES = {
    "sd1": ScheduleConfig(),
    "cin256": ScheduleConfig(beta_start=0.0015, beta_end=0.0195),
    "notes": ScheduleConfig(kind="linear", num_timesteps=200, beta_start=1e-4, beta_end=0.02),
}


def reference(config: ScheduleConfig, v_posterior: float) -> dict[str, np.ndarray]:
    """Ho et al. 2020, equations 4 and 7, in the original's names."""
    count = config.num_timesteps
    if config.kind == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, count)
    else:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    abar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], abar[:-1]])
    posterior = (1 - v_posterior) * betas * (1 - before) / (1 - abar) + v_posterior * betas
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": np.log(np.maximum(posterior, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - abar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - abar),
    }


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("v_posterior", [0.0, 0.5])
def test_buffers_are_the_originals(name: str, v_posterior: float) -> None:
    model = DDPM(Schedule(SCHEDULES[name]), "eps", v_posterior)
    wanted = reference(SCHEDULES[name], v_posterior)
    assert set(model.state_dict()) == set(wanted)  # lvlb_weights are not stored, as in the original
    for key, values in wanted.items():
        given = getattr(model, key)
        assert given.dtype == torch.float32
        np.testing.assert_allclose(given.numpy(), values, rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_variational_weights(prediction: str) -> None:
    config = SCHEDULES["sd1"]
    model, tables = DDPM(Schedule(config), prediction), reference(config, 0.0)
    betas, abar = tables["betas"], tables["alphas_cumprod"]
    with np.errstate(divide="ignore"):
        wanted = {
            "eps": betas**2 / (2 * tables["posterior_variance"] * (1 - betas) * (1 - abar)),
            "x0": 0.5 * np.sqrt(abar) / (2.0 * 1 - abar),
            "v": np.ones_like(betas),
        }[prediction]
    wanted[0] = wanted[1]
    np.testing.assert_allclose(model.lvlb_weights.numpy(), wanted, rtol=1e-5)


def test_closed_forms_invert_each_other() -> None:
    model = DDPM(Schedule(ScheduleConfig()), "v")
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    t = torch.tensor([0, 400, 700])
    x = model.q_sample(x0, t, noise)
    torch.testing.assert_close(model.predict_start_from_noise(x, t, noise), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model._predict_eps_from_xstart(x, t, x0), noise, atol=1e-3, rtol=1e-3)
    v = model.get_v(x0, noise, t)
    torch.testing.assert_close(model.predict_start_from_z_and_v(x, t, v), x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.predict_eps_from_z_and_v(x, t, v), noise, atol=1e-5, rtol=1e-5)
    mean, variance, log_variance = model.q_mean_variance(x0, t)
    torch.testing.assert_close(mean + variance.sqrt() * noise, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_variance, variance.log(), atol=1e-4, rtol=1e-4)


def test_posterior_is_bayes_rule() -> None:
    model = DDPM(Schedule(ScheduleConfig()), "eps")
    x0, x_t, t = torch.tensor([[0.3]]), torch.tensor([[-0.8]]), torch.tensor([500])
    mean, variance, _ = model.q_posterior(x0, x_t, t)
    # q(x_{t-1} | x_0) times q(x_t | x_{t-1}), both Gaussian in x_{t-1}
    before, beta = model.alphas_cumprod[499].double(), model.betas[500].double()
    precision = 1 / (1 - before) + (1 - beta) / beta
    centre = (before.sqrt() * 0.3 / (1 - before) + (1 - beta).sqrt() * -0.8 / beta) / precision
    assert float(mean) == pytest.approx(float(centre), rel=1e-4)
    assert float(variance) == pytest.approx(float(1 / precision), rel=1e-3)


def test_half_precision_leaves_the_schedule_alone() -> None:
    model = DDPM(Schedule(ScheduleConfig()), "eps").half()
    assert model.betas.dtype == model.alphas_cumprod.dtype == torch.float32
    assert torch.equal(model.betas, Schedule(ScheduleConfig()).betas.float())
    assert model.to("meta").betas.is_meta and model.device.type == "meta"


def test_cuda_is_refused_in_words_where_there_is_none() -> None:
    model = DDPM(Schedule(ScheduleConfig()), "eps")
    if torch.cuda.is_available():
        assert model.cuda().device.type == "cuda"
    else:
        with pytest.raises(ResourceError, match="'cuda' is not there"):
            model.cuda()


def test_an_unknown_parameterization() -> None:
    with pytest.raises(InputError, match="no prediction 'mu'"):
        DDPM(Schedule(ScheduleConfig()), "mu")

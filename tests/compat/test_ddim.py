"""`DDIMSampler` against the original's update formula, written out in the network's own coordinates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.compat.ldm import DDIMSampler, LatentDiffusion, make_ddim_timesteps
from sfumato.errors import InputError
from sfumato.model import StableDiffusion

SHAPE = (2, 8, 8)


def with_prediction(model: StableDiffusion, prediction: str) -> StableDiffusion:
    assert model.autoencoder is not None and model.text_encoder is not None
    parts = {"unet": model.unet, "autoencoder": model.autoencoder, "text": model.text_encoder}
    return StableDiffusion(dataclasses.replace(model.config, prediction=prediction), parts)


def original_loop(
    model: LatentDiffusion,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    scale: float,
    steps: int,
    eta: float,
) -> Tensor:
    """Song et al. 2021, equation 12, at the timesteps 1, 1 + c, 1 + 2c, ... and then 0."""
    stride = 1000 // steps
    times = [t + 1 for t in range(0, 1000, stride)]
    abar = model.schedule.alphas_cumprod.numpy()
    for index in reversed(range(len(times))):
        a, before = abar[times[index]], abar[times[index - 1]] if index else abar[0]
        t = torch.full((len(x),), times[index])
        raw = model.apply_model(x, t, cond)
        if uncond is not None:
            without = model.apply_model(x, t, uncond)
            raw = without + scale * (raw - without)
        eps = raw if model.parameterization == "eps" else a**0.5 * raw + (1 - a) ** 0.5 * x
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)) ** 0.5
        noise = torch.randn(x.shape).to(x.dtype)
        x = before**0.5 * x0 + (1 - before - sigma**2) ** 0.5 * eps + sigma * noise
    return x


@pytest.fixture
def model(tiny_model: StableDiffusion) -> LatentDiffusion:
    return LatentDiffusion(tiny_model)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("steps", "eta", "scale"), [(5, 0.0, 1.0), (7, 0.6, 2.5), (4, 1.0, 0.0)])
def test_it_is_the_originals_loop(
    tiny_model: StableDiffusion, prediction: str, steps: int, eta: float, scale: float
) -> None:
    """In float64, where two ways to the same number cannot hide a different formula."""
    model = LatentDiffusion(with_prediction(tiny_model, prediction)).double()
    cond = model.get_learned_conditioning(["a red apple", "a fox"])
    uncond = None if scale == 1.0 else model.get_learned_conditioning(["", ""])
    start = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.manual_seed(3)
    wanted = original_loop(model, start, cond, uncond, scale, steps, eta)
    torch.manual_seed(3)
    given, drawn = DDIMSampler(model).sample(
        S=steps, batch_size=2, shape=SHAPE, conditioning=cond, eta=eta, verbose=False, x_T=start,
        unconditional_guidance_scale=scale, unconditional_conditioning=uncond,
    )  # fmt: skip
    # The network's timestep embedding is float32; all else is not.
    torch.testing.assert_close(given, wanted, atol=1e-9, rtol=1e-9)
    # the start, the first step, and the step of index 0
    assert len(drawn["x_inter"]) == len(drawn["pred_x0"]) == 3
    assert torch.equal(drawn["x_inter"][-1], given)


def test_in_single_precision_from_the_global_generator(model: LatentDiffusion) -> None:
    cond, uncond = (model.get_learned_conditioning([prompt]) for prompt in ("a red apple", ""))
    torch.manual_seed(3)
    wanted = original_loop(model, torch.randn(1, *SHAPE), cond, uncond, 1.5, 10, 0.3)
    torch.manual_seed(3)
    given, _ = DDIMSampler(model).sample(
        10, 1, SHAPE, cond, eta=0.3, unconditional_guidance_scale=1.5, unconditional_conditioning=uncond
    )
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def test_as_much_noise_is_drawn_as_by_the_original(model: LatentDiffusion) -> None:
    cond = model.get_learned_conditioning("a fox")
    torch.manual_seed(5)
    DDIMSampler(model).sample(4, 1, SHAPE, cond)
    after = torch.randn(2)
    torch.manual_seed(5)
    original_loop(model, torch.randn(1, *SHAPE), cond, None, 1.0, 4, 0.0)
    assert torch.equal(torch.randn(2), after)


def test_start_noise_that_is_given(model: LatentDiffusion) -> None:
    cond, start = model.get_learned_conditioning("a fox"), torch.randn(1, *SHAPE)
    first, _ = DDIMSampler(model).sample(3, 1, SHAPE, cond, x_T=start)
    second, _ = DDIMSampler(model).sample(3, 1, SHAPE, cond, x_T=start)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("steps", "count", "first", "last"), [(50, 50, 1, 981), (30, 31, 1, 991), (1, 1, 1, 1)]
)
def test_timesteps(steps: int, count: int, first: int, last: int) -> None:
    found = make_ddim_timesteps("uniform", steps, 1000)
    assert (len(found), found[0], found[-1]) == (count, first, last)


@pytest.mark.parametrize("steps", [36, 333, 600, 1000])
def test_steps_that_leave_the_originals_schedule(steps: int) -> None:
    found = make_ddim_timesteps("uniform", steps, 1000)
    wanted = [t + 1 for t in range(0, 1000, 1000 // steps)]
    assert wanted[-1] == 1000 and found.tolist() == wanted[:-1]


def test_quadratic_timesteps() -> None:
    found = make_ddim_timesteps("quad", 10, 1000)
    wanted = (np.linspace(0, np.sqrt(800), 10) ** 2).astype(int) + 1
    assert found.tolist() == wanted.tolist()


def test_errors_say_what_is_allowed(model: LatentDiffusion) -> None:
    sampler, cond = DDIMSampler(model), model.get_learned_conditioning("a fox")
    with pytest.raises(InputError, match="allowed is 1 to 1000"):
        sampler.sample(0, 1, SHAPE, cond)
    with pytest.raises(InputError, match="no discretization 'even'"):
        sampler.make_schedule(10, "even")
    with pytest.raises(InputError, match="without x0"):
        sampler.sample(2, 1, SHAPE, cond, mask=torch.ones(1, 1, 8, 8))
    with pytest.raises(InputError, match="different kinds"):
        sampler.sample(
            2,
            1,
            SHAPE,
            {"c_crossattn": [cond]},
            unconditional_guidance_scale=2,
            unconditional_conditioning=cond,
        )
    sampler.make_schedule(10)
    with pytest.raises(InputError, match="steps 0 to 9"):
        sampler.stochastic_encode(torch.zeros(1, *SHAPE), torch.tensor([10]))


def test_what_a_mask_keeps_follows_x0(model: LatentDiffusion) -> None:
    """The last step is taken from timestep 1, so that the kept part is x0 but for that step's noise."""
    cond, kept = model.get_learned_conditioning("a fox"), torch.full((1, *SHAPE), 3.0)
    mask = torch.zeros(1, 1, 8, 8)
    seen: list[Tensor] = []
    original = model.apply_model

    def spy(x_noisy: Tensor, t: Tensor, c: Tensor) -> Tensor:
        seen.append(x_noisy)
        return original(x_noisy, t, c)

    model.apply_model = spy  # type: ignore[method-assign]
    mask[..., :4] = 1
    DDIMSampler(model).sample(3, 1, SHAPE, cond, mask=mask, x0=kept)
    assert (seen[-1][..., :4] - 3.0).abs().max() < 0.3  # sqrt(abar_1) x0 + 0.04 noise
    assert (seen[-1][..., 4:] - 3.0).abs().mean() > 0.5


def test_callbacks_see_every_step(model: LatentDiffusion) -> None:
    counts: list[int] = []
    shown: list[tuple[int, tuple[int, ...]]] = []
    DDIMSampler(model).sample(
        4, 1, SHAPE, model.get_learned_conditioning("a fox"),
        callback=counts.append, img_callback=lambda x0, i: shown.append((i, tuple(x0.shape))),
    )  # fmt: skip
    assert counts == [0, 1, 2, 3]
    assert shown == [(i, (1, *SHAPE)) for i in range(4)]


def test_temperature_and_dropout_act_on_the_noise_alone(model: LatentDiffusion) -> None:
    cond, start = model.get_learned_conditioning("a fox"), torch.randn(1, *SHAPE)
    sampler = DDIMSampler(model)
    still, _ = sampler.sample(3, 1, SHAPE, cond, x_T=start, eta=1.0, temperature=0.0)
    dropped, _ = sampler.sample(3, 1, SHAPE, cond, x_T=start, eta=1.0, noise_dropout=1.0)
    noisy, _ = sampler.sample(3, 1, SHAPE, cond, x_T=start, eta=1.0)
    assert torch.equal(still, dropped) and not torch.allclose(still, noisy, atol=1e-2)


def test_part_of_a_run(model: LatentDiffusion) -> None:
    """Noising to the start of a step and decoding from there is the tail of the original's loop."""
    sampler, cond = DDIMSampler(model), model.get_learned_conditioning("a fox")
    sampler.make_schedule(10, ddim_eta=0.0)
    x0, noise = torch.randn(2, 1, *SHAPE)
    x = sampler.stochastic_encode(x0, torch.tensor([4]), noise=noise)
    abar = model.alphas_cumprod[401]
    torch.testing.assert_close(x, abar.sqrt() * x0 + (1 - abar).sqrt() * noise)
    given = sampler.decode(x, cond, 4)
    for index in reversed(range(4)):
        x, _ = sampler.p_sample_ddim(x, cond, torch.tensor([1 + 100 * index]), index)
    assert torch.equal(given, x)


def test_the_original_steps_are_all_timesteps(model: LatentDiffusion) -> None:
    sampler, cond = DDIMSampler(model), model.get_learned_conditioning("a fox")
    sampler.make_schedule(10)
    x0, noise = torch.randn(2, 1, *SHAPE)
    x = sampler.stochastic_encode(x0, torch.tensor([2]), use_original_steps=True, noise=noise)
    torch.testing.assert_close(x, model.q_sample(x0, torch.tensor([2]), noise))
    given = sampler.decode(x, cond, 3, use_original_steps=True)
    for t in (2, 1, 0):
        a, before = model.alphas_cumprod[t], model.alphas_cumprod_prev[t]
        eps = model.apply_model(x, torch.tensor([t]), cond)
        x = before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps
    torch.testing.assert_close(given, x, atol=1e-5, rtol=1e-5)


def test_a_model_in_half_precision_samples_in_single(model: LatentDiffusion) -> None:
    cond = model.half().get_learned_conditioning("a fox")
    assert cond.dtype == torch.float16
    samples, _ = DDIMSampler(model).sample(2, 1, SHAPE, cond)
    assert samples.dtype == torch.float32 and bool(torch.isfinite(samples).all())

"""`PLMSSampler` against the original's update formula, written out in the network's own coordinates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.compat.ldm import LatentDiffusion, PLMSSampler
from sfumato.errors import InputError
from sfumato.model import StableDiffusion

SHAPE = (2, 8, 8)


def original_loop(model: LatentDiffusion, x: Tensor, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Liu et al. 2022, section 3.4, at the timesteps 1, 101, ..., 901, each step down to the one before."""
    times = list(range(1, 1000, 100))
    abar = model.schedule.alphas_cumprod

    def eps(x: Tensor, time: int) -> Tensor:
        t = torch.full((len(x),), time)
        without, given = model.apply_model(x, t, uncond), model.apply_model(x, t, cond)
        return without + scale * (given - without)

    def step(x: Tensor, e: Tensor, index: int) -> Tensor:
        a, before = abar[times[index]], abar[times[index - 1]] if index else abar[0]
        x0 = (x - (1 - a).sqrt() * e) / a.sqrt()
        return before.sqrt() * x0 + (1 - before).sqrt() * e

    old: list[Tensor] = []
    for index in reversed(range(len(times))):
        e = eps(x, times[index])
        if not old:
            e_used = (e + eps(step(x, e, index), times[max(index - 1, 0)])) / 2
        elif len(old) == 1:
            e_used = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            e_used = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            e_used = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = step(x, e_used, index)
        old.append(e)
    return x


def test_it_is_the_originals_loop(tiny_model: StableDiffusion) -> None:
    model = LatentDiffusion(tiny_model).double()
    cond = model.get_learned_conditioning(["a red apple", "a fox"])
    uncond = model.get_learned_conditioning(["", ""])
    start = torch.randn(2, *SHAPE, dtype=torch.float64)
    counted: list[int] = []
    given, drawn = PLMSSampler(model).sample(
        10, 2, SHAPE, cond, counted.append, unconditional_guidance_scale=2.0,
        unconditional_conditioning=uncond, x_T=start, log_every_t=5,
    )  # fmt: skip
    torch.testing.assert_close(given, original_loop(model, start, cond, uncond, 2.0), atol=1e-9, rtol=1e-9)
    assert counted == list(range(10)) and torch.equal(drawn["x_inter"][-1], given)
    assert len(drawn["pred_x0"]) == 4  # the start, the first step, and those with 5 and 0 to come


def test_what_is_refused(tiny_model: StableDiffusion) -> None:
    sampler = PLMSSampler(LatentDiffusion(tiny_model))
    with pytest.raises(InputError, match="no noise of its own"):
        sampler.sample(4, 1, SHAPE, eta=0.5)
    with pytest.raises(InputError, match="keeps no part"):
        sampler.sample(4, 1, SHAPE, mask=torch.ones(1, 1, 8, 8), x0=torch.zeros(1, *SHAPE))

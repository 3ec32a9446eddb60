"""The noised small picture of latent upscalers, against the reference's scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from sfumato.diffusion.low_scale import low_scale
from sfumato.errors import InputError


@pytest.mark.parametrize("level", [0, 20, 350])
def test_it_is_noised_as_the_reference_does(level: int) -> None:
    torch.manual_seed(level)
    pictures, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    # low_res_scheduler of stabilityai/stable-diffusion-x4-upscaler
    reference = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    wanted = reference.add_noise(pictures, noise, torch.tensor([level, level]))  # type: ignore[arg-type]
    cond = low_scale(pictures, level, noise)
    # The reference takes 1 - abar in float32, which at level 0 keeps three digits of it.
    assert cond.concat is not None and torch.allclose(cond.concat, wanted, atol=2e-5)
    assert cond.vector is not None and cond.vector.tolist() == [level, level]
    assert not cond.vector.is_floating_point()


def test_other_levels_and_sizes_are_refused() -> None:
    picture = torch.zeros(1, 3, 4, 4)
    for level in (-1, 351):
        with pytest.raises(InputError, match="0 to 350"):
            low_scale(picture, level, picture)
    with pytest.raises(InputError, match="has shape"):
        low_scale(picture, 20, torch.zeros(1, 3, 8, 8))

"""Latents at another size: every mode keeps constants, sizes and what it can of a ramp."""

from __future__ import annotations

import pytest
import torch

from sfumato.diffusion.resize import LATENT_MODES, resize_latents
from sfumato.errors import InputError


@pytest.mark.parametrize("mode", LATENT_MODES)
@pytest.mark.parametrize("size", [(16, 24), (5, 3), (8, 12)])
def test_every_mode_gives_the_size_and_keeps_constants(mode: str, size: tuple[int, int]) -> None:
    latents = torch.full((2, 4, 8, 12), 0.7)
    made = resize_latents(latents, size, mode)
    assert made.shape == (2, 4, *size) and made.dtype == latents.dtype
    assert torch.allclose(made, torch.full_like(made, 0.7), atol=1e-6)


def test_modes_differ_as_their_names_say() -> None:
    torch.manual_seed(0)
    latents = torch.randn(1, 1, 32, 32)
    whole = {mode: resize_latents(latents, (8, 8), mode) for mode in LATENT_MODES}
    # Averaging what falls together leaves less of white noise than picking from it.
    assert whole["bilinear-antialiased"].std() < 0.5 * whole["bilinear"].std()
    assert whole["bicubic-antialiased"].std() < 0.5 * whole["bicubic"].std()
    ramp = torch.arange(3.0).expand(1, 1, 3, 3)
    assert resize_latents(ramp, (3, 6), "nearest")[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    five = torch.arange(5.0).expand(1, 1, 1, 5)
    picked = [resize_latents(five, (1, 2), mode) for mode in ("nearest", "nearest-exact")]
    assert [one[0, 0, 0].tolist() for one in picked] == [[0, 2], [1, 3]]


def test_other_modes_are_refused() -> None:
    with pytest.raises(InputError, match="no mode 'lanczos'"):
        resize_latents(torch.zeros(1, 1, 2, 2), (4, 4), "lanczos")
    with pytest.raises(InputError, match="at least 1"):
        resize_latents(torch.zeros(1, 1, 2, 2), (0, 4))

"""Noise belongs to a picture and its seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.noise import ImageNoise
from sfumato.errors import InputError

CPU = torch.device("cpu")
SHAPE = (4, 3, 5)


def draws(noise: ImageNoise) -> Tensor:
    return torch.stack([noise.initial(), noise(3.0, 2.0), noise(2.0, 1.0)])


def test_independent_of_the_batch() -> None:
    batch = draws(ImageNoise([5, 6, 7], SHAPE, device=CPU))
    assert batch.shape == (3, 3, *SHAPE)
    assert batch.dtype == torch.float32
    for row, seed in enumerate([5, 6, 7]):
        assert torch.equal(batch[:, row : row + 1], draws(ImageNoise([seed], SHAPE, device=CPU)))
    assert torch.equal(batch[:, [2, 0]], draws(ImageNoise([7, 5], SHAPE, device=CPU)))


def test_every_draw_is_new() -> None:
    noise = ImageNoise([1, 2], SHAPE, device=CPU)
    values = [*noise.initial(), *noise(2.0, 1.0), *noise(2.0, 1.0)]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(noise.initial(), torch.stack(values[:2]))


def test_standard_normal() -> None:
    values = ImageNoise([3], (1000, 200), device=CPU)(1.0, 0.5)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)


def test_never_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = draws(ImageNoise([1, 2], SHAPE, device=CPU))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(draws(ImageNoise([1, 2], SHAPE, device=CPU)), first)


@pytest.mark.parametrize("shape", [SHAPE, (1, *SHAPE), (2, *SHAPE)])
def test_given_start(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    drawn, given = (ImageNoise([1, 2], SHAPE, device=CPU, start=value) for value in (None, start))
    assert torch.equal(given.initial(), start.float().expand(2, *SHAPE))
    assert torch.equal(
        given(2.0, 1.0), drawn(2.0, 1.0)
    )  # the later noise is the seed's, and is not its start noise


@pytest.mark.parametrize("shape", [(3, *SHAPE), (4, 3, 6), (1,)])
def test_wrong_start(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="start noise has shape"):
        ImageNoise([1, 2], SHAPE, device=CPU, start=torch.zeros(shape))

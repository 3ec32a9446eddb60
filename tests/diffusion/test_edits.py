"""Masked diffusion: what is known stays, soft masks open over the run, rows and parts agree."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sfumato.diffusion.edits import Masked, masked
from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import SAMPLERS, sampler
from sfumato.errors import InputError

SIGMAS = [10.0, 5.0, 2.0, 0.5, 0.0]
SHAPE = (2, 3, 4, 4)


def values(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def left_half() -> Tensor:
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    return mask


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if "schedule" not in row.options])
def test_every_sampler_keeps_what_is_known(name: str) -> None:
    known, noise = values(1), values(2)
    denoise = masked(Unguided(lambda x, sigma: torch.tanh(x)), known, noise, left_half())
    fresh = torch.Generator().manual_seed(3)
    row = sampler(name)
    *_, last = row(denoise, 10 * noise, SIGMAS, lambda *_: torch.randn(SHAPE, generator=fresh))
    if last.target == 0:
        torch.testing.assert_close(last.x[..., 2:], known[..., 2:])
    assert (last.x[..., :2] - known[..., :2]).abs().max() > 0.1


def test_the_network_sees_the_known_as_noisy_as_the_rest() -> None:
    seen: list[Tensor] = []
    known, noise, x = values(1), values(2), values(3)
    denoise = masked(Unguided(lambda x, sigma: seen.append(x) or x), known, noise, left_half())
    denoise(x, 4.0)
    torch.testing.assert_close(seen[0][..., 2:], (known + 4 * noise)[..., 2:])
    assert torch.equal(seen[0][..., :2], x[..., :2])


@dataclass(frozen=True)
class Ahead:
    """A denoiser whose parts differ, and whose rows are counted from the first."""

    first: int = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return x + torch.arange(self.first, self.first + len(x)).view(-1, 1, 1, 1)

    def parts(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return self(x, sigma), x

    def rows(self, start: int, stop: int) -> Ahead:
        return Ahead(self.first + start)


def test_parts_and_rows() -> None:
    denoise = masked(Ahead(), values(1), values(2), left_half())
    x = values(3)
    guided, unguided = denoise.parts(x, 2.0)
    torch.testing.assert_close(guided, denoise(x, 2.0))
    assert torch.equal(guided[..., 2:], unguided[..., 2:]) and not torch.equal(guided, unguided)
    torch.testing.assert_close(denoise.rows(1, 2)(x[1:], 2.0), denoise(x, 2.0)[1:])


def soft(grey: float) -> Masked:
    return masked(Ahead(), values(1), values(2), torch.full((2, 1, 4, 4), grey), SIGMAS)


@pytest.mark.parametrize(
    ("grey", "free"),
    [(1.0, [1, 1, 1, 1]), (0.75, [0, 1, 1, 1]), (0.5, [0, 0, 1, 1]), (0.3, [0, 0, 0, 1]), (0.0, [0] * 4)],
)
def test_a_soft_mask_opens_as_image_to_image_of_its_grey_would_begin(grey: float, free: list[int]) -> None:
    assert [int(soft(grey).free(sigma).max()) for sigma in SIGMAS[:-1]] == free


def test_between_two_levels_a_soft_mask_is_as_at_the_higher() -> None:
    assert soft(0.5).free(2.0).max() == 1 and soft(0.5).free(2.1).max() == 0
    assert soft(1.0).free(12.0).max() == 1  # raised by churn
    assert soft(0.75).free(12.0).max() == 0


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"They should be \(2, 1, 4, 4\)"):
        masked(Ahead(), values(1), values(2), torch.ones(1, 1, 4, 4))

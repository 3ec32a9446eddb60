"""Ways between noises and conditions: both ends reached, lengths kept, kinds checked."""

from __future__ import annotations

import pytest
import torch

from sfumato.conditioning import Conditioning
from sfumato.diffusion.interpolate import between_conditions, between_noises, positions
from sfumato.errors import InputError


def test_positions_go_through_every_station() -> None:
    assert positions(2, 2) == [(0, 0.0), (0, 0.5), (1, 0.0)]
    assert positions(2, 2, loop=True) == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]
    assert len(positions(4, 5)) == 16
    for keys, frames in ((1, 4), (3, 0)):
        with pytest.raises(InputError, match="two stations"):
            positions(keys, frames)


def test_noise_between_is_as_large_as_noise() -> None:
    torch.manual_seed(0)
    noises = [torch.randn(1, 4, 64, 64) for _ in range(3)]
    assert torch.allclose(between_noises(noises, 1, 0.0), noises[1], atol=1e-6)
    assert torch.allclose(between_noises(noises, 2, 1.0), noises[0], atol=1e-6)
    for share in (0.25, 0.5, 0.75):
        assert between_noises(noises, 0, share).std() == pytest.approx(1, abs=0.02)


def test_conditions_between_are_on_the_line() -> None:
    first = Conditioning(torch.zeros(1, 2, 3), torch.tensor([1]), hints=(torch.zeros(1, 1, 2, 2),))
    second = Conditioning(torch.ones(1, 3, 3), torch.tensor([5]), hints=(torch.ones(1, 1, 2, 2),))
    middle = between_conditions(first, second, 0.25)
    assert middle.context is not None and middle.context.shape == (1, 6, 3)
    assert middle.context.eq(0.25).all() and middle.vector is not None and middle.vector.tolist() == [1]
    assert middle.hints is not None and middle.hints[0].eq(0.25).all()
    later = between_conditions(first, second, 0.5)
    assert later.vector is not None and later.vector.tolist() == [5]


def test_conditions_of_other_kinds_do_not_mix() -> None:
    one = Conditioning(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="vector"):
        between_conditions(one, Conditioning(torch.zeros(1, 2, 3), torch.zeros(1, 2)), 0.5)
    with pytest.raises(InputError, match="do not mix"):
        between_conditions(one, Conditioning(torch.zeros(1, 2, 4)), 0.5)

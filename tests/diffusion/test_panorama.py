"""Large samples in windows: one window is the plain denoiser, seams vanish, regions keep to their masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.panorama import (
    Area,
    Mixture,
    Region,
    Window,
    box,
    cropped,
    everywhere,
    mixture,
    panorama,
    window_weight,
    windows,
)
from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError

SIZE = (12, 20)


def plain(x: Tensor, sigma: float) -> Tensor:
    """A denoiser that sees no further than the value itself."""
    return x / (1 + sigma**2)


def constant(value: float) -> Unguided:
    return Unguided(lambda x, sigma: torch.full_like(x, value))


def whole(
    denoise: Unguided, window: tuple[int, int] = (8, 8), overlap: int = 4, **options: object
) -> Mixture:
    regions = [Region(lambda _: denoise, everywhere(SIZE))]
    return panorama(regions, SIZE, window, overlap, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_one_window_is_the_plain_denoiser(weighting: str) -> None:
    x = torch.randn(2, 4, *SIZE)
    one = whole(Unguided(plain), SIZE, 0, weighting=weighting)
    assert len(one.areas) == 1
    assert torch.equal(one(x, 2.0), plain(x, 2.0))


@pytest.mark.parametrize("wrap", [(False, False), (True, True)])
@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
def test_windows_of_a_local_denoiser_are_the_whole(weighting: str, wrap: tuple[bool, bool]) -> None:
    x = torch.randn(2, 4, *SIZE)
    many = whole(Unguided(plain), weighting=weighting, wrap=wrap)
    assert len(many.areas) > 4
    assert torch.allclose(many(x, 2.0), plain(x, 2.0), atol=1e-6)
    assert all(torch.allclose(each, plain(x, 2.0), atol=1e-6) for each in many.parts(x, 2.0))


def test_it_is_the_mean_of_the_windows_as_the_paper_has_it() -> None:
    """Bar-Tal et al. 2023, eq. 5: sums of the windows' values over counts, written out as loops."""
    x = torch.randn(1, 1, *SIZE)

    def denoise(seen: Tensor, sigma: float) -> Tensor:
        return seen - seen.mean()  # which depends on the window

    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for top in (0, 4):
        for left in (0, 4, 8, 12):
            part = x[:, :, top : top + 8, left : left + 8]
            total[:, :, top : top + 8, left : left + 8] += denoise(part, 1.0)
            count[:, :, top : top + 8, left : left + 8] += 1
    assert torch.allclose(whole(Unguided(denoise))(x, 1.0), total / count, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
    st.integers(0, 15),
    st.tuples(st.booleans(), st.booleans()),
)
def test_windows_cover_every_place_and_overlap(
    size: tuple[int, int], window: tuple[int, int], overlap: int, wrap: tuple[bool, bool]
) -> None:
    overlap = min(overlap, min(window) - 1)
    found = windows(*size, window, overlap, wrap=wrap)
    count = torch.zeros(size)
    for one in found:
        assert (one.height, one.width) == (min(window[0], size[0]), min(window[1], size[1]))
        count[one.places(*size)] += 1
        for start, side, length, round_ in (
            (one.top, one.height, size[0], wrap[0]),
            (one.left, one.width, size[1], wrap[1]),
        ):
            assert start >= 0 and (round_ or start + side <= length)
    assert bool((count > 0).all())
    lefts = sorted({one.left for one in found})
    for first, second in pairwise(lefts):
        assert first + found[0].width - second >= min(overlap, found[0].width - 1)


def test_on_a_circle_the_seam_is_a_place_like_any_other() -> None:
    x = torch.randn(1, 2, *SIZE)

    def blurred(seen: Tensor, sigma: float) -> Tensor:
        return torch.nn.functional.avg_pool2d(seen, 5, 1, 2, count_include_pad=False)

    around = whole(Unguided(blurred), (12, 8), 4, wrap=(False, True))
    rolled = torch.roll(around(torch.roll(x, 4, -1), 1.0), -4, -1)
    assert torch.allclose(rolled, around(x, 1.0), atol=1e-6)


def test_regions_keep_to_their_masks() -> None:
    left = box(SIZE, 0, 0, 12, 10)
    regions = [Region(lambda _: constant(-1), left), Region(lambda _: constant(1), 1 - left)]
    made = panorama(regions, SIZE, (8, 8), 4)
    x0 = made(torch.randn(1, 1, *SIZE), 1.0)[0, 0]
    assert torch.equal(x0[:, :10], torch.full((12, 10), -1.0)) and torch.equal(x0[:, 10:], torch.ones(12, 10))
    # Windows in which a region counts nowhere are not evaluated: 8 would be for each.
    assert len(made.areas) == 12
    soft = [Region(lambda _: constant(-1), left), Region(lambda _: constant(1), 3 * left + (1 - left))]
    assert torch.allclose(panorama(soft, SIZE, (8, 8), 4)(x0[None, None], 1.0)[..., 0], torch.tensor(0.5))


def test_a_sampler_runs_on_it_and_rows_are_parts_of_the_batch() -> None:
    torch.manual_seed(0)

    def shifted(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        return plain(x, sigma) + cond.vector[:, :, None, None]

    branches = {
        name: (shifted, Conditioning(vector=row))
        for name, row in (("cond", torch.randn(3, 4)), ("uncond", torch.zeros(3, 4)))
    }
    both = guided(branches, cfg(2.0))
    made = panorama([Region(lambda _: both, everywhere(SIZE))], SIZE, (8, 8), 2)
    x = torch.randn(3, 4, *SIZE) * 5
    noise = lambda sigma, target: torch.zeros_like(x)  # noqa: E731
    *_, given_ = SAMPLERS["euler"](made, x, [5.0, 1.0, 0.0], noise)
    *_, wanted = SAMPLERS["euler"](both, x, [5.0, 1.0, 0.0], noise)
    assert torch.allclose(given_.x, wanted.x, atol=1e-4)
    assert torch.allclose(made.rows(1, 3)(x[1:], 5.0), made(x, 5.0)[1:], atol=1e-5)
    guided_, unguided = made.parts(x, 5.0)
    assert torch.allclose(unguided, plain(x, 5.0), atol=1e-6) and not torch.allclose(guided_, unguided)


def test_pictures_among_the_conditions_are_cut_at_the_same_place() -> None:
    places = torch.arange(12 * 20.0).reshape(1, 1, *SIZE)
    hint = places.repeat_interleave(8, -1).repeat_interleave(8, -2)
    cond = Conditioning(context=torch.ones(1, 2, 3), concat=places, hints=(hint,))
    cut = cropped(cond, Window(2, 17, 4, 6), SIZE)
    assert cut.concat is not None and cut.hints is not None
    assert torch.equal(cut.concat[0, 0, 0], torch.tensor([57.0, 58, 59, 40, 41, 42]))
    assert torch.equal(cut.hints[0][..., ::8, ::8], cut.concat) and cut.context is cond.context


def test_a_box_fades_outwards() -> None:
    mask = box((6, 8), 2, 2, 2, 3, feather=1)
    assert mask[2:4, 2:5].eq(1).all() and mask[1, 3] == 0.5 and mask[0].eq(0).all() and mask[3, 5] == 0.5
    bell = window_weight(Window(0, 0, 8, 8), "gaussian")
    assert torch.equal(bell, bell.flip(0)) and bell.argmax() in (27, 28, 35, 36) and bell.min() > 0


def test_what_does_not_cover_is_refused() -> None:
    with pytest.raises(InputError, match=r"row 0, column 10"):
        panorama([Region(lambda _: constant(0), box(SIZE, 0, 0, 12, 10))], SIZE, (8, 8), 4)
    with pytest.raises(InputError, match="mask has shape"):
        panorama([Region(lambda _: constant(0), torch.ones(3, 3))], SIZE, (8, 8), 4)
    with pytest.raises(InputError, match="below 0"):
        panorama([Region(lambda _: constant(0), -everywhere(SIZE))], SIZE, (8, 8), 4)
    with pytest.raises(InputError, match="cannot overlap by 8"):
        windows(*SIZE, (8, 8), 8)
    with pytest.raises(InputError, match="no weighting 'gauss'"):
        window_weight(Window(0, 0, 2, 2), "gauss")  # type: ignore[arg-type]
    area = Area(Window(0, 0, *SIZE), constant(0), torch.ones(SIZE))
    with pytest.raises(InputError, match="takes"):
        mixture([area], SIZE)(torch.zeros(1, 1, 8, 8), 1.0)

"""Tones and colours, and the table of all preprocessors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import InputError
from sfumato.preprocess import PREPROCESSORS, preprocess
from sfumato.preprocess.tones import blur, grey, invert, palette, threshold, tile

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 130, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", PREPROCESSORS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (130, 70), (65, 64)])
def test_each_gives_an_rgb_picture_of_the_same_size(kind: str, size: tuple[int, int]) -> None:
    picture = NOISE.resize(size)
    before = picture.tobytes()
    made = preprocess(kind, picture)
    assert (made.mode, made.size) == ("RGB", size)
    assert picture.tobytes() == before
    assert preprocess(kind, picture).tobytes() == made.tobytes()


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_defaults_given_are_defaults(kind: str) -> None:
    row = PREPROCESSORS[kind]
    assert preprocess(kind, NOISE, row.options).tobytes() == preprocess(kind, NOISE).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_pictures_of_any_mode_are_taken(mode: str) -> None:
    assert preprocess("canny", NOISE.convert(mode)).mode == "RGB"


def test_what_is_transparent_lies_on_white() -> None:
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert preprocess("grey", picture).getextrema() == ((255, 255),) * 3


def test_thresholds() -> None:
    values = np.asarray(threshold(NOISE, level=100))[..., 0]
    expected = np.asarray(NOISE).astype(float) @ [0.299, 0.587, 0.114] >= 100
    assert (values == expected * 255).mean() > 0.999
    assert np.asarray(threshold(NOISE, level=0)).min() == 255


def test_palettes_are_patches_of_mean_colours() -> None:
    picture = NOISE.resize((128, 64))
    patches = np.asarray(palette(picture, size=32)).reshape(2, 32, 4, 32, 3)
    assert (patches == patches[:, :1, :, :1]).all()
    means = np.asarray(picture).astype(float).reshape(2, 32, 4, 32, 3).mean(axis=(1, 3))
    assert np.abs(patches[:, 0, :, 0] - means).max() <= 1


def test_blurring_and_tiling_keep_the_mean_and_lose_the_detail() -> None:
    pixels = np.asarray(NOISE).astype(float)
    for made in (blur(NOISE, sigma=6), tile(NOISE, factor=8)):
        values = np.asarray(made).astype(float)
        assert abs(values.mean() - pixels.mean()) < 3
        assert values.std() < pixels.std() / 4
    assert tile(NOISE, factor=1).tobytes() == NOISE.tobytes()
    assert blur(NOISE, sigma=0).tobytes() == NOISE.tobytes()


def test_grey_passes_depth_through_and_can_stretch_it() -> None:
    depth = Image.fromarray(np.linspace(50, 150, 64, dtype=np.uint8).reshape(8, 8))
    assert np.array_equal(np.asarray(grey(depth.convert("RGB")))[..., 0], np.asarray(depth))
    assert grey(depth.convert("RGB"), stretch=1).getextrema() == ((0, 255),) * 3
    assert grey(Image.new("RGB", (4, 4), (7, 7, 7)), stretch=1).getextrema() == ((7, 7),) * 3


def test_inverting_twice_is_nothing() -> None:
    assert invert(invert(NOISE)).tobytes() == NOISE.tobytes()


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="canny"):
        preprocess("cany", NOISE)
    with pytest.raises(InputError, match="high"):
        preprocess("canny", NOISE, {"hihg": 1})
    with pytest.raises(InputError, match="It has none"):
        preprocess("invert", NOISE, {"level": 1})

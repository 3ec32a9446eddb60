"""Tones and colours of pictures: thresholds, blur, tiles, palettes, grey, negatives."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sfumato.preprocess.filters import luma, to_picture, within


def threshold(picture: Image.Image, *, level: float = 128) -> Image.Image:
    """White where the lightness is at least `level`, 0 to 255, black elsewhere."""
    within("level", level, 0, 255)
    return to_picture((luma(picture) >= level) * np.uint8(255))


def blur(picture: Image.Image, *, sigma: float = 9.0) -> Image.Image:
    """Blurred by a Gaussian of a standard deviation of `sigma` pixels, 0 to 200."""
    within("sigma", sigma, 0, 200)
    return picture.filter(ImageFilter.GaussianBlur(sigma))


def tile(picture: Image.Image, *, factor: float = 2.0) -> Image.Image:
    """Made smaller by `factor`, 1 to 64, and as large again: what detail is added to, tile by tile."""
    within("factor", factor, 1, 64)
    small = [max(1, round(side / factor)) for side in picture.size]
    reduced = picture.resize((small[0], small[1]), Image.Resampling.BOX)
    return reduced.resize(picture.size, Image.Resampling.BICUBIC)


def palette(picture: Image.Image, *, size: float = 64) -> Image.Image:
    """Patches of `size` pixels along a side, 1 to 1024, each of the mean of its colours."""
    within("size", size, 1, 1024)
    width, height = (max(1, round(side / size)) for side in picture.size)
    patches = picture.resize((width, height), Image.Resampling.BOX)
    return patches.resize(picture.size, Image.Resampling.NEAREST)


def grey(picture: Image.Image, *, stretch: float = 0) -> Image.Image:
    """The lightness; a depth map in grey stays as it is.

    stretch: 1 spreads it over all of black to white, 0 leaves it, between blends.
    """
    within("stretch", stretch, 0, 1)
    lightness = luma(picture)
    low, high = float(lightness.min()), float(lightness.max())
    spread = (lightness - low) * (255 / (high - low)) if high > low else lightness
    return to_picture(lightness + stretch * (spread - lightness))


def invert(picture: Image.Image) -> Image.Image:
    """The negative: what is drawn in black on white as networks want it, white on black."""
    return ImageOps.invert(picture)

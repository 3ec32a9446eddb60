"""Filters that preprocessors are made of, on arrays (h, w) or (h, w, c)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.errors import InputError

Floats = NDArray[np.float32]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def luma(picture: Image.Image) -> Floats:
    """Lightness (h, w), 0..255, of an RGB picture."""
    return np.asarray(picture, dtype=np.float32) @ np.array(LUMA, dtype=np.float32)


def gaussian(values: Floats, sigma: float) -> Floats:
    """Blurred with a standard deviation in pixels, cut off at four of them; the edge is mirrored."""
    if sigma <= 0:
        return values
    radius = math.ceil(4 * sigma)
    places = np.arange(-radius, radius + 1)
    kernel = np.exp(-(places**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        padding = [(radius, radius) if each == axis else (0, 0) for each in range(values.ndim)]
        padded = np.moveaxis(np.pad(values, padding, mode="symmetric"), axis, 0)
        length = values.shape[axis]
        total = kernel[0] * padded[:length]
        for offset, weight in enumerate(kernel[1:], 1):
            total += weight * padded[offset : offset + length]
        values = np.moveaxis(total, 0, axis)
    return np.ascontiguousarray(values)


def sobel(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sobel's derivatives (along x, along y), of the number format given; the edge is repeated."""
    padded = np.pad(values, [(1, 1), (1, 1), *[(0, 0)] * (values.ndim - 2)], mode="edge")
    across = padded[:, 2:] - padded[:, :-2]
    down = padded[2:] - padded[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    dy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    return dx, dy


def widened(marked: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Everything within `radius` pixels of what is marked, by a disc."""
    height, width = marked.shape
    padded = np.pad(marked, radius)
    result = np.zeros_like(marked)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if x * x + y * y <= radius * radius + radius:
                result |= padded[radius + y : radius + y + height, radius + x : radius + x + width]
    return result


def to_picture(values: NDArray[Any]) -> Image.Image:
    """An RGB picture of values (h, w) or (h, w, 3), rounded and cut to 0..255."""
    whole = np.clip(np.rint(values.astype(np.float64)), 0, 255).astype(np.uint8)
    return Image.fromarray(whole).convert("RGB")


def within(name: str, value: float, low: float, high: float) -> float:
    """The value of an option; InputError where it is outside of low..high, or no number."""
    if not low <= value <= high:
        raise InputError(f"{name} is {value}; it must be {low:g} to {high:g}.")
    return value

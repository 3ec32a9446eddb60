"""Edges and lines of pictures: Canny's, soft ones at several scales, scribbles, drawn lines."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.preprocess.filters import Floats, gaussian, luma, sobel, to_picture, widened, within

TANGENT = np.sqrt(2) - 1  # of 22.5 degrees: between two of the four directions
MOST = 4 * 255 * 2  # of |dx| + |dy|
SCALES = (1.0, 2.0, 4.0)
STRONG = 99.0  # the percentile of gradients that is shown as white


def canny(picture: Image.Image, *, low: float = 100, high: float = 200) -> Image.Image:
    """Edges one pixel wide, white on black (Canny 1986).

    low, high: edges begin where |dx| + |dy| of Sobel's derivatives is above `high`, and go on while it is
    above `low`; 0 to 2040. The derivatives are those of the channel where they are largest. Thresholds mean
    what they do in OpenCV, whose edges the released networks were trained on. InputError for others.
    """
    within("high", high, 0, MOST)
    within("low", low, 0, high)
    dx, dy = _strongest(np.asarray(picture, dtype=np.int32))
    size = np.abs(dx) + np.abs(dy)
    ridge = _ridge(size, dx, dy) & (size > low)
    return to_picture(_connected(ridge & (size > high), ridge) * np.uint8(255))


def _strongest(pixels: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    dx, dy = (each.astype(np.int32) for each in sobel(pixels))
    best = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    return np.take_along_axis(dx, best, 2)[..., 0], np.take_along_axis(dy, best, 2)[..., 0]


def _ridge(size: NDArray[np.int32], dx: NDArray[np.int32], dy: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the gradient is larger than at both neighbours along it; of equal neighbours one stays."""
    height, width = size.shape
    padded = np.pad(size, 1)

    def beside(y: int, x: int) -> NDArray[np.int32]:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    ax, ay = np.abs(dx), np.abs(dy)
    horizontal, vertical = ay < TANGENT * ax, ax <= TANGENT * ay
    falling = (dx < 0) == (dy < 0)
    across = (size > beside(0, -1)) & (size >= beside(0, 1))
    along = (size > beside(-1, 0)) & (size >= beside(1, 0))
    down = (size > beside(-1, -1)) & (size > beside(1, 1))
    up = (size > beside(-1, 1)) & (size > beside(1, -1))
    return np.where(horizontal, across, np.where(vertical, along, np.where(falling, down, up)))


def _connected(begun: NDArray[np.bool_], ridge: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What of the ridge hangs together with where edges begin, over corners too."""
    height, width = ridge.shape
    left = np.pad(ridge, 1).reshape(-1)
    stride = width + 2
    steps = np.array([dy * stride + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
    front = np.flatnonzero(np.pad(begun, 1))
    found = np.zeros_like(left)
    while front.size:
        found[front] = True
        left[front] = False
        nearby = (front[:, None] + steps).reshape(-1)
        front = np.unique(nearby[left[nearby]])
    return found.reshape(height + 2, stride)[1:-1, 1:-1]


def soft_edges(picture: Image.Image, *, sigma: float = 1.0, gamma: float = 0.7) -> Image.Image:
    """How much the colours change, at three scales together: broad soft edges, as those of a trained network.

    sigma: of the finest scale in pixels, 0.3 to 20. gamma: below 1 brings out faint edges, 0.1 to 5.
    """
    within("sigma", sigma, 0.3, 20)
    within("gamma", gamma, 0.1, 5)
    return to_picture(255 * _softness(picture, sigma) ** gamma)


def _softness(picture: Image.Image, sigma: float) -> Floats:
    """Edge strength (h, w), 0..1."""
    pixels = np.asarray(picture, dtype=np.float32)
    total = np.zeros(pixels.shape[:2], dtype=np.float32)
    for scale in SCALES:
        dx, dy = sobel(gaussian(pixels, sigma * scale))
        # A step blurred by s has a slope of 1 / s: multiplied by s, every scale counts alike.
        total += scale * np.hypot(dx, dy).max(axis=2).astype(np.float32)
    strongest = max(
        float(np.percentile(total, STRONG)), 16.0
    )  # what is nearly flat is not made to look rough
    return np.clip(total / strongest, 0, 1)


def scribble(picture: Image.Image, *, detail: float = 0.35, width: float = 3) -> Image.Image:
    """A few broad strokes, white on black, along the strongest soft edges.

    detail: how faint an edge may be and still be drawn, 0 to 1. width: of the strokes in pixels, 1 to 31.
    """
    within("detail", detail, 0, 1)
    within("width", width, 1, 31)
    strength = _softness(picture, 2.0)
    # On a ridge of `strength` its own derivative vanishes: what lies across is told by the picture's.
    dx, dy = _strongest((gaussian(np.asarray(picture, dtype=np.float32), 2.0) * 1000).astype(np.int32))
    ridge = _ridge((strength * 1e6).astype(np.int32), dx, dy) & (strength > 0.5 * (1 - detail))
    begun = ridge & (strength > 1 - detail)
    return to_picture(widened(_connected(begun, ridge), int(width) // 2) * np.uint8(255))


def lines(picture: Image.Image, *, sigma: float = 6.0, gain: float = 1.0) -> Image.Image:
    """The dark lines of a drawing, bright on black: how much darker each place is than what surrounds it.

    sigma: how far "around" is, in pixels, 0.5 to 50. gain: of the brightness, 0.1 to 20.
    """
    within("sigma", sigma, 0.5, 50)
    within("gain", gain, 0.1, 20)
    lightness = luma(picture)
    darker = np.clip(gaussian(lightness, sigma) - lightness, 0, None)
    drawn = darker[darker > 8]
    typical = max(16.0, float(np.percentile(drawn, 90))) if drawn.size else 16.0
    return to_picture(255 * np.clip(gain * darker / typical, 0, 1))

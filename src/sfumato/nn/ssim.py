"""Structural similarity of pictures, at one scale (Wang et al. 2004) and at several (Wang et al. 2003)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, DEVIATION = 11, 1.5  # pixels of the Gaussian that statistics are taken under
RANGE = 2.0  # of pictures in -1..1
C1, C2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, from the finest: Wang et al. 2003, 3.2
LEAST = 1e-4  # similarities may be negative, and have no fractional power then


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """(b, c, h, w) in -1..1, twice -> (b,) mean similarity, 1 for equal pictures."""
    return _similarities(first, second)[0]


def multi_scale_ssim(first: Tensor, second: Tensor) -> Tensor:
    """(b, c, h, w) in -1..1, twice -> (b,) in 0..1, 1 for equal pictures.

    Each of the five scales halves the sides. Those at which the window has no room are left out and the
    weights of the others made to sum to one, so 64 pixels have three scales.
    """
    scales = 1
    while scales < len(WEIGHTS) and min(first.shape[-2:]) >> scales >= WINDOW:
        scales += 1
    weights = torch.tensor(WEIGHTS[:scales])
    powers = (weights / weights.sum()).tolist()
    product = torch.ones(first.shape[0], device=first.device)
    for scale, power in enumerate(powers):
        whole, contrast = _similarities(first, second)
        product = product * (whole if scale == scales - 1 else contrast).clamp_min(LEAST) ** power
        first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return product


def _similarities(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) means of the similarity, and of its contrast and structure without the luminance, in float32."""
    with torch.autocast(first.device.type, enabled=False):  # variances are differences of close numbers
        first, second = first.float() + 1, second.float() + 1  # its luminance is of numbers from 0 up
        rows, columns = (_window(side, first) for side in first.shape[-2:])
        stacked = torch.stack([first, second, first.square(), second.square(), first * second])
        mean1, mean2, square1, square2, product = rows @ stacked @ columns.T  # each (b, c, h', w')
        variances = square1 - mean1.square() + square2 - mean2.square()
        covariance = product - mean1 * mean2
        contrast = (2 * covariance + C2) / (variances + C2)
        luminance = (2 * mean1 * mean2 + C1) / (mean1.square() + mean2.square() + C1)
        return (luminance * contrast).mean(dim=(1, 2, 3)), contrast.mean(dim=(1, 2, 3))


def _window(side: int, like: Tensor) -> Tensor:
    """(side - 10, side): each row the Gaussian at one place, so that a product with it blurs one axis."""
    size = min(WINDOW, side)
    offsets = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    gaussian = torch.exp(-0.5 * (offsets / DEVIATION).square())
    band = torch.zeros(side - size + 1, side)
    for row in range(len(band)):
        band[row, row : row + size] = gaussian / gaussian.sum()
    return band.to(like)

"""Structural similarity against a filter of scipy's, and its scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from sfumato.nn.ssim import WEIGHTS, multi_scale_ssim, ssim


def pictures(side: int, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def by_hand(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """(similarity, contrast) of one channel, Wang et al. 2004, eq. 13, in 0..255 as the paper has it."""
    first, second = ((x.astype(np.float64) + 1) * 127.5 for x in (first, second))

    def blurred(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    mean1, mean2 = blurred(first), blurred(second)
    variances = blurred(first**2) - mean1**2 + blurred(second**2) - mean2**2
    covariance = blurred(first * second) - mean1 * mean2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    return float((luminance * contrast).mean()), float(contrast.mean())


def test_ssim_is_the_formula_of_its_paper() -> None:
    first = pictures(24)
    second = 0.7 * first + 0.3 * pictures(24, 1)
    wanted = [
        np.mean([by_hand(a, b)[0] for a, b in zip(x, y, strict=True)])
        for x, y in zip(first.numpy(), second.numpy(), strict=True)
    ]
    assert ssim(first, second).tolist() == pytest.approx(wanted, abs=1e-4)


def test_scales_with_room_for_the_window_share_the_weights() -> None:
    first = pictures(44)
    second = (0.5 * first + 0.5 * pictures(44, 1)).clamp(-1, 1)
    found = multi_scale_ssim(first, second)
    powers = np.array(WEIGHTS[:3]) / sum(WEIGHTS[:3])
    wanted = []
    for x, y in zip(first, second, strict=True):
        product = 1.0
        for scale, power in enumerate(powers):
            pair = [torch.nn.functional.avg_pool2d(each, 2**scale) if scale else each for each in (x, y)]
            values = [by_hand(a.numpy(), b.numpy()) for a, b in zip(*pair, strict=True)]
            product *= np.mean([value[0 if scale == 2 else 1] for value in values]) ** power
        wanted.append(product)
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("side", [4, 16, 64])
def test_equal_pictures_are_alike_and_others_have_a_gradient(side: int) -> None:
    first = pictures(side)
    assert multi_scale_ssim(first, first).tolist() == pytest.approx([1.0, 1.0])
    other = (-first).requires_grad_()
    loss = 1 - multi_scale_ssim(other, first)
    loss.sum().backward()
    assert loss.min() > 0.5 and other.grad is not None and torch.isfinite(other.grad).all()


def test_autocast_does_not_blur_the_statistics() -> None:
    first = pictures(32)
    second = first + 0.02
    exact = multi_scale_ssim(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(multi_scale_ssim(first, second), exact)

"""Dynamic thresholding: its formulas value by value, its quantile, what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from sfumato.diffusion.guidance import cfg
from sfumato.diffusion.guidance_threshold import dynamic_threshold, mimic_threshold, quantile
from sfumato.errors import InputError

SIGMA = 1.7


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = seeded(0, 3, 4, 6, 5)
X0 = {"cond": seeded(1, 3, 4, 6, 5), "uncond": seeded(2, 3, 4, 6, 5) + 0.5}


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9, 0.995, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 480])
def test_quantile(fraction: float, count: int) -> None:
    values = seeded(3, 4, 2, count)
    torch.testing.assert_close(quantile(values, fraction), values.quantile(fraction, dim=-1))


def test_percentile_equals_imagens_rule_in_the_reference() -> None:
    got = dynamic_threshold(cfg(7.5), 0.95)(X, SIGMA, X0)
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1e9}
    reference = DDPMScheduler(**options)  # pyright: ignore[reportArgumentType]
    expected = reference._threshold_sample(cfg(7.5)(X, SIGMA, X0))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got.abs().max() == 1


def test_percentile_above_a_limit_of_latents() -> None:
    got = dynamic_threshold(cfg(7.5), 0.9, limit=4.0)(X, SIGMA, X0).numpy()
    for image, guided in zip(got, cfg(7.5)(X, SIGMA, X0).numpy(), strict=True):
        bound = max(4.0, np.percentile(np.abs(guided), 90))
        assert bound > 4
        np.testing.assert_allclose(image, np.clip(guided, -bound, bound) / bound * 4, rtol=1e-12)


def test_percentile_leaves_values_within_the_limit() -> None:
    small = {"cond": X0["cond"] / 10}
    torch.testing.assert_close(dynamic_threshold(cfg(1.0))(X, SIGMA, small), small["cond"], rtol=0, atol=0)


@pytest.mark.parametrize(("mimicked_scale", "percentile"), [(5.0, 1.0), (5.0, 0.9), (15.0, 0.5), (40.0, 1.0)])
def test_the_mimicked_range_channel_by_channel(mimicked_scale: float, percentile: float) -> None:
    got = mimic_threshold(cfg(20.0), mimicked_scale, percentile)(X, SIGMA, X0).numpy()
    strong, weak = (cfg(scale)(X, SIGMA, X0).numpy() for scale in (20.0, mimicked_scale))
    for image in range(3):
        for channel in range(4):
            values, mimicked = strong[image, channel], weak[image, channel]
            top = np.max(np.abs(mimicked - np.mean(mimicked)))
            bound = max(top, np.percentile(np.abs(values - np.mean(values)), 100 * percentile))
            clipped = np.clip(values - np.mean(values), -bound, bound)
            expected = clipped / bound * top + np.mean(values)
            np.testing.assert_allclose(got[image, channel], expected, rtol=1e-11, atol=1e-12)


def test_mimicking_the_own_scale_changes_nothing() -> None:
    got = mimic_threshold(cfg(7.5), 7.5)(X, SIGMA, X0)
    torch.testing.assert_close(got, cfg(7.5)(X, SIGMA, X0), rtol=1e-12, atol=1e-12)


def test_mimicking_leaves_a_single_branch_alone() -> None:
    combine = mimic_threshold(cfg(1.0), 7.0)
    assert list(combine.needs(SIGMA)) == ["cond"]
    assert torch.equal(combine(X, SIGMA, {"cond": X0["cond"]}), X0["cond"])


@pytest.mark.parametrize(("percentile", "limit"), [(0.0, 1.0), (1.1, 1.0), (0.9, 0.0), (0.9, float("inf"))])
def test_impossible_numbers_are_refused(percentile: float, limit: float) -> None:
    with pytest.raises(InputError):
        dynamic_threshold(cfg(7.5), percentile, limit)
    if limit == 1:
        with pytest.raises(InputError, match="percentile"):
            mimic_threshold(cfg(7.5), 7.0, percentile)

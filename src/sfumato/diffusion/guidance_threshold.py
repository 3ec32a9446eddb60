"""Dynamic thresholding: strong guidance held within the range of weak one (Saharia et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sfumato import errors
from sfumato.diffusion.guidance import Combine, cfg
from sfumato.diffusion.guidance_methods import Adjusted

PERCENTILE = 0.995  # diffusers' dynamic_thresholding_ratio


def dynamic_threshold(combine: Combine, percentile: float = PERCENTILE, limit: float = 1.0) -> Combine:
    """x0 clipped at a percentile of its absolute values and scaled back (Saharia et al. 2022, section 2.3).

    s = max(limit, percentile of |x0| in a picture); x0 becomes clip(x0, -s, s) * limit / s.
    percentile: 0 to 1. limit: the largest value that data have: 1 for pixels; latents of unit variance
    reach 3 to 4. `InputError` for other numbers.
    """
    _check(percentile)
    if not 0 < limit < math.inf:
        raise errors.InputError(f"the limit of thresholding is {limit:g}", "Allowed is above 0.")

    def adjust(x: Tensor, sigma: float, predictions: Mapping[str, Tensor], guided: Tensor) -> Tensor:
        shape = (-1, *[1] * (guided.ndim - 1))
        bound = quantile(guided.abs().flatten(1), percentile).clamp_min(limit).reshape(shape)
        return guided.clamp(-bound, bound) * (limit / bound)

    return Adjusted(combine, adjust)


def mimic_threshold(combine: Combine, scale: float, percentile: float = 1.0) -> Combine:
    """The guided x0 with the range that plain guidance at a lower scale has, channel by channel.

    With g the guided and m the mimicked x0, cfg(scale), both less their mean over a channel's positions:
    top = max |m|, s = max(top, percentile of |g|); g becomes clip(g, -s, s) * top / s, plus its own mean.
    scale: the one to mimic, as 7; percentile: below 1 the outliers of g are clipped, not fitted. Known from
    the extension "dynamic thresholding (CFG scale fix)". Nothing is done where a single branch is computed.
    `InputError` for a percentile outside 0 to 1.
    """
    _check(percentile)
    mimicked = cfg(scale)

    def adjust(x: Tensor, sigma: float, predictions: Mapping[str, Tensor], guided: Tensor) -> Tensor:
        values, mean = _centred(guided)
        top = _centred(mimicked(x, sigma, predictions))[0].abs().amax(dim=2, keepdim=True)
        bound = torch.maximum(top, quantile(values.abs(), percentile)[..., None])
        bound = bound.clamp_min(torch.finfo(x.dtype).tiny)
        return (values.clamp(-bound, bound) * (top / bound) + mean).reshape(guided.shape)

    return Adjusted(combine, adjust, ("cond", "uncond"), alone=False)


def quantile(values: Tensor, fraction: float) -> Tensor:
    """The quantile along the last axis, linear between the nearest two; (..., n) -> (...).

    `torch.quantile` gives the same, but for at most 2^24 values.
    """
    place = fraction * (values.shape[-1] - 1)
    low = int(place)
    largest = values.topk(values.shape[-1] - low, dim=-1).values  # descending; the last is the one at `low`
    return largest[..., -1].lerp(largest[..., max(-2, -largest.shape[-1])], place - low)


def _centred(values: Tensor) -> tuple[Tensor, Tensor]:
    """(b, c, ...) -> values (b, c, n) less their mean, and the mean (b, c, 1), image by image."""
    flat = values.flatten(2)
    mean = torch.stack([image.mean(dim=1, keepdim=True) for image in flat])
    return flat - mean, mean


def _check(percentile: float) -> None:
    if not 0 < percentile <= 1:
        raise errors.InputError(
            f"the percentile is {percentile:g}", f"Allowed is above 0, up to 1; usual is {PERCENTILE}."
        )

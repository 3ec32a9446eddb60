"""What was drawn put back into its picture: outside the mask no byte changes, inside the seam is hidden."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

QUANTILES = np.linspace(0, 1, 17)
LEAST_PIXELS = 64  # of a ring whose colours say something
Values = NDArray[np.float64]


def feathered(mask: Tensor, width: int) -> Tensor:
    """Weights of what was drawn, (1, 1, h, w): 0 outside the mask, rising to its value `width` pixels inside.

    The picture's border is no edge. Where the mask is thin throughout, the seam takes half its depth at most.
    """
    inside = (mask > 0).float()
    layers = [inside]
    while len(layers) <= width and bool(layers[-1].any()):
        layers.append(-F.max_pool2d(-layers[-1], 3, 1, 1))  # its padding is never the smallest
    depth = sum(bool(layer.any()) for layer in layers)
    if depth <= width:  # nowhere deep enough
        layers = layers[: max(1, depth // 2)]
    return torch.minimum(mask, torch.stack(layers).mean(dim=0))


def pasted(
    whole: Image.Image, drawn: Image.Image, box: tuple[int, int, int, int], weights: Tensor
) -> Image.Image:
    """`whole` with `drawn` in the box by weights (1, 1, h, w); where they are 0 every byte stays.

    drawn: of the box's size and the mode of `whole`.
    """
    share = weights[0, 0].numpy().astype(np.float64)
    old, new = (np.asarray(each, dtype=np.float64) for each in (whole.crop(box), drawn))
    share = share[..., None] if old.ndim == 3 else share
    mixed = np.where(share > 0, old + share * (new - old), old)
    result = whole.copy()
    result.paste(Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8)), box[:2])
    return result


def matched_at_seam(drawn: Image.Image, old: Image.Image, mask: Tensor, width: int) -> Image.Image:
    """`drawn` with tones that go over into those of `old` at the mask's edge, both of one size and mode.

    Both show the same within `width` pixels outside the mask; per channel, the histogram of the one there is
    matched to that of the other. The change of tones is whole at the edge and gone `width` pixels inside.
    Where there is next to nothing around the mask, all stays as it is.
    """
    inside = (mask > 0).float()
    ring = (F.max_pool2d(inside, 2 * width + 1, 1, width) > inside)[0, 0].numpy()
    if ring.sum() < LEAST_PIXELS:
        return drawn
    share = 1 - feathered(inside, width)[0, 0].numpy().astype(np.float64)[..., None]
    new, there = (np.atleast_3d(np.asarray(each, dtype=np.float64)) for each in (drawn, old))
    columns = [_by_histogram(new[..., i], new[ring][:, i], there[ring][:, i]) for i in range(new.shape[-1])]
    return _picture(new + share * (np.stack(columns, axis=-1) - new), drawn)


def matched_colours(drawn: Image.Image, old: Image.Image, how: str) -> Image.Image:
    """`drawn` in the colours of `old`, of one mode.

    "covariance": an affine map gives it the mean and covariance of the colours, of all such maps the one that
    moves them least (Pitie and Kokaram 2007, eq. 15); "histogram": each channel gets the histogram.
    """
    new, there = (np.atleast_3d(np.asarray(each, dtype=np.float64)) for each in (drawn, old))
    source, target = (values.reshape(-1, values.shape[-1]) for values in (new, there))
    if how == "histogram":
        columns = [_by_histogram(source[:, i], source[:, i], target[:, i]) for i in range(source.shape[-1])]
        changed = np.stack(columns, axis=-1)
    else:
        spread = [
            np.cov(values.T).reshape(values.shape[-1], -1) + np.eye(values.shape[-1])
            for values in (source, target)
        ]
        root = _root(spread[0])
        inverse = np.linalg.inv(root)
        move = inverse @ _root(root @ spread[1] @ root) @ inverse
        changed = (source - source.mean(axis=0)) @ move + target.mean(axis=0)
    return _picture(changed.reshape(new.shape), drawn)


def _by_histogram(values: Values, source: Values, target: Values) -> Values:
    """`values` moved as `source` has to be to have the quantiles of `target`; beyond its range by as much."""
    here, there = np.quantile(source, QUANTILES), np.quantile(target, QUANTILES)
    levels, first = np.unique(here, return_inverse=True)
    moves = np.bincount(first, there - here) / np.bincount(first)
    return values + np.interp(values, levels, moves)


def _root(matrix: Values) -> Values:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    sizes, axes = np.linalg.eigh(matrix)
    return (axes * np.sqrt(np.maximum(sizes, 0))) @ axes.T


def _picture(values: Values, like: Image.Image) -> Image.Image:
    rounded = values.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(rounded[..., 0] if like.mode == "L" else rounded)

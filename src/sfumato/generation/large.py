"""Samples in windows and regions, each with its conditions, and networks whose edges meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.diffusion.panorama import Region, Window, box, cropped, panorama
from sfumato.diffusion.prediction import GuidedDenoiser
from sfumato.errors import InputError
from sfumato.generation.canvas import as_tuple
from sfumato.generation.conditions import Conditions
from sfumato.intake import open_mask
from sfumato.model import StableDiffusion
from sfumato.nn.seamless import seamless
from sfumato.request import Request
from sfumato.request.large import read_region

Make = Callable[[Conditions], GuidedDenoiser]


def in_windows(model: StableDiffusion, request: Request, conds: Conditions, make: Make) -> GuidedDenoiser:
    """The denoiser of a request from `complete`, by windows and regions where it asks for them.

    make: the denoiser of conditions, for the whole sample or a part of it. `InputError` for windows that do
    not fit, and masks that are not as many as the regions that have them.
    """
    if request.window is None and not conds.regions and request.region_masks is None:
        return make(conds)
    assert request.height is not None and request.width is not None
    shape = model.latent_shape(request.height, request.width)
    if len(shape) != 3:
        raise InputError("windows and regions are for pictures", "Leave them out.")
    size = (shape[1], shape[2])
    window, overlap = _window(model, request, size)

    def part(own: Conditions, mask: Tensor) -> Region:
        def denoise_at(place: Window) -> GuidedDenoiser:
            if (place.height, place.width) == size:
                return make(own)
            return make(own.each(lambda cond: cropped(cond, place, size)))

        return Region(denoise_at, mask)

    masks = region_masks(request, size, model.downsampling)
    parts = [part(own, mask) for own, mask in zip(conds.regions, masks, strict=True)]
    covered = torch.stack(masks).amax(dim=0).clamp(max=1) if masks else torch.zeros(size)
    base = 1 - covered * (1 - request.region_base)
    if bool((base > 0).any()):
        parts.append(part(conds, base))
    return panorama(
        parts, size, window, overlap, weighting=request.window_weights, wrap=around(request)
    )  # fmt: skip


def region_masks(request: Request, size: tuple[int, int], factor: int) -> list[Tensor]:
    """How much each region counts in a sample of `size` = (height, width), `factor` pixels a latent."""
    given = list(as_tuple(request.region_masks)) if request.region_masks is not None else []
    asked = [read_region(text) for text in request.regions]
    wanted = sum(one.box is None for one in asked)
    if wanted != len(given):
        raise InputError(
            f"{wanted} regions are called mask, and {len(given)} masks are given", "Give as many."
        )
    assert request.width is not None and request.height is not None
    masks = []
    for one in asked:
        if one.box is None:
            grey = torch.from_numpy(np.array(open_mask(given.pop(0)), dtype=np.float32))[None, None] / 255
            masks.append(F.adaptive_avg_pool2d(grey, size)[0, 0])
            continue
        left, top, width, height = one.box
        if left + width > request.width or top + height > request.height:
            raise InputError(
                f"the region {width}x{height} at {left},{top} is not in the picture of "
                f"{request.width}x{request.height}",
                "Give left, top, width and height of a part of it.",
            )
        first = (top // factor, left // factor)
        last = (math.ceil((top + height) / factor), math.ceil((left + width) / factor))
        feather = round(request.region_feather / factor)
        masks.append(box(size, *first, last[0] - first[0], last[1] - first[1], feather))
    return masks


def around(request: Request) -> tuple[bool, bool]:
    """Whether (y, x) are circles."""
    return "y" in request.seamless, "x" in request.seamless and request.seamless != "none"


@contextmanager
def joined_edges(model: StableDiffusion, request: Request) -> Iterator[None]:
    """While it lasts, a model's networks see the opposite edge beyond an edge, where that is asked for."""
    y, x = around(request)
    if not (x or y):
        yield
        return
    with seamless(*(part for part in (model.unet, model.autoencoder) if part is not None), x=x, y=y):
        yield


def _window(model: StableDiffusion, request: Request, size: Sequence[int]) -> tuple[tuple[int, int], int]:
    """((height, width), overlap) of the windows in latents; the whole sample where none are asked for."""
    if request.window is None:
        return (size[0], size[1]), 0
    multiple = model.unet.config.downsampling
    side = request.window // (model.downsampling * multiple) * multiple
    if side < 1:
        raise InputError(
            f"windows have {request.window} pixels", f"The least is {model.downsampling * multiple}."
        )
    overlap = request.window // 2 if request.window_overlap is None else request.window_overlap
    return (min(side, size[0]), min(side, size[1])), min(overlap // model.downsampling, min(side, *size) - 1)

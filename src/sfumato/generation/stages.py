"""Requests that take several drawings in turn, each from the last one's: loopback and outpainting."""

from __future__ import annotations

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from sfumato import images
from sfumato.errors import InputError
from sfumato.generation.canvas import Box, as_tuple, margins
from sfumato.generation.hires import passes, second
from sfumato.generation.pictures import filled
from sfumato.intake import open_picture
from sfumato.request import MAX_SEED, Request

LEAP = 10_000  # between the seeds of drawings in turn: no batch has more pictures
AGAIN = 8  # pixels that two windows both draw
KNOWN = 2  # a window shows at least one part of so many that is known
ALONG = 4  # windows side by side share one part of so many
MARGINS = ("outpaint_left", "outpaint_top", "outpaint_right", "outpaint_bottom")


def plan(request: Request, multiple: int = 1) -> list[Request]:
    """The drawings that a request from `complete` takes, in turn; `continued` joins them.

    multiple: what the sides of a drawing must be multiples of.
    """
    if request.hires is not None:
        if request.loopback > 1 or any(margins(request)):
            raise InputError("hires and loopback or outpainting are asked for", "Do one after the other.")
        return passes(request, multiple)
    if request.init is None or (request.loopback == 1 and not any(margins(request))):
        return [request]
    if request.loopback == 1:
        return _outpainting(request)
    if any(margins(request)):
        raise InputError("loopback and outpainting are both asked for", "Do one after the other.")
    assert request.strength is not None and request.seed is not None
    return [
        request.model_copy(
            update={
                "loopback": 1,
                "strength": request.strength * request.loopback_decay**index,
                "seed": (request.seed + index * LEAP) % MAX_SEED,
            }
        )
        for index in range(request.loopback)
    ]


def continued(stage: Request, pictures: list[Image.Image], latents: Tensor | None = None) -> Request:
    """A drawing of `plan` that starts from the pictures, or latents, of the one before."""
    if stage.hires is not None:
        return second(stage, pictures, latents)
    return stage.model_copy(update={"init": tuple(pictures)})


def windows(known: Box, whole: tuple[int, int], size: tuple[int, int]) -> list[Box]:
    """The windows whose drawings, in turn, fill a picture of `whole` around what is known.

    whole, size: (width, height) of the picture and of a window, which is no larger. The sides are filled one
    by one, right and left first, in strips of half a window at the most; in each, windows overlap by a
    quarter.
    """
    found = []
    low, high = list(known[:2]), list(known[2:])
    for axis in (0, 1):
        while low[axis] > 0 or high[axis] < whole[axis]:
            most = max(1, size[axis] // KNOWN)
            if high[axis] < whole[axis]:
                high[axis] = min(whole[axis], high[axis] + most)
                first = max(0, high[axis] - size[axis])
            else:
                low[axis] = max(0, low[axis] - most)
                first = min(low[axis], whole[axis] - size[axis])
            for other in _along((low[1 - axis], high[1 - axis]), whole[1 - axis], size[1 - axis]):
                left, top = (first, other) if axis == 0 else (other, first)
                found.append((left, top, left + size[0], top + size[1]))
    return found


def _along(span: tuple[int, int], whole: int, size: int) -> list[int]:
    """Where the windows along a strip begin."""
    firsts, done = [], span[0]
    while done < span[1]:
        first = done - (size // ALONG if firsts else 0)
        firsts.append(max(0, min(first, whole - size)))
        done = firsts[-1] + size
    return firsts


def _outpainting(request: Request) -> list[Request]:
    """One drawing for each window around the picture.

    It draws what no window before it has drawn, and again the edge of what they have: their seams are hidden.
    """
    if request.mask is not None or request.mask_alpha or request.region is not None or request.only_masked:
        raise InputError("a mask or region and outpainting are both asked for", "Do one after the other.")
    assert request.width is not None and request.height is not None and request.seed is not None
    left, top, right, bottom = margins(request)
    pictures = [open_picture(one) for one in as_tuple(request.init)]
    width, height = pictures[0].size
    whole = (width + left + right, height + top + bottom)
    known = (left, top, left + width, top + height)
    share = min(1.0, whole[0] / request.width, whole[1] / request.height)
    size = (max(1, round(request.width * share)), max(1, round(request.height * share)))
    first = request.model_copy(
        update={
            **dict.fromkeys(MARGINS, 0),
            "mask_feather": request.mask_feather or 0,  # beyond the edge there is nothing to go over from
            "init": tuple(_enlarged(picture, known, whole) for picture in pictures),
        }
    )
    unknown = Image.new("L", whole, 255)
    unknown.paste(0, known)
    stages = []
    for window in windows(known, whole, size):
        if unknown.crop(window).getbbox() is None:
            continue
        mask = Image.new("L", whole, 0)
        mask.paste(_over_the_edge(unknown.crop(window)), window)
        mask.paste(0, known)
        unknown.paste(0, window)
        seed = (request.seed + len(stages) * LEAP) % MAX_SEED
        stages.append(first.model_copy(update={"mask": mask, "region": (*window[:2], *size), "seed": seed}))
    return stages


def _over_the_edge(new: Image.Image) -> Image.Image:
    """A mask whose white goes on beyond its edge, falling to black within `AGAIN` pixels."""
    half = AGAIN // 2
    falling = new.filter(ImageFilter.MaxFilter(2 * half + 1)).filter(ImageFilter.BoxBlur(half))
    return ImageChops.lighter(new, falling)


def _enlarged(picture: Image.Image, known: Box, whole: tuple[int, int]) -> Image.Image:
    """The picture at its place in a larger one, which goes on in its colours."""
    plain = picture.convert("RGB")
    sheet = Image.new("RGB", whole)
    sheet.paste(plain, known[:2])
    mask = torch.ones(1, 1, whole[1], whole[0])
    mask[..., known[1] : known[3], known[0] : known[2]] = 0
    (around,) = images.to_pil(filled(images.to_tensor([sheet]), mask))
    around.paste(plain, known[:2])
    return around

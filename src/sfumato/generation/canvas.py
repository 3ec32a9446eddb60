"""What is drawn on: the pictures of a request at the drawing's size, its mask, and the part they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from sfumato import images
from sfumato.errors import InputError
from sfumato.intake import open_mask, open_picture, picture_size
from sfumato.model import StableDiffusion
from sfumato.presets import concat_kind
from sfumato.request import Request

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, as PIL has them."""

AREAS = 4  # times the model's pixels, and one part of them: beyond that a picture is scaled to the model's


@dataclass(frozen=True)
class Canvas:
    """The pictures that a drawing starts from.

    whole: each as it comes back, in the model's mode: at the drawing's size, or at its own where only the
    part `box` of it is drawn. box: that part, in pixels of `whole`. size: (width, height) of the drawing.
    mask: (1, 1, h, w) in 0..1, at the size of the box; 1 is drawn. None draws all. given: the pictures as
    they were given, but for the mode.
    """

    whole: tuple[Image.Image, ...]
    box: Box
    size: tuple[int, int]
    mask: Tensor | None
    given: tuple[Image.Image, ...]

    @property
    def parts(self) -> list[Image.Image]:
        """What the box holds of each picture, at the drawing's size."""
        return [scaled(picture.crop(self.box), self.size) for picture in self.whole]

    @property
    def drawn_mask(self) -> Tensor | None:
        """The mask at the drawing's size, (1, 1, height, width)."""
        return None if self.mask is None else resized_mask(self.mask, self.size[::-1])


def canvas(model: StableDiffusion, request: Request) -> Canvas:
    """The canvas of a request with a picture, from `complete`; `InputError` for what does not fit."""
    assert request.width is not None and request.height is not None
    size = (request.width, request.height)
    given = [open_picture(one) for one in as_tuple(request.init)]
    if len(given) not in (1, request.num_images):
        raise InputError(
            f"{len(given)} pictures are given to start {request.num_images} from", "Give one, or as many."
        )
    if len({picture.size for picture in given}) > 1:
        raise InputError("the pictures to start from have different sizes", "Give pictures of one size.")
    mask = _mask(request, given[0])
    whole = tuple(_in_mode(picture, mode(model)) for picture in given)
    box = _box(request, whole[0].size, mask, size)
    if box is None:
        moved = tuple(fitted(picture, size, request.resize) for picture in whole)
        own = None if mask is None else _fitted_mask(mask, size, request)
        return Canvas(moved, (0, 0, *size), size, own, whole)
    if mask is None:
        mask = torch.zeros(1, 1, *whole[0].size[::-1])
        mask[..., box[1] : box[3], box[0] : box[2]] = 1
    return Canvas(whole, box, size, mask[..., box[1] : box[3], box[0] : box[2]], whole)


def drawing_size(model: StableDiffusion, request: Request) -> tuple[int, int]:
    """(width, height) that a request draws at which leaves one or both open.

    With a picture it is the picture's own, as near as the model can draw; where that is more than four times
    the model's pixels, or less than a quarter, the picture's shape at the model's pixels. Where only a part
    is drawn, it is the model's own size. Models that enlarge pictures draw a latent for each pixel.
    """
    own = (model.image_size[-1], model.image_size[-2] if len(model.image_size) > 1 else 1)
    wanted = (request.width, request.height)
    if request.init is None or is_part(request) or None not in wanted:
        return (wanted[0] or own[0], wanted[1] or own[1])
    width, height = picture_size(as_tuple(request.init)[0])
    share = width * height / (own[0] * own[1])
    scale = 1.0 if 1 / AREAS <= share <= AREAS else share**-0.5
    if concat_kind(model.config) == "enlarges":
        scale = float(model.downsampling)
    if wanted[0] is not None or wanted[1] is not None:
        scale = wanted[0] / width if wanted[0] is not None else cast(int, wanted[1]) / height
    return (
        wanted[0] or nearest_side(model, width * scale),
        wanted[1] or nearest_side(model, height * scale),
    )


def nearest_side(model: StableDiffusion, pixels: float) -> int:
    """The side nearest to this length that the model can draw."""
    assert model.config.unet is not None
    factor = model.downsampling * model.config.unet.downsampling
    return max(1, round(pixels / factor)) * factor


def is_part(request: Request) -> bool:
    """Whether only a part of the picture is drawn."""
    return request.only_masked or request.region is not None or any(margins(request))


def margins(request: Request) -> Box:
    """Pixels to add at the left, top, right and bottom."""
    return request.outpaint_left, request.outpaint_top, request.outpaint_right, request.outpaint_bottom


def as_tuple(given: Any) -> tuple[Any, ...]:
    """One picture, or several, as several."""
    return given if isinstance(given, tuple) else (given,)


def mode(model: StableDiffusion) -> str:
    """PIL's mode of the pictures that a model draws; `InputError` where it draws none."""
    config = model.config
    assert config.unet is not None
    channels = config.unet.out_channels if config.autoencoder is None else config.autoencoder.in_channels
    if config.unet.dims != 2 or channels not in images.MODES:
        raise InputError(f"{model.name!r} does not draw pictures", "It cannot start from one either.")
    return images.MODES[channels]


def resized_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """A mask (1, 1, h, w) at another size (height, width): every pixel that holds some of it is in it."""
    return F.adaptive_max_pool2d(mask, size)


def mask_box(mask: Tensor) -> Box:
    """The smallest box that holds all of a mask above 0; `InputError` for an empty one."""
    rows, columns = ((mask[0, 0] > 0).any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    if not rows:
        raise InputError("the mask is empty: nothing would be drawn", "White is drawn; mask_invert turns it.")
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def grown(box: Box, size: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The box made as wide to high as `shape`, within a picture of `size`; both (width, height).

    It grows around its middle, and is moved to lie within the picture; where that is too small, it is cut.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    scale = max(width / shape[0], height / shape[1])
    wanted = [max(own, round(side * scale)) for own, side in zip((width, height), shape, strict=True)]
    found = []
    for axis in (0, 1):
        length = min(wanted[axis], size[axis])
        low = (box[axis] + box[axis + 2] - length) // 2
        low = min(max(low, 0), size[axis] - length)
        found.append((low, low + length))
    return found[0][0], found[1][0], found[0][1], found[1][1]


def _box(request: Request, whole: tuple[int, int], mask: Tensor | None, shape: tuple[int, int]) -> Box | None:
    """The part to draw; None for all of the picture."""
    if request.region is not None:
        left, top, width, height = request.region
        box = (left, top, left + width, top + height)
        if min(left, top) < 0 or min(width, height) < 1 or box[2] > whole[0] or box[3] > whole[1]:
            raise InputError(
                f"the region {width}x{height} at {left},{top} is not in the picture of {whole[0]}x{whole[1]}",
                "Give left, top, width and height of a part of it.",
            )
        return box
    if not request.only_masked:
        return None
    if mask is None:
        raise InputError("only_masked is set, and there is no mask", "Give one, or leave it out.")
    left, top, right, bottom = mask_box(mask)
    more = request.only_masked_padding
    padded = (
        max(0, left - more), max(0, top - more), min(whole[0], right + more), min(whole[1], bottom + more),
    )  # fmt: skip
    return grown(padded, whole, shape)


def _mask(request: Request, picture: Image.Image) -> Tensor | None:
    """The mask of the request at the size of the picture, (1, 1, h, w) in 0..1."""
    if request.mask is None and not request.mask_alpha:
        return None
    if request.mask is not None:
        grey = open_mask(as_tuple(request.mask)[0])
        mask = torch.from_numpy(np.array(grey)).float()[None, None] / 255
        if grey.size != picture.size:
            mask = resized_mask(mask, picture.size[::-1])
    else:
        mask = torch.zeros(1, 1, *picture.size[::-1])
    if request.mask_alpha and picture.mode == "RGBA":
        alpha = torch.from_numpy(np.array(picture.getchannel("A"))).float()[None, None]
        mask = torch.maximum(mask, 1 - alpha / 255)
    if request.mask_invert:
        mask = 1 - mask
    return blurred(mask, request.mask_blur) if request.mask_blur else mask


def blurred(mask: Tensor, radius: float) -> Tensor:
    """A mask of 8 bits blurred by a Gaussian of this standard deviation in pixels."""
    grey = Image.fromarray((mask[0, 0] * 255).round().byte().numpy())
    soft = grey.filter(ImageFilter.GaussianBlur(radius))
    return torch.from_numpy(np.array(soft)).float()[None, None] / 255


def _in_mode(picture: Image.Image, wanted: str) -> Image.Image:
    """The picture in the model's mode; what is transparent lies on white."""
    if picture.mode == "RGBA" and wanted != "RGBA":
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert(wanted)


def scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at this (width, height), by Lanczos' filter."""
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def fitted(picture: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """The picture at the drawing's size, by one of the modes of `Request.resize`."""
    if how in ("stretch", "latent"):
        return scaled(picture, size)
    inner, place = _placed(picture.size, size, how)
    moved = scaled(picture, inner)
    if how == "crop":
        return moved.crop((-place[0], -place[1], size[0] - place[0], size[1] - place[1]))
    values = np.array(moved)
    edges = [(place[axis], size[axis] - inner[axis] - place[axis]) for axis in (1, 0)]
    return Image.fromarray(np.pad(values, [*edges, *[(0, 0)] * (values.ndim - 2)], mode="edge"))


def _fitted_mask(mask: Tensor, size: tuple[int, int], request: Request) -> Tensor:
    """The mask moved as the picture is; what is added to the picture is drawn."""
    if request.resize in ("stretch", "latent"):
        return resized_mask(mask, size[::-1])
    inner, (left, top) = _placed((mask.shape[-1], mask.shape[-2]), size, request.resize)
    right, bottom = size[0] - inner[0] - left, size[1] - inner[1] - top
    return F.pad(resized_mask(mask, inner[::-1]), (left, right, top, bottom), value=1.0)


def _placed(own: tuple[int, int], size: tuple[int, int], how: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(size, place) of a picture that covers (crop) or fits into (pad) the drawing, in its middle."""
    ratios = [wanted / side for wanted, side in zip(size, own, strict=True)]
    scale = max(ratios) if how == "crop" else min(ratios)
    inner = tuple(max(1, round(side * scale)) for side in own)
    return cast(tuple[int, int], inner), ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)

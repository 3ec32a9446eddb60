"""Pictures to start from, as values: latents, conditions, a denoiser that keeps what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato import images
from sfumato.conditioning import Conditioning
from sfumato.diffusion.edits import masked
from sfumato.diffusion.prediction import GuidedDenoiser
from sfumato.diffusion.spacing import Spacing
from sfumato.errors import InputError
from sfumato.generation.canvas import Box, Canvas, canvas, is_part, mode, resized_mask, scaled
from sfumato.generation.concat import checked, further, joined, kind_of
from sfumato.generation.conditions import Conditions
from sfumato.generation.large import around
from sfumato.generation.levels import levels
from sfumato.generation.notes import Notes, not_finite
from sfumato.generation.seam import feathered, matched_at_seam, matched_colours, pasted
from sfumato.model import StableDiffusion, Tiles
from sfumato.request import Request

SEAM = 4  # latents around a mask by which its tones are matched


class Start(Protocol):
    """What a run starts from and ends with; `start` makes it, of nothing or of pictures."""

    @property
    def plan(self) -> Spacing:
        """The noise levels."""
        ...

    @property
    def shown(self) -> tuple[Sequence[Image.Image], Box | None]:
        """The pictures at the drawing's size, and where they lie in the given ones if they are parts."""
        ...

    def x(self, noise: Tensor) -> Tensor:
        """Where sampling starts, for start noise (n, c, ...)."""
        ...

    def denoiser(self, denoise: GuidedDenoiser, noise: Tensor) -> GuidedDenoiser:
        """The denoiser of the run."""
        ...

    def conditioned(self, model: StableDiffusion, conds: Conditions) -> Conditions:
        """The conditions with what the network is shown of the pictures."""
        ...

    def kept(self, latents: Tensor) -> Tensor:
        """The latents to decode, of those that the last step left."""
        ...

    def finished(self, drawn: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures of the result, of those that were decoded."""
        ...


@dataclass(frozen=True)
class FromNoise:
    """The start of a run without a picture."""

    plan: Spacing

    @property
    def shown(self) -> tuple[Sequence[Image.Image], Box | None]:
        return (), None

    def x(self, noise: Tensor) -> Tensor:
        return noise * self.plan.start_scale

    def denoiser(self, denoise: GuidedDenoiser, noise: Tensor) -> GuidedDenoiser:
        return denoise

    def conditioned(self, model: StableDiffusion, conds: Conditions) -> Conditions:
        return checked(model, conds)

    def kept(self, latents: Tensor) -> Tensor:
        return latents

    def finished(self, drawn: Sequence[Image.Image]) -> list[Image.Image]:
        return list(drawn)


@dataclass(frozen=True)
class FromPictures:
    """The start of a run from pictures.

    latents: (n, c, h, w) scaled, of the pictures. mask: (1, 1, h, w), 1 where is drawn, or None. concat: what
    the network is shown of the pictures, for each of those that are drawn.
    """

    plan: Spacing
    request: Request
    canvas: Canvas
    latents: Tensor
    mask: Tensor | None
    concat: Conditioning | None
    downsampling: int

    @property
    def shown(self) -> tuple[Sequence[Image.Image], Box | None]:
        return self.canvas.parts, self.canvas.box if is_part(self.request) else None

    def x(self, noise: Tensor) -> Tensor:
        """Noise on the pictures; at strength 1 noise alone."""
        amount = noise * self.plan.start_scale
        if self.request.strength == 1:
            return amount
        content = self.latents
        if self.mask is not None and self.request.mask_content in ("noise", "nothing"):
            other = noise if self.request.mask_content == "noise" else torch.zeros_like(noise)
            content = torch.where(self.mask > 0, other, content)
        return content + amount

    def denoiser(self, denoise: GuidedDenoiser, noise: Tensor) -> GuidedDenoiser:
        """With a mask, what lies outside is known; models for inpainting are shown it instead."""
        if self.mask is None or self.concat is not None:
            return denoise
        rows = self.mask.expand(len(noise), -1, -1, -1)
        return masked(
            denoise, self.latents, noise, rows, self.plan.sigmas if self.request.soft_mask else None
        )

    def conditioned(self, model: StableDiffusion, conds: Conditions) -> Conditions:
        return checked(model, conds) if self.concat is None else joined(model, conds, self.concat)

    def kept(self, latents: Tensor) -> Tensor:
        """What is known is free of the noise that a run leaves which ends above 0."""
        if self.mask is None or self.concat is not None:
            return latents
        return torch.where(self.mask > 0, latents, self.latents)

    def finished(self, drawn: Sequence[Image.Image]) -> list[Image.Image]:
        """The drawn in the colours asked for, and put into the picture by its mask."""
        request, place = self.request, self.canvas
        whole = place.whole * (len(drawn) // len(place.whole))
        result = list(drawn)
        if request.match_colours != "none":
            parts = [picture.crop(place.box) for picture in whole]
            result = [
                matched_colours(new, old, request.match_colours)
                for new, old in zip(result, parts, strict=True)
            ]
        if place.mask is None:
            return result
        left, top, right, bottom = place.box
        size = (right - left, bottom - top)
        ratio = size[0] / place.size[0]  # of the picture's pixels to the drawing's
        seam = max(1, round(SEAM * self.downsampling * ratio))
        width = request.mask_feather
        width = max(1, round(self.downsampling * ratio)) if width is None else width
        weights = feathered((place.mask > 0).float() if request.soft_mask else place.mask, width)
        finished = []
        for new, old in zip(result, whole, strict=True):
            inside = matched_at_seam(scaled(new, size), old.crop(place.box), place.mask, seam)
            finished.append(pasted(old, inside, place.box, weights))
        return finished


@dataclass(frozen=True)
class FromLatents(FromNoise):
    """The start of a run from latents, scaled, (n, z, h, w)."""

    latents: Tensor

    def x(self, noise: Tensor) -> Tensor:
        return self.latents.to(noise) + noise * self.plan.start_scale


def start(model: StableDiffusion, request: Request, notes: Notes) -> Start:
    """What a request from `complete` starts from; `InputError` for pictures that it cannot start from."""
    plan = levels(model, request)
    if request.init is None:
        _check_alone(request)
        return FromNoise(plan)
    if isinstance(request.init, Tensor):
        return FromLatents(plan, request.init)
    if len(plan.sigmas) == 1 and request.strength:
        notes.warn_once(f"strength {request.strength:g} of {request.steps} steps is none: nothing is drawn")
    place = canvas(model, request)
    mask = place.drawn_mask
    pictures = images.to_tensor(place.parts, mode(model))
    if mask is not None and request.mask_content == "fill":
        pictures = filled(pictures, mask)
    if kind_of(model) == "enlarges" and request.strength == 1:  # no latents are looked at
        latents = torch.zeros(1, *model.latent_shape(place.size[1], place.size[0]), device=model.device)
    elif request.resize == "latent" and place.box == (0, 0, *place.size):
        latents = _stretched_latents(model, request, place, notes)
    else:
        latents = encoded(model, request, pictures, notes)
    concat = further(model, request, place, latents, lambda shown: encoded(model, request, shown, notes))
    small = None
    if mask is not None:
        small = resized_mask(mask, tuple(latents.shape[2:])).to(model.device)
        small = small if request.soft_mask else (small >= 0.5).float()
    count = request.num_images
    latents, concat = _rows(latents, count), concat and concat.map(lambda values: _rows(values, count))
    return FromPictures(plan, request, place, latents, small, concat, model.downsampling)


def filled(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures (n, c, h, w) whose masked part shows its surroundings, ever coarser further inside.

    The known pixels are averaged at halved sizes until nothing is unknown, and the way is gone back.
    """
    known = (mask <= 0).to(pictures)
    return _filled(pictures * known, known) if bool(known.any()) else torch.zeros_like(pictures)


def encoded(model: StableDiffusion, request: Request, pictures: Tensor, notes: Notes) -> Tensor:
    """Scaled latents (n, z, h, w) in float32, encoded in float32 where a narrower type left the finite."""
    parts = pictures.split(1) if request.deterministic else [pictures]
    tiled = Tiles(request.tiled, around(request))
    latents = torch.cat([model.encode_image(part, tiled).float() for part in parts])
    if not bool(torch.isfinite(latents).all()):
        notes.float32_retries.append("encoder")
        wide = model.float32()
        latents = torch.cat([wide.encode_image(part, tiled).float() for part in parts])
        if not bool(torch.isfinite(latents).all()):
            raise not_finite("the encoder", "for the picture to start from")
    return latents


def _check_alone(request: Request) -> None:
    """`InputError` for fields that need a picture, and there is none."""
    for name in ("mask", "mask_alpha", "only_masked", "region", "soft_mask"):
        if getattr(request, name):
            raise InputError(f"{name} is given, and there is no picture", "Give the picture as init.")
    if request.loopback > 1 or request.strength not in (None, 1):
        name = "loopback" if request.loopback > 1 else "strength"
        raise InputError(
            f"{name} is {getattr(request, name)}, and there is no picture", "Give the picture as init."
        )


def _stretched_latents(model: StableDiffusion, request: Request, place: Canvas, notes: Notes) -> Tensor:
    """The latents of the pictures at their own size, stretched to the drawing's."""
    factor = model.downsampling
    own = tuple(max(1, round(side / factor)) * factor for side in place.given[0].size)
    pictures = images.to_tensor(
        [scaled(each, cast(tuple[int, int], own)) for each in place.given], mode(model)
    )
    latents = encoded(model, request, pictures, notes)
    shape = (place.size[1] // factor, place.size[0] // factor)
    return F.interpolate(latents, shape, mode="bilinear", antialias=True)


def _rows(values: Tensor, count: int) -> Tensor:
    return values if len(values) == count else values.expand(count, *values.shape[1:])


def _filled(sums: Tensor, weights: Tensor) -> Tensor:
    """Averages of what is known, and of coarser ones where nothing is; sums: values times weights."""
    means = sums / weights.clamp(min=1e-6)
    if bool((weights > 0).all()):
        return means
    half = ((sums.shape[2] + 1) // 2, (sums.shape[3] + 1) // 2)
    coarse = _filled(F.adaptive_avg_pool2d(sums, half), F.adaptive_avg_pool2d(weights, half))
    below = F.interpolate(coarse, sums.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(weights > 0, means, below)

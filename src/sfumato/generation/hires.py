"""The second pass over a larger picture: from the drawing's pixels or its latents ("hires fix")."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from sfumato.diffusion.resize import LATENTS, resize_latents
from sfumato.errors import InputError
from sfumato.generation.canvas import as_tuple
from sfumato.intake import open_picture
from sfumato.request import Request
from sfumato.request.large import RegionText, read_region
from sfumato.upscale import enlarge


def passes(request: Request, multiple: int) -> list[Request]:
    """The drawings of a request with `hires`: one, and one larger; or the larger one of its picture alone.

    multiple: what sides must be multiples of. The second keeps `hires`, by which `second` knows it.
    """
    assert request.hires is not None and request.width is not None and request.height is not None
    width, height = (
        max(1, round(side * request.hires / multiple)) * multiple for side in (request.width, request.height)
    )
    changes: dict[str, Any] = {
        "width": width,
        "height": height,
        "strength": request.hires_strength,
        "deep_shrink": None,
        "start_noise": None,
        "regions": tuple(
            _moved(text, width / request.width, height / request.height) for text in request.regions
        ),
        "region_feather": round(request.region_feather * width / request.width),
    }
    if request.hires_steps is not None:
        changes |= {"steps": request.hires_steps, "steps_mode": "exact", "sigmas": None}
    for name in ("sampler", "prompt", "negative_prompt"):
        if (own := getattr(request, f"hires_{name}")) is not None:
            changes[name] = own
    larger = request.model_copy(update=changes)
    if request.init is None:
        return [request.model_copy(update={"hires": None}), larger]
    if request.hires_upscaler in LATENTS and request.hires_network is None:
        raise InputError("there are no latents of a picture that is given", "Take lanczos or a network.")
    return [second(larger, [open_picture(one) for one in as_tuple(request.init)], None)]


def second(request: Request, pictures: list[Image.Image], latents: Tensor | None) -> Request:
    """The second pass, starting from pictures, or from the latents of their drawing, made larger."""
    assert request.width is not None and request.height is not None
    size, mode = (request.width, request.height), LATENTS.get(request.hires_upscaler)
    if mode is not None and request.hires_network is None:
        assert latents is not None
        factor = pictures[0].width // latents.shape[-1]
        init: Any = resize_latents(latents, (size[1] // factor, size[0] // factor), mode)
    else:
        given = request.hires_network if request.hires_network is not None else request.hires_upscaler
        init = tuple(enlarge(picture, given, size) for picture in pictures)
    return request.model_copy(update={"init": init, "hires": None})


def _moved(text: str, wide: float, high: float) -> str:
    """A region's text for a picture so many times as wide and high."""
    region: RegionText = read_region(text)
    if region.box is None:
        return text
    left, top, width, height = region.box
    right, bottom = round((left + width) * wide), round((top + height) * high)
    left, top = round(left * wide), round(top * high)
    return f"{left},{top},{right - left},{bottom - top}: {region.prompt}"

"""What a request leaves open, decided by the model and then by general defaults."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError
from sfumato.generation.canvas import drawing_size, margins
from sfumato.generation.concat import kind_of
from sfumato.model import StableDiffusion
from sfumato.presets import noise_levels
from sfumato.request import Request, input_error

DEFAULTS: Mapping[str, Any] = {  # where neither the request nor the model says
    "steps": 25,
    "sampler": "dpmpp_2m",
    "guidance": 7.5,  # Stable Diffusion v1, scripts/txt2img.py --scale
}
STRENGTH = 0.75  # Stable Diffusion v1, scripts/img2img.py --strength
IMAGE_GUIDANCE = 1.5  # Brooks et al. 2023, appendix A.4
NOISE_LEVEL = 20  # Stable Diffusion's x4 upscaler, scripts/gradio/superresolution.py


def complete(model: StableDiffusion, request: Request) -> Request:
    """The request with every open field decided: by the model's defaults, then `DEFAULTS`, a random seed."""
    sides = model.image_size
    if len(sides) == 1 and request.height not in (None, 1):
        raise InputError(
            f"{model.name!r} draws in one dimension; height is {request.height}", "Give width alone."
        )
    values = {name: getattr(request, name) for name in Request.model_fields}
    choices = {
        **DEFAULTS,
        **dict(zip(("width", "height"), drawing_size(model, request), strict=True)),
        **_picture_choices(model, request),
        "seed": secrets.randbelow(2**32),
        **{name: value for name, value in model.defaults.items() if name != "spacing"},
    }
    if request.sampler is not None and SAMPLERS[request.sampler].guidance is not None:
        choices["guidance"] = SAMPLERS[request.sampler].guidance
    values |= {name: value for name, value in choices.items() if values.get(name) is None}
    for name, own in _text_choices(model, values).items():
        if own is None and values[name] is not None:
            raise InputError(f"{name} is {values[name]}; {model.name!r} does not read it", "Leave it out.")
        values[name] = own if values[name] is None else values[name]
    if request.prompt is None and request.label is None and not request.negative_prompt:
        values["guidance"] = 1.0  # there is nothing to guide towards
    if request.spacing == "auto" and values["sampler"] in SAMPLERS:
        own = model.defaults.get("spacing") if values["sampler"] == model.defaults.get("sampler") else None
        values["spacing"] = own or SAMPLERS[values["sampler"]].spacing
    if request.sigmas is not None:
        values["steps"] = len(request.sigmas) - 1
    if values["sampler"] == "ddpm" and values["variance"] is None:
        values["variance"] = "large" if values["steps"] == model.schedule.num_timesteps else "small"
    try:
        return Request(**values)
    except ValidationError as error:
        raise input_error(error) from error


def _picture_choices(model: StableDiffusion, request: Request) -> dict[str, Any]:
    """How far to go from a picture; `InputError` for what else of it the model does not read."""
    kind = kind_of(model)
    if kind != "edits" and request.image_guidance is not None:
        raise InputError(
            f"image_guidance is {request.image_guidance:g}; {model.name!r} does not read it", "Leave it out."
        )
    levels = noise_levels(model.config)
    if request.noise_level is not None and not request.noise_level < (levels or 0):
        most = "does not read it" if levels is None else f"knows 0 to {levels - 1}"
        raise InputError(f"noise_level is {request.noise_level}; {model.name!r} {most}", "Leave it out.")
    if request.init is None:
        return {}
    anew = kind is not None or any(margins(request))
    return {
        "strength": 1.0 if anew else STRENGTH,
        **({"image_guidance": IMAGE_GUIDANCE} if kind == "edits" else {}),
        **({} if levels is None else {"noise_level": min(NOISE_LEVEL, levels - 1)}),
    }


def _text_choices(model: StableDiffusion, values: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own value of every field that some text encoders read; None where its own does not."""
    config = model.config
    words = config.text is not None or config.bert is not None
    sizes = config.text2 is not None
    return {
        "clip_skip": None if config.text is None else config.clip_skip,
        "zeros_for_empty": config.zeros_for_empty if words else None,
        "original_width": values["width"] if sizes else None,
        "original_height": values["height"] if sizes else None,
        "crop_left": 0 if sizes else None,
        "crop_top": 0 if sizes else None,
    }

"""The noise levels of a run: a spacing, and where in it a picture to start from comes in."""

from __future__ import annotations

import math

from sfumato.diffusion.samplers import sampler
from sfumato.diffusion.spacing import Spacing, custom, space
from sfumato.errors import InputError
from sfumato.model import StableDiffusion
from sfumato.request import Request

ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def levels(model: StableDiffusion, request: Request) -> Spacing:
    """The levels of a request from `complete`; [0.0] alone where its strength leaves no step.

    `strength` takes the last floor(strength * steps) steps of a run of `steps`; `exact` takes the last
    `steps` of a run of floor(steps / strength), and all of the request's own `sigmas`. A run that starts from
    a picture starts at x0 + sigma * noise whatever the spacing; at strength 1 from noise alone, of the
    spacing's own scale.
    """
    assert request.steps is not None
    strength = 1.0 if request.strength is None else request.strength
    exact = request.steps_mode == "exact"
    running = request.steps if exact and strength > 0 else math.floor(request.steps * strength + ROUNDING)
    if running == 0:
        return Spacing([0.0], 0.0)
    if request.sigmas is not None:
        whole = custom(request.sigmas)
    else:
        whole = _spaced(
            model, request, math.floor(request.steps / strength + ROUNDING) if exact else request.steps
        )
    if strength == 1:
        return whole
    own = whole.sigmas[-(running + 1) :]
    return Spacing(own, own[0])


def _spaced(model: StableDiffusion, request: Request, steps: int) -> Spacing:
    assert request.sampler is not None
    row = sampler(request.sampler)
    options, drop = request.spacing_options, row.discard_penultimate
    try:
        return space(request.spacing, model.schedule, steps, options, discard_penultimate=drop)
    except InputError as error:
        if steps == request.steps:
            raise
        raise InputError(
            f"{request.steps} steps from strength {request.strength:g} are the end of {steps} steps: "
            f"{error.message}",
            error.hint or "Take fewer steps, or a higher strength.",
        ) from error

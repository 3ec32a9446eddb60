"""The conditions of a request: prompt, negative prompt and label, encoded."""

from __future__ import annotations

from dataclasses import replace

import torch

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.generation.notes import Notes, not_finite
from sfumato.model import StableDiffusion
from sfumato.presets import num_classes
from sfumato.request import Request


def conditions(model: StableDiffusion, request: Request, notes: Notes) -> dict[str, Conditioning]:
    """The conditions by the branch of guidance that reads them, a row for each picture."""
    positive = encoded(model, request, request.prompt, notes)
    negative = encoded(model, request, request.negative_prompt or None, notes, "negative prompt")
    model.check_pictures(positive)
    if request.negative_prompt and request.guidance == 1:
        notes.warnings.append("the negative prompt has no effect at guidance 1")
    count = num_classes(model.config)
    free = model.config.classes is not None and model.config.classes.unconditional
    if request.label is None and count is not None and not free:
        raise InputError(f"{model.name!r} draws one of {count} classes", f"Give a label, 0 to {count - 1}.")
    if request.label is not None:
        drawn = model.encode_label([request.label])
        positive = drawn if drawn.context is not None else replace(positive, vector=drawn.vector)
        if not free and request.guidance != 1:
            raise InputError(
                f"{model.name!r} was not trained without a class, so its guidance is 1",
                "Use guidance 1 with it.",
            )
    return {
        name: cond.repeat(request.num_images) for name, cond in (("cond", positive), ("uncond", negative))
    }


def encoded(
    model: StableDiffusion, request: Request, prompt: str | None, notes: Notes, role: str = "prompt"
) -> Conditioning:
    """One row: a prompt, or nothing asked for. A model without text takes the empty prompt as nothing."""
    skip, zeros = request.clip_skip, request.zeros_for_empty
    assert request.height is not None and request.width is not None
    size = (request.height, request.width)
    original = (request.original_height or request.height, request.original_width or request.width)
    crop = (request.crop_top or 0, request.crop_left or 0)

    def encode(model: StableDiffusion) -> Conditioning:
        if prompt:
            return model.encode_prompt([prompt], skip, size=size, original=original, crop=crop)
        return model.uncondition(1, skip, zeros, size=size, original=original, crop=crop)

    for cut in model.prompt_cuts([prompt] if prompt else []):
        if cut:
            notes.warnings.append(f"the {role} is longer than the model reads; this was cut: {cut!r}")
    cond = encode(model)
    if not _finite_condition(cond):
        notes.float32_retries.append("text encoder")
        cond = encode(model.float32())
        if not _finite_condition(cond):
            raise not_finite("the text encoder", f"for {prompt!r}")
    return cond


def _finite_condition(cond: Conditioning) -> bool:
    found: list[bool] = []
    cond.map(lambda value: (found.append(bool(torch.isfinite(value).all())), value)[1])
    return all(found)

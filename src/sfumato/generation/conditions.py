"""The conditions of a request: prompts, negative prompts and label, encoded, for every stage of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError
from sfumato.generation.notes import Notes, not_finite
from sfumato.generation.written import Written, written
from sfumato.model import StableDiffusion
from sfumato.presets import no_class, num_classes
from sfumato.request import Request
from sfumato.request.large import read_region
from sfumato.text.chunks import missing
from sfumato.text.emphasis import segments

Vectors = Mapping[str, Mapping[str, Tensor]]
"""Textual inversions: name -> text encoder -> (n, width)."""


@dataclass(frozen=True)
class Stage:
    """The conditions until the end of step `until`, from 1: by branch of guidance, a row for each picture."""

    until: int
    conds: Mapping[str, Conditioning]


@dataclass(frozen=True)
class Conditions:
    """The stages of a run in order, the weights of the prompts that AND composes, and its regions'."""

    stages: tuple[Stage, ...]
    weights: tuple[float, ...] = (1.0,)
    regions: tuple[Conditions, ...] = ()

    def map(self, change: Callable[[Mapping[str, Conditioning]], Mapping[str, Conditioning]]) -> Conditions:
        """The branches of every stage, the regions' too, changed."""
        stages = tuple(replace(stage, conds=change(stage.conds)) for stage in self.stages)
        return replace(self, stages=stages, regions=tuple(region.map(change) for region in self.regions))

    def each(self, change: Callable[[Conditioning], Conditioning]) -> Conditions:
        """Every condition changed."""
        return self.map(lambda conds: {name: change(cond) for name, cond in conds.items()})


def conditions(
    model: StableDiffusion, request: Request, prompts: Sequence[Written], vectors: Vectors, notes: Notes
) -> Conditions:
    """Everything the network is conditioned on; each text is encoded once. Errors as `generate`."""
    assert request.steps is not None
    _check_label(model, request, notes)
    weights = _weights(prompts)
    known: dict[tuple[str | None, bool], Conditioning] = {}

    def row(text: str | None, role: str) -> Conditioning:
        key = (text or None, role == "prompt")
        if key not in known:
            known[key] = encoded(model, request, text or None, notes, role, vectors)
        return known[key]

    def joined(texts: Sequence[str | None], role: str) -> Conditioning:
        rows = [row(text, role) for text in texts]
        if len(set(texts)) == 1:
            return rows[0].repeat(len(rows))
        return concatenate(_equally_long(rows))

    def stage(until: int) -> Stage:
        conds: dict[str, Conditioning] = {}
        for index in range(len(weights)):
            texts = [None if one.positive is None else one.positive[index].at(until) for one in prompts]
            labels = [] if request.label is None else [request.label] * len(prompts)
            conds[f"cond{index or ''}"] = _labelled(model, labels, joined(texts, "prompt"))
        negative = joined([one.negative.at(until) for one in prompts], "negative prompt")
        conds["uncond"] = conds["negative"] = negative
        if request.perp_neg is not None:
            conds["uncond"] = joined([None] * len(prompts), "negative prompt")
        return Stage(until, conds)

    branches = [branch for one in prompts for branch in (*(one.positive or ()), one.negative)]
    ends = {each.until for branch in branches for each in branch.stages} | {request.steps}
    regions = tuple(_of_region(model, request, text, vectors, notes) for text in request.regions)
    return Conditions(tuple(stage(until) for until in sorted(ends)), weights, regions)


def _of_region(
    model: StableDiffusion, request: Request, text: str, vectors: Vectors, notes: Notes
) -> Conditions:
    """The conditions of a region: those of the request with the region's prompt."""
    own = request.model_copy(update={"prompt": read_region(text).prompt, "regions": ()})
    prompts = written(own, notes)
    if any(one.loras for one in prompts):
        notes.warn_once("LoRA tags in a region's prompt were left out: they change the whole picture")
    return conditions(model, own, prompts, vectors, notes)


def encoded(
    model: StableDiffusion,
    request: Request,
    prompt: str | None,
    notes: Notes,
    role: str = "prompt",
    vectors: Vectors | None = None,
) -> Conditioning:
    """One row: a prompt, or nothing asked for. A model without text takes the empty prompt as nothing."""
    skip, zeros = request.clip_skip, request.zeros_for_empty
    assert request.height is not None and request.width is not None
    size = (request.height, request.width)
    original = (request.original_height or request.height, request.original_width or request.width)
    crop = (request.crop_top or 0, request.crop_left or 0)
    dialect = None if request.emphasis == "plain" or model.config.text is None else request.emphasis

    def encode(model: StableDiffusion) -> Conditioning:
        if not prompt:
            return model.uncondition(1, skip, zeros, size=size, original=original, crop=crop)
        return model.encode_prompt(
            [prompt], skip, size=size, original=original, crop=crop, dialect=dialect, vectors=vectors
        )

    if prompt and dialect is None:
        for cut in filter(None, model.prompt_cuts([prompt])):
            notes.warn_once(f"the {role} is longer than the model reads; this was cut: {cut!r}")
    elif prompt:
        for name in missing(segments(prompt), {name: 1 for name in vectors or {}}):
            notes.warn_once(f"there is no embedding {name!r}; the {role} goes without it")
    cond = encode(model)
    if not _finite_condition(cond):
        notes.float32_retries.append("text encoder")
        cond = encode(model.float32())
        if not _finite_condition(cond):
            raise not_finite("the text encoder", f"for {prompt!r}")
    empty = no_class(model.config)
    return _labelled(model, [] if empty is None else [empty], cond)


def _check_label(model: StableDiffusion, request: Request, notes: Notes) -> None:
    """`InputError` for a label that is missing, or cannot be guided by; a warning for what has no effect."""
    unused = request.guidance == 1 and SAMPLERS[request.sampler or ""].guidance is None
    if request.negative_prompt and unused:
        notes.warnings.append("the negative prompt has no effect at guidance 1")
    count = num_classes(model.config)
    free = no_class(model.config) is not None
    if request.label is None and count is not None and not free:
        raise InputError(f"{model.name!r} draws one of {count} classes", f"Give a label, 0 to {count - 1}.")
    if request.label is not None and not free and request.guidance != 1:
        model.encode_label([request.label])  # whose own error comes first
        raise InputError(
            f"{model.name!r} was not trained without a class, so its guidance is 1", "Use guidance 1 with it."
        )


def _labelled(model: StableDiffusion, labels: list[int], cond: Conditioning) -> Conditioning:
    """The condition with a label for each of its rows, or as it is without any."""
    if not labels:
        return cond
    drawn = model.encode_label(labels)
    return drawn if drawn.context is not None else replace(cond, vector=drawn.vector)


def _weights(prompts: Sequence[Written]) -> tuple[float, ...]:
    found = {tuple(branch.weight for branch in one.positive or ()) or (1.0,) for one in prompts}
    if len(found) > 1:
        raise InputError(
            "the prompts drawn for these pictures have other numbers or weights of AND",
            "Draw them one at a time.",
        )
    return found.pop()


def _equally_long(rows: Sequence[Conditioning]) -> list[Conditioning]:
    """Rows whose contexts have as many tokens: each is repeated, which attention to it does not notice."""
    lengths = [0 if row.context is None else row.context.shape[1] for row in rows]
    whole = math.lcm(*(length for length in lengths if length))
    return [
        row if row.context is None else replace(row, context=row.context.repeat(1, whole // length, 1))
        for row, length in zip(rows, lengths, strict=True)
    ]


def _finite_condition(cond: Conditioning) -> bool:
    found: list[bool] = []
    cond.map(lambda value: (found.append(bool(torch.isfinite(value).all())), value)[1])
    return all(found)

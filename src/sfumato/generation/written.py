"""What a request's prompts say: styles and choices drawn, tags taken out, texts over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import InputError
from sfumato.generation.notes import Notes
from sfumato.request import Request
from sfumato.text.prompt_dynamic import expand, unknown_wildcards
from sfumato.text.prompt_schedule import Branch, Stage, plan
from sfumato.text.prompt_tree import APPLIED_TAGS, Tag, walk
from sfumato.text.prompts import parse
from sfumato.text.styles import apply_styles, read_styles
from sfumato.text.wildcards import read_wildcards


@dataclass(frozen=True)
class Written:
    """The prompts of one picture: as drawn, and as texts over the steps.

    positive: the parts that AND composes; None without a prompt. loras: name, weight for the U-Net and for
    the text encoders, as its tags say.
    """

    prompt: str | None
    negative_prompt: str
    positive: tuple[Branch, ...] | None
    negative: Branch
    loras: tuple[tuple[str, float, float], ...]


def written(request: Request, notes: Notes) -> list[Written]:
    """The prompts of every picture, choices drawn by its seed; `InputError` for a style that is not there."""
    assert request.seed is not None and request.steps is not None
    prompt, negative = request.prompt, request.negative_prompt
    if request.emphasis == "plain":
        own = None if prompt is None else (_whole(prompt, request.steps),)
        one = Written(prompt, negative, own, _whole(negative, request.steps), ())
        return [one] * request.num_images
    if request.styles:
        if request.styles_file is None:
            raise InputError(
                "styles are asked for, and there is no styles_file", "Give the CSV file they are in."
            )
        known = read_styles(Path(request.styles_file))
        prompt, negative = apply_styles(prompt or "", negative, request.styles, known)
    wildcards: Mapping[str, Sequence[str]] = {}
    if request.wildcards is not None:
        wildcards = read_wildcards(Path(request.wildcards))
    for name in unknown_wildcards(f"{prompt or ''}\n{negative}", wildcards):
        notes.warnings.append(f"there is no wildcard {name!r}; it was left as it is")
    seeds = [request.seed + index for index in range(request.num_images)]
    return [_read(prompt, negative, seed, request.steps, wildcards, notes) for seed in seeds]


def _read(
    prompt: str | None,
    negative: str,
    seed: int,
    steps: int,
    wildcards: Mapping[str, Sequence[str]],
    notes: Notes,
) -> Written:
    drawn = None if prompt is None else expand(prompt, seed, wildcards)
    drawn_negative = expand(negative, seed, wildcards)
    tree = parse(drawn or "")
    tags = [node for node in walk(tree) if isinstance(node, Tag)]
    for tag in tags:
        if tag.kind not in APPLIED_TAGS:
            notes.warn_once(f"{tag.source} was left out: there are no {tag.kind} tags here")
    loras = tuple((tag.name, tag.unet or 0.0, tag.te or 0.0) for tag in tags if tag.kind in APPLIED_TAGS)
    (branch,) = plan(parse(drawn_negative, compose=False), steps)
    return Written(drawn, drawn_negative, None if drawn is None else plan(tree, steps), branch, loras)


def _whole(text: str, steps: int) -> Branch:
    return Branch(1.0, (Stage(steps, text),))

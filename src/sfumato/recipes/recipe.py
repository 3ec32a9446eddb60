"""A recipe: what a picture's file says of how it was drawn, as a request and as everything else it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sfumato.diffusion.names import resolve, resolve_spacing
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError
from sfumato.request import Request
from sfumato.request.values import folder

MAX_WARNING = 300  # characters
MAX_DEPTH = 40  # of lists and objects in a value


def _anything(annotation: Any) -> bool:
    return annotation is Any or any(_anything(part) for part in get_args(annotation))


def _names_files(name: str, each: FieldInfo) -> bool:
    """Whether a field holds paths: it says that it is a folder, or takes what may be anything."""
    marked = any(getattr(mark, "func", None) is folder for mark in each.metadata)
    return name in ("lora", "control") or marked or _anything(each.annotation)


PATHS = frozenset(name for name, each in Request.model_fields.items() if _names_files(name, each))
"""Fields that name files. A stranger's picture must not say what is read from this disk."""


# What a recipe says beside the request's fields: about the run, not orders for the next one.
ABOUT = frozenset({
    "model", "model_digest", "version", "device", "dtype", "float32_retries", "batch_size", "batch_index",
    "torch", "threads", "hardware", "picture_sha256", "tool_version", "loras", "embeddings", "Version",
    "quality", "grid", "drawn_prompt", "drawn_negative_prompt", "steps_run", "controls", "upscaler",
    "upscale", "upscaled_from", "upscaled_digest",
}) | {f"{name}_{kind}" for name in PATHS for kind in ("sha256", "digest")}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is known of a picture.

    tool: the program that wrote it; "" where the file says nothing. request: what was asked for, checked;
    None where there is nothing. For pictures of our own it is the whole batch's, of which this is the one at
    `index`. values: all that the file says, by our names where we have one and by its own otherwise.
    ignored: the names among them that the request does not hold. warnings: for people, one line each.
    """

    tool: str
    request: Request | None
    values: dict[str, Any]
    ignored: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    index: int = 0


def recipe(tool: str, values: Mapping[str, Any], warnings: list[str] | None = None) -> Recipe:
    """The recipe of values found in a file: every value that the request can take is checked and taken.

    Never fails: a value that cannot be taken stays in `values`, and a warning says why.
    """
    found, told = _whole(dict(values)), list(warnings or ())
    wanted = {name: found[name] for name in Request.model_fields if found.get(name) is not None}
    for name in PATHS & wanted.keys():
        del wanted[name]
        told.append(f"{name} names a file; files are not taken from a picture")
    for name, read in (("sampler", resolve), ("spacing", resolve_spacing)):
        if name in wanted and (problem := _problem(read, wanted[name])):
            del wanted[name]
            told.append(problem)
    request = None
    while wanted and request is None:
        request = _checked(wanted, told)
    found |= {name: value for name, value in _given(request).items() if name in found}
    taken = set() if request is None else request.model_fields_set
    ignored = [
        name for name, value in found.items() if value is not None and name not in taken and name not in ABOUT
    ]
    return Recipe(
        printable(tool), request, found, ignored, [printable(warning)[:MAX_WARNING] for warning in told]
    )


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor or end its line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _whole(value: Any, depth: int = 0) -> Any:
    """The value with halves of characters replaced, which no file can hold, and no deeper than 40 levels."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if depth > MAX_DEPTH and isinstance(value, list | dict):
        return None
    if isinstance(value, list):
        return [_whole(each, depth + 1) for each in value]
    if isinstance(value, dict):
        return {_whole(str(name)): _whole(each, depth + 1) for name, each in value.items()}
    return value


def _problem(read: Any, name: Any) -> str:
    try:
        read(str(name))
    except InputError as error:
        return error.message
    return ""


def _checked(wanted: dict[str, Any], told: list[str]) -> Request | None:
    """The request of these values; where it refuses some, None, and they are `wanted` no more."""
    try:
        return _with_known_options(Request(**wanted), told)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    blamed = {str(each["loc"][0]): each["msg"] for each in problems if each["loc"]}
    if not blamed.keys() & wanted.keys():
        blamed = dict.fromkeys(wanted, problems[0]["msg"])
    for name, message in blamed.items():
        if name in wanted:
            told.append(f"{name} is {_shown(wanted.pop(name))}, which is not taken: {message}")
    return None


def _with_known_options(request: Request, told: list[str]) -> Request:
    """Without options that sampler and spacing do not have, which other tools write at any rate."""
    changes: dict[str, Any] = {}
    if request.sampler is not None:
        row = SAMPLERS[request.sampler]
        changes["sampler_options"] = _known(request.sampler_options, row.options, row.title, told)
        if request.eta is not None and "eta" not in row.options:
            changes["eta"] = None
    if request.spacing in SPACINGS:
        line = SPACINGS[request.spacing]
        changes["spacing_options"] = _known(request.spacing_options, line.options, line.title, told)
    changes = {name: value for name, value in changes.items() if value != getattr(request, name)}
    if not changes:
        return request
    values = {name: getattr(request, name) for name in request.model_fields_set} | changes
    return Request(**{name: value for name, value in values.items() if value is not None})


def _known(given: Mapping[str, Any], allowed: Any, title: str, told: list[str]) -> dict[str, Any]:
    for name in given:
        if name not in allowed:
            told.append(f"{title} has no option {_shown(name)}")
    return {name: value for name, value in given.items() if name in allowed}


def _given(request: Request | None) -> dict[str, Any]:
    """The request's values as JSON has them."""
    return (
        {} if request is None else json.loads(request.model_dump_json(exclude=set(PATHS), exclude_unset=True))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

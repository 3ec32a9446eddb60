"""Reading the recipe of a picture, whichever tool wrote it; nothing in it is acted on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sfumato.recipes.comfyui import from_comfyui, parse_graph
from sfumato.recipes.containers import read_container
from sfumato.recipes.embed import JSON_KEY, JSON_PREFIX, TEXT_KEY
from sfumato.recipes.invokeai import from_invokeai
from sfumato.recipes.recipe import Recipe, recipe
from sfumato.recipes.text_form import from_text, tool_of
from sfumato.request import MAX_SEED

INVOKEAI = ("invokeai_metadata", "sd-metadata")
EXIF = ("UserComment", "ImageDescription", "Make", "Model", "Software", "comment")
DREAM = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale", "A": "sampler"}


def read(path: Path) -> Recipe:
    """The recipe in a PNG, JPEG or WebP file; no pixel is decoded.

    One without any gives a `Recipe` whose tool is "". Raises `InputError` for a file that is no such picture.
    """
    return from_texts(read_container(path).texts)


def from_texts(texts: Mapping[str, str]) -> Recipe:
    """The recipe of a picture's texts by their names; never fails, whatever they hold.

    Ours comes first, then AUTOMATIC1111's form, ComfyUI's graph, InvokeAI's metadata.
    """
    inside = {name: text.partition(":")[2] for text in texts.values() for name in ("prompt", "sfumato")
              if text.startswith(f"{name}:")}  # fmt: skip
    ours = _object(texts.get(JSON_KEY)) or _object(inside.get(JSON_PREFIX[:-1]))
    if ours is not None:
        return _ours(ours)
    for name in (TEXT_KEY, *EXIF):
        text = texts.get(name, "")
        if (name == TEXT_KEY and text.strip()) or re.search(r"(?m)^\s*Steps:\s*\d", text):
            return _from_text(text)
    for text in (texts.get("prompt"), inside.get("prompt"), texts.get("UserComment")):
        if text and (graph := parse_graph(text)) is not None:
            return from_comfyui(graph)
    for name in INVOKEAI:
        if (metadata := _object(texts.get(name))) is not None:
            return from_invokeai(metadata)
    if "Dream" in texts:
        return from_invokeai(_dream(texts["Dream"]))
    return Recipe("", None, {})


def _from_text(text: str) -> Recipe:
    values = from_text(text)
    tool = tool_of(values)
    if tool == "sfumato":
        return _ours({**values, "version": values.pop("Version").removeprefix("sfumato").strip()})
    warnings = []
    if "RNG" not in text and values.get("noise_source") == "philox":
        warnings.append("it names no generator of noise; that of an NVIDIA GPU is taken, as is the habit")
    return recipe(tool, values, warnings)


def _ours(values: Mapping[str, Any]) -> Recipe:
    """The whole batch's request of which this picture is one."""
    size, index = (_count(values.get(name), least) for name, least in (("batch_size", 1), ("batch_index", 0)))
    seed = _count(values.get("seed"), None)
    batch = size is not None and index is not None and seed is not None and index < size and index <= seed
    found = recipe("sfumato", values)
    if not batch or found.request is None:
        return found
    assert size is not None and index is not None and seed is not None
    changes = {"num_images": size, "seed": seed - index}
    again = recipe("sfumato", {**values, **changes})
    return replace(found, request=again.request, index=index)


def _count(value: Any, least: int | None) -> int | None:
    """A whole number of at least `least`; of none given, `least` itself."""
    if value is None:
        return least
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if (least or 0) <= number <= MAX_SEED else None


def _object(text: str | None) -> dict[str, Any] | None:
    """A JSON object, None for any other text."""
    if not text or not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dream(text: str) -> dict[str, Any]:
    """InvokeAI's first form, the command line: "a fox" -s 50 -S 123 -W 512 -H 512 -C 7.5 -A k_lms."""
    try:
        words = shlex.split(text[:100_000])
    except ValueError:
        return {"prompt": text}
    found: dict[str, Any] = {"prompt": words[0] if words else ""}
    for word, value in pairwise([*words[1:], ""]):
        if word.startswith("-") and word[1:2] in DREAM:
            found[DREAM[word[1:2]]] = word[2:] or value
    return found

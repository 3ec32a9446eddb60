"""Many requests from one text: the prompt matrix `a|b|c`, and files of prompts with options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sfumato.errors import InputError, nearest
from sfumato.request import Request, input_error

MAX_PARTS = 11  # of a matrix: 2^10 pictures
MAX_FILE, MAX_LINES = 8 << 20, 10_000  # bytes, prompts
CLOSING = {"[": "]", "{": "}", "(": ")", "<": ">"}
OPTION = re.compile(r"(?:^|(?<=\s))--(?=[A-Za-z])")
ALIASES = {  # of AUTOMATIC1111's script, and of kohya's
    "cfg_scale": "guidance",
    "sampler_name": "sampler",
    "scheduler": "spacing",
    "batch_size": "num_images",
    "subseed": "variation_seed",
    "subseed_strength": "variation_strength",
    "seed_resize_from_w": "seed_resize_width",
    "seed_resize_from_h": "seed_resize_height",
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance",
}


def matrix(prompt: str) -> list[str]:
    """The prompts of `a|b|c`: the first part with every choice of the others, AUTOMATIC1111's prompt matrix.

    2^(parts - 1) of them, the second part changing fastest, joined by commas. A bar in brackets or after a
    backslash is the prompt language's own. `InputError` for more than 11 parts.
    """
    first, *others = (part.strip().strip(",").strip() for part in _parts(prompt))
    if len(others) >= MAX_PARTS:
        raise InputError(
            f"a matrix of {len(others) + 1} parts has {2 ** len(others)} prompts",
            f"Give {MAX_PARTS} parts at most.",
        )
    chosen = (
        [first, *(part for i, part in enumerate(others) if number >> i & 1)]
        for number in range(2 ** len(others))
    )
    return [", ".join(part for part in parts if part) for parts in chosen]


def _parts(prompt: str) -> list[str]:
    """The prompt cut at its bars outside brackets; a bracket that is never closed is none."""
    last = {opening: prompt.rfind(closing) for opening, closing in CLOSING.items()}
    parts, begin, place, waiting = [], 0, 0, list[str]()
    while place < len(prompt):
        letter = prompt[place]
        if letter == "\\":
            place += 1
        elif last.get(letter, -1) > place:
            waiting.append(CLOSING[letter])
        elif waiting and letter == waiting[-1]:
            waiting.pop()
        elif letter == "|" and not waiting:
            parts.append(prompt[begin:place])
            begin = place + 1
        place += 1
    return [*parts, prompt[begin:]]


def read_prompts(path: Path, base: Request) -> list[Request]:
    """The requests of a file's lines, each with what `base` says and it does not.

    A line is a prompt with options behind it, `a fox --seed 3 --negative-prompt "blurry, dark"`, or options
    alone with --prompt "a fox" among them; their names are the request's fields, or those of AUTOMATIC1111's
    and kohya's files. Empty lines and those that begin with # are left out. `InputError` names the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise InputError(f"cannot read the prompts of {path}: {cause}", "Give a text file.") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines or len(lines) > MAX_LINES or len(data) > MAX_FILE:
        count = f"more than {MAX_LINES:,}" if lines else "no"
        raise InputError(f"{path} holds {count} prompts", "Give one prompt a line.")
    requests = []
    for number, line in lines:
        try:
            requests.append(with_values(base, read_line(line)))
        except InputError as error:
            raise InputError(f"line {number} of {path}: {error.message}", error.hint) from error
    return requests


def read_line(line: str) -> dict[str, Any]:
    """The request's fields that a line gives, as text; `InputError` for an option that there is not."""
    found = OPTION.search(line)
    if found is None:
        return {"prompt": line}
    values: dict[str, Any] = {}
    if prompt := line[: found.start()].strip():
        values["prompt"] = prompt
    try:
        words = shlex.split(line[found.start() :])
    except ValueError as error:
        raise InputError(f"its quotes do not match ({error})", "Close every quote.") from error
    while words:
        name, equals, value = words.pop(0).removeprefix("--").partition("=")
        field, given = _field(name)
        if field in values:
            raise InputError(f"{name!r} is given twice", "Give every option once.")
        if Request.model_fields[field].annotation is bool and not equals:
            values[field] = given
        elif equals or words:
            values[field] = value if equals else words.pop(0)
        else:
            raise InputError(f"the option --{name} has no value", "Write it behind the name.")
        if words and not words[0].startswith("--"):
            raise InputError(f"{words[0]!r} follows --{name}", "A value of several words stands in quotes.")
    return values


def with_values(base: Request, values: Mapping[str, Any]) -> Request:
    """`base` with other values for some fields; `InputError` where they are not allowed."""
    given = {name: getattr(base, name) for name in base.model_fields_set}
    try:
        return Request(**{**given, **values})
    except ValidationError as error:
        raise input_error(error) from error


def _field(name: str) -> tuple[str, bool]:
    """The field that an option means, and whether it turns it on."""
    key = name.replace("-", "_")
    key = ALIASES.get(key, key)
    if key in Request.model_fields:
        return key, True
    if key.startswith("no_") and key[3:] in Request.model_fields:
        return key[3:], False
    raise InputError(f"there is no option {name!r}", nearest(key, Request.model_fields))

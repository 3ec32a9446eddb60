"""X/Y/Z grids: axes of any field of a request, read from text, and the requests of their cells."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sfumato.errors import InputError, nearest
from sfumato.recipes.prompts import with_values
from sfumato.request import Request

MAX_VALUES = 1_000  # of an axis
MAX_CELLS = 10_000
NUMBER = r"-?\d{1,15}(?:\.\d{1,15})?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?:/(\d{{1,4}}))?")
SEARCHED = ("prompt", "negative_prompt")
OPTIONS = ("sampler_options", "spacing_options", "apg_options")
NO_AXIS = {"num_images": "A cell holds one picture."}


@dataclass(frozen=True)
class Axis:
    """A field and its values, as text.

    word: in a prompt, the word that the values replace; of options, the option that they are for; else None.
    """

    field: str
    values: tuple[str, ...]
    word: str | None = None

    @property
    def title(self) -> str:
        """What a sheet writes at the axis."""
        name = self.field.replace("_", " ")
        if self.word is None:
            return name
        return self.word.replace("_", " ") if self.field in OPTIONS else f"{name}: {self.word}"

    def change(self, request: Request, value: str) -> Request:
        """The request with this axis at one of its values; `InputError` where that is not allowed."""
        if self.word is None:
            return with_values(request, {self.field: value})
        if self.field in OPTIONS:
            options = {**getattr(request, self.field), self.word: _typed(value)}
            return with_values(request, {self.field: options})
        text = getattr(request, self.field) or ""
        if self.word not in text:
            raise InputError(
                f"{self.word!r} is not in the {self.field.replace('_', ' ')} {text!r}",
                "Name a word of it to replace.",
            )
        return with_values(request, {self.field: text.replace(self.word, value)})


def read_axis(text: str) -> Axis:
    """An axis of its text.

    `field=value,value,...`: values with commas stand in double quotes; numbers in even steps are A..B (by
    ones) or A..B/N (N of them, both ends included). `prompt:word=other,other` replaces a word of the prompt,
    `sampler_options.s_churn=0,10` sets one option. `InputError` for anything else.
    """
    name, equals, rest = text.partition("=")
    if not equals or not rest.strip():
        raise InputError(f"{text!r} is no axis", "Write field=value,value, as guidance=4,7,10.")
    field, word = _named(name.strip())
    values: list[str] = []
    for cell in next(csv.reader([rest], skipinitialspace=True), []):
        found = RANGE.fullmatch(cell.strip())
        values += _spread(field, found) if found else [cell.strip()]
    if not 1 <= len(values) <= MAX_VALUES:
        raise InputError(f"the axis {field} has {len(values)} values", f"Give 1 to {MAX_VALUES}.")
    return Axis(field, tuple(values), word)


def cells(base: Request, axes: Sequence[Axis]) -> Iterator[tuple[tuple[str, ...], Request]]:
    """(values, request) for every cell, the last axis changing fastest; `InputError` names a value's axis.

    A word in a prompt is replaced before another value of the prompt's own is taken.
    """
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_CELLS:
        raise InputError(f"the grid has {count:,} cells", f"Give {MAX_CELLS:,} at most.")
    twice = {axis.title for axis in axes if [each.title for each in axes].count(axis.title) > 1}
    if twice:
        raise InputError(f"two axes are of {', '.join(sorted(twice))}", "Give each axis another field.")
    # A whole prompt comes before words replaced in it, a sampler before its options.
    order = sorted(range(len(axes)), key=lambda i: (axes[i].word is not None, i))
    for values in itertools.product(*(axis.values for axis in axes)):
        request = base
        for i in order:
            try:
                request = axes[i].change(request, values[i])
            except InputError as error:
                raise InputError(f"axis {axes[i].title}: {error.message}", error.hint) from error
        yield values, request


def _named(name: str) -> tuple[str, str | None]:
    """The field, and the word or option behind its name."""
    for mark, allowed in ((":", SEARCHED), (".", OPTIONS)):
        field, found, word = name.partition(mark)
        field = field.strip().replace("-", "_")
        if found and field in allowed and word:
            return field, word
    field = name.replace("-", "_")
    if field in NO_AXIS:
        raise InputError(f"{field} is no axis", NO_AXIS[field])
    if field not in Request.model_fields:
        raise InputError(f"there is no field {name!r}", nearest(field, Request.model_fields))
    return field, None


def _spread(field: str, found: re.Match[str]) -> list[str]:
    """The numbers of a range, rounded for fields of whole numbers."""
    first, last = float(found[1]), float(found[2])
    whole = int in (Request.model_fields[field].annotation, *get_args(Request.model_fields[field].annotation))
    count = int(found[3]) if found[3] else int(abs(last - first)) + 1
    if not 1 <= count <= MAX_VALUES:
        raise InputError(f"the range {found[0]} has {count:,} values", f"Give 1 to {MAX_VALUES}.")
    step = (last - first) / (count - 1) if found[3] and count > 1 else (1 if last >= first else -1)
    numbers = [first + step * i for i in range(count)]
    return [str(round(number)) if whole else f"{round(number, 9):.12g}" for number in numbers]


def _typed(value: str) -> Any:
    return float(value) if re.fullmatch(NUMBER, value) else value

"""Styles: named additions to a prompt and its negative, in the CSV files that other tools read and write."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sfumato.errors import InputError, nearest

PLACE = "{prompt}"  # where a style's text takes the prompt in; without it the style follows, after a comma
MAX_BYTES = 16 * 2**20  # of a file
MAX_LENGTH = 100_000  # characters of a prompt: a few styles that repeat the prompt could fill any memory


@dataclass(frozen=True)
class Style:
    """What a style adds."""

    name: str
    prompt: str = ""
    negative_prompt: str = ""


def read_styles(path: Path) -> dict[str, Style]:
    """The styles of a CSV file with the columns name, prompt and negative_prompt; the last of a name counts.

    Raises InputError where there is no column `name`, and for what is no CSV.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES} bytes.", "Give a CSV file of styles.")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(
            f"{path} is no CSV file of styles: {error}.", "Give name,prompt,negative_prompt."
        ) from error
    if rows and "name" not in rows[0]:
        raise InputError(
            f"{path} has the columns {', '.join(str(name) for name in rows[0])}; styles need `name`.",
            "Its first line is name,prompt,negative_prompt.",
        )
    styles = (
        Style(row["name"].strip(), row.get("prompt") or "", row.get("negative_prompt") or "")
        for row in rows
        if row["name"]
    )
    return {style.name: style for style in styles}


def write_styles(styles: Iterable[Style]) -> str:
    """The text of a CSV file that `read_styles` reads."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["name", "prompt", "negative_prompt"])
    writer.writerows([style.name, style.prompt, style.negative_prompt] for style in styles)
    return file.getvalue()


def apply_styles(
    prompt: str, negative_prompt: str, names: Iterable[str], styles: Mapping[str, Style]
) -> tuple[str, str]:
    """Prompt and negative prompt with the named styles, one after the other.

    Raises InputError for a name that is not there, and for a result above 100,000 characters.
    """
    for name in names:
        if name not in styles:
            raise InputError(f"There is no style {name!r}.", nearest(name, styles))
        prompt = _joined(prompt, styles[name].prompt)
        negative_prompt = _joined(negative_prompt, styles[name].negative_prompt)
    return prompt, negative_prompt


def _joined(prompt: str, style: str) -> str:
    places = style.count(PLACE)
    if len(style) + max(places, 1) * len(prompt) > MAX_LENGTH:
        raise InputError(
            f"The prompt grows beyond {MAX_LENGTH} characters with its styles.", "Take fewer styles."
        )
    if places:
        return style.replace(PLACE, prompt)
    return ", ".join(part for part in (prompt.strip(), style.strip()) if part)

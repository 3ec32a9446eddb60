"""`sfumato info`: what a picture's file says of how it was drawn, whichever tool wrote it."""

from __future__ import annotations

import json as text
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter


def info(
    image: Annotated[Path, Parameter(help="A PNG, JPEG or WebP file.")],
    *,
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON.")] = False,
) -> None:
    """Show a picture's recipe: prompt, settings, model and versions, and what this package would ignore.

    Reads its own recipes and those of AUTOMATIC1111, Forge and other tools that write like it, of ComfyUI and
    of InvokeAI. Nothing in them is acted on.
    """
    from sfumato.recipes.containers import read_container  # imports torch, which help texts do without
    from sfumato.recipes.read import from_texts
    from sfumato.recipes.recipe import PATHS

    container = read_container(image)
    recipe = from_texts(container.texts)
    request = recipe.request
    values: dict[str, Any] = {
        "file": str(image),
        "format": container.format,
        "size": [container.width, container.height],
        "tool": recipe.tool or None,
        "request": None
        if request is None
        else request.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude=set(PATHS)),
        "batch_index": recipe.index,
        "values": recipe.values,
        "ignored": recipe.ignored,
        "warnings": recipe.warnings,
    }
    if json:
        print(text.dumps(values, indent=2))
        return
    print("\n".join(_lines(values)))


def _lines(values: dict[str, Any]) -> list[str]:
    """The same for people: request first, then what is known of the run, then the rest."""
    width, height = values["size"]
    lines = [f"{values['file']}: {values['format']}, {width}x{height}"]
    if not values["tool"]:
        return [*lines, "no recipe in it"]
    lines.append(f"written by {values['tool']}")
    request, rest = values["request"] or {}, values["values"]
    about = {name: rest[name] for name in rest if name not in request and name not in values["ignored"]}
    for title, group in (("request", request), ("about", about)):
        shown = {name: value for name, value in group.items() if value not in (None, [], {})}
        if shown:
            lines += ["", f"{title}:", *(f"  {name}: {_shown(value)}" for name, value in shown.items())]
    ignored = [name for name in values["ignored"] if rest[name] is not None]
    if ignored:
        lines += ["", "not taken:", *(f"  {name}: {_shown(rest[name])}" for name in ignored)]
    return [
        *lines,
        *([""] if values["warnings"] else []),
        *(f"warning: {each}" for each in values["warnings"]),
    ]


def _shown(value: Any) -> str:
    """A value on a line, without what would move a terminal's cursor."""
    from sfumato.recipes.recipe import printable

    line = value if isinstance(value, str) else text.dumps(value, ensure_ascii=False)
    line = printable(line)
    return line if len(line) <= 2000 else f"{line[:2000]}..."

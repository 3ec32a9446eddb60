"""`sfumato samplers`: which samplers and spacings there are, and what each can be told."""

from __future__ import annotations

import json as text
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from cyclopts import Parameter

BOUND = {"schedule"}  # options that a generation sets by itself


def samplers(
    *,
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON.")] = False,
) -> None:
    """List every sampler with its order of convergence, evaluations of the network per step, whether it draws
    noise, the spacing it has by default, its options and its paper; then every spacing.

    Names of other tools are understood too: "DPM++ 2M Karras", k_euler_a, dpmpp_2m_k.
    """
    values = listing()
    if json:
        print(text.dumps(values, indent=2, ensure_ascii=False))
        return
    print("\n".join(_table(values["samplers"], SAMPLER_COLUMNS)))
    print()
    print("\n".join(_table(values["spacings"], SPACING_COLUMNS)))


def listing() -> dict[str, list[dict[str, Any]]]:
    """The rows of both tables as values for JSON."""
    from sfumato.diffusion.samplers import SAMPLERS  # these import torch, which a help text can do without
    from sfumato.diffusion.spacing import SPACINGS

    return {
        "samplers": [
            {
                "name": name,
                "title": row.title,
                "order": row.order,
                "evaluations": row.evaluations,
                "stochastic": row.stochastic,
                "spacing": row.spacing,
                "options": [option for option in row.options if option not in BOUND],
                "paper": row.paper,
            }
            for name, row in SAMPLERS.items()
        ],
        "spacings": [
            {"name": name, "title": row.title, "options": row.options, "source": row.source}
            for name, row in SPACINGS.items()
        ],
    }


SAMPLER_COLUMNS = {
    "sampler": "name",
    "title": "title",
    "order": "order",
    "per step": "evaluations",
    "noise": "stochastic",
    "spacing": "spacing",
    "paper": "paper",
    "options": "options",
}
SPACING_COLUMNS = {"spacing": "name", "title": "title", "source": "source", "options": "options"}


def _table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """Lines of columns as wide as their widest word, headings first."""
    cells = [list(columns), *([_shown(row[key]) for key in columns.values()] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return _joined(name if one is None else f"{name}={one}" for name, one in value.items())
    return _joined(value) if isinstance(value, list) else str(value)


def _joined(words: Iterable[str]) -> str:
    return ", ".join(words) or "-"

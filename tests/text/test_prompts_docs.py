"""The examples of docs/prompts.md say what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sfumato.text.emphasis import segments
from sfumato.text.prompt_dynamic import combinations
from sfumato.text.prompt_schedule import schedule
from sfumato.text.prompts import parse

PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```text\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)


def shown(kind: str, text: str) -> list[str]:
    if kind == "weights":
        return [f"{span.text!r} {span.weight:.4g}" for spans in segments(text) for span in spans]
    if kind == "drawn":
        return list(combinations(text))
    steps = int(kind.removesuffix(" steps"))
    return [f"{stage.until}: {stage.text!r}" for stage in schedule(parse(text).parts[0], steps)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_holds(example: str) -> None:
    first, *lines = example.splitlines()
    kind, _, text = first.partition(": ")
    assert shown(kind, text) == lines


def test_there_are_examples_and_every_mark_of_the_table_is_understood() -> None:
    assert len(EXAMPLES) == 6
    rows = re.findall(r"^\| (`.*) \| ", PAGE, re.MULTILINE)
    assert len(rows) == 18
    plain = {"embedding:name", "# ...", "// ...", "/* ... */", "BREAK"}
    for row in rows:
        for cell in re.findall(r"`([^`]+)`", row.replace("\\|", "|")):
            if "$$" in cell or cell.startswith(("{", "__")):
                assert list(combinations(cell, {"name": ("x", "y")})) != [cell], cell
            elif cell not in plain and not cell.startswith("\\"):
                (first, *_) = [item for part in parse(cell).parts for item in part.items]
                assert type(first).__name__ != "Text" or len(parse(cell).parts) == 2, cell

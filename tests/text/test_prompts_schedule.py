"""Prompts over the steps, as A1111's documentation has them."""

from __future__ import annotations

import pytest

from sfumato.text.prompt_schedule import Branch, Stage, changes, plan, schedule, text_at
from sfumato.text.prompt_tree import Part
from sfumato.text.prompts import parse


def part(text: str) -> Part:
    (only,) = parse(text).parts
    return only


def stages(text: str, steps: int = 10, first_pass: int = 0) -> list[list[object]]:
    return [[stage.until, stage.text] for stage in schedule(part(text), steps, first_pass)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test", [[10, "test"]]),
        ("a [b:3]", [[3, "a "], [10, "a b"]]),
        ("a [b: 3]", [[3, "a "], [10, "a b"]]),
        ("a [[[b]]:2]", [[2, "a "], [10, "a [[b]]"]]),
        ("[(a:2):3]", [[3, ""], [10, "(a:2)"]]),
        ("a [b : c : 1] d", [[1, "a b  d"], [10, "a  c  d"]]),
        ("a[b:[c:d:2]:1]e", [[1, "abe"], [2, "ace"], [10, "ade"]]),
        ("a [unbalanced", [[10, "a [unbalanced"]]),
        ("a [b:.5] c", [[5, "a  c"], [10, "a b c"]]),
        ("a [{b|d{:.5] c", [[5, "a  c"], [10, "a {b|d{ c"]]),
        ("((a][:b:c [d:3]", [[3, "((a][:b:c "], [10, "((a][:b:c d"]]),
        ("[a|(b:1.1)]", [[step, "a" if step % 2 else "(b:1.1)"] for step in range(1, 11)]),
        ("[fe|]male", [[step, "female" if step % 2 else "male"] for step in range(1, 11)]),
        ("[fe|||]male", [[step, "female" if step % 4 == 1 else "male"] for step in range(1, 11)]),
        ("[a:b:0.25]", [[2, "a"], [10, "b"]]),
        ("[a:b:1.0]", [[10, "a"]]),
        ("[a:b:1]", [[1, "a"], [10, "b"]]),
        ("[a:b:99]", [[10, "a"]]),
        ("[a:b:0]", [[10, "b"]]),
        ("[a:b:-2]", [[10, "b"]]),
        ("[a::6]c", [[6, "ac"], [10, "c"]]),
        ("[a:b:3][c:d:3]", [[3, "ac"], [10, "bd"]]),
        ("[a:b:3][c:d:7]", [[3, "ac"], [7, "bc"], [10, "bd"]]),
        ("([a:b:3]:1.2)", [[3, "(a:1.2)"], [10, "(b:1.2)"]]),
        ("(a:[1.1:1.5:3])", [[3, "(a:1.1)"], [10, "(a:1.5)"]]),
        (r"[a\:1:\]b:3]", [[3, r"a\:1"], [10, r"\]b"]]),
        ("a<lora:x:1> [b<lora:y:1>:3]", [[3, "a "], [10, "a b"]]),
        ("a /* [b:2] */ [c:3]", [[3, "a  "], [10, "a  c"]]),
        ("[a BREAK embedding:b:3]", [[3, ""], [10, "a BREAK embedding:b"]]),
    ],
)
def test_the_documented_cases(text: str, expected: list[list[object]]) -> None:
    assert stages(text) == expected


def test_numbers_of_a_second_pass() -> None:
    assert stages("a [b:.5] c", 10, 10) == [[10, "a b c"]]
    assert stages("a [b:1.5] c", 10, 10) == [[5, "a  c"], [10, "a b c"]]
    assert stages("a [b:15] c", 10, 10) == [[5, "a  c"], [10, "a b c"]]
    assert stages("a [b:5] c", 10, 10) == [[10, "a b c"]]


def test_changes_join_equal_neighbours() -> None:
    assert changes(part("[fe|||]male"), 6) == [
        Stage(1, "female"), Stage(4, "male"), Stage(5, "female"), Stage(6, "male")
    ]  # fmt: skip
    assert changes(part("[a:a:3]"), 10) == [Stage(10, "a")]


def test_the_text_of_a_step_is_that_of_its_stage() -> None:
    text = "[a|b|c] ([x:y:0.3]:1.2) [z::8]"
    (branch,) = plan(parse(text), 12)
    for step in range(1, 13):
        assert branch.at(step) == text_at(part(text), step, 12)
    assert branch.at(13) == branch.at(12)


def test_composed_prompts_change_on_their_own() -> None:
    assert plan(parse("[a:b:0.5]AND c:0.7"), 4) == (
        Branch(1.0, (Stage(2, "a"), Stage(4, "b"))),
        Branch(0.7, (Stage(4, " c"),)),
    )

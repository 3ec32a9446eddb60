"""Words with their weights, as AUTOMATIC1111's documentation and ComfyUI's readers have them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.text.emphasis import MAX_WEIGHT, Span, plain, segments
from sfumato.text.prompt_tree import Emphasis, Node, Text
from sfumato.text.prompts import parse, unescaped

UP, DOWN = 1.1, 1 / 1.1


def pairs(text: str) -> list[list[object]]:
    """The form in which A1111 documents its cases: words and weight, BREAK with -1."""
    result: list[list[object]] = []
    for index, spans in enumerate(segments(text)):
        result += [["BREAK", -1]] if index else []
        result += [[span.text, span.weight] for span in spans]
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [["normal text", 1.0]]),
        ("an (important) word", [["an ", 1.0], ["important", UP], [" word", 1.0]]),
        ("(unbalanced", [["unbalanced", UP]]),
        (r"\(literal\]", [["(literal]", 1.0]]),
        ("(unnecessary)(parens)", [["unnecessaryparens", UP]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ["a ", 1.0],
                ["house", 1.5730000000000004],
                [" ", 1.1],
                ["on", 1.0],
                [" a ", 1.1],
                ["hill", 0.55],
                [", sun, ", 1.1],
                ["sky", 1.4641000000000006],
                [".", 1.1],
            ],
        ),
        ("", []),
        ("[a]", [["a", DOWN]]),
        ("[[a]]", [["a", DOWN * DOWN]]),
        ("(a", [["a", UP]]),
        ("[a", [["a", DOWN]]),
        ("a)", [["a)", 1.0]]),
        ("a]", [["a]", 1.0]]),
        ("a:1.5)", [["a:1.5)", 1.0]]),
        ("(a: 1.5 )", [["a", 1.5]]),
        ("(a:-1)", [["a", -1.0]]),
        ("(a:b)", [["a:b", UP]]),
        ("a: b", [["a: b", 1.0]]),
        ("(a:nan) (b:1e309)", [["a:nan", UP], [" ", 1.0], ["b:1e309", UP]]),
        (r"(a\:1.5)", [["a:1.5", UP]]),
        (r"a\\(b)", [["a\\", 1.0], ["b", UP]]),
        ("a\\", [["a", 1.0]]),
        ("(a [b) c]", [["a ", UP], ["b", UP * DOWN], [" c", DOWN]]),
        ("([a:2)]", [["a", 2 * DOWN]]),
        ("a BREAK b", [["a", 1.0], ["BREAK", -1], ["b", 1.0]]),
        ("(a BREAK b:2) c", [["a", 2.0], ["BREAK", -1], ["b", 2.0], [" c", 1.0]]),
        ("BREAK BREAK", [["BREAK", -1], ["BREAK", -1]]),
        (r"\BREAK BREAKFAST", [["BREAK BREAKFAST", 1.0]]),
    ],
)
def test_the_documented_cases(text: str, expected: list[list[object]]) -> None:
    found = pairs(text)
    assert [words for words, _ in found] == [words for words, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_the_long_documented_case_to_the_last_bit() -> None:
    assert dict(pairs("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")) == {  # type: ignore[arg-type]
        "a ": 1.0, "house": 1.5730000000000004, " ": 1.1, "on": 1.0, " a ": 1.1, "hill": 0.55, ", sun, ": 1.1,
        "sky": 1.4641000000000006, ".": 1.1,
    }  # fmt: skip


def test_written_weights_replace_those_around_them_in_comfyui() -> None:
    text = "(a (b:1.5) (c))"
    assert [span.weight for span in segments(text, "comfyui")[0]] == pytest.approx([UP, 1.5, UP, UP * UP])
    assert [span.weight for span in segments(text)[0]] == pytest.approx([UP, 1.65, UP, UP * UP])


def test_embeddings_are_spans_of_their_own() -> None:
    assert segments("a (embedding:b, c:2)") == (
        (Span("a "), Span("b", 2.0, embedding=True), Span(", c", 2.0)),
    )


@given(
    st.lists(st.sampled_from([*"([)]:\\ab,", ":1.5)", ":0)", "BREAK", "🦊", "\ud800"]), max_size=60).map(
        "".join
    )
)
@settings(max_examples=300, deadline=None)
def test_all_weights_are_finite_and_no_words_are_lost(text: str) -> None:
    for dialect in ("a1111", "comfyui"):
        spans = [span for each in segments(text, dialect) for span in each]
        assert all(math.isfinite(span.weight) for span in spans)
        assert all(
            one.weight != two.weight for each in segments(text, dialect) for one, two in pairwise(each)
        )
        words = "".join(span.text for span in spans)
        for letter in "ab🦊":
            assert words.count(letter) == text.count(letter)


def test_the_words_alone() -> None:
    assert plain(r"a (red:1.4) \(fox\) BREAK [in] embedding:q snow") == "a red (fox) in  snow"


def test_deep_nests_stay_finite() -> None:
    assert segments("(" * 5000 + "a:0)")[0][0].weight == 0
    assert segments("(" * 5000 + "a")[0][0].weight == MAX_WEIGHT
    assert segments("[" * 50_000 + "a")[0][0].weight < 1e-300


nested = st.recursive(
    st.sampled_from(["a", "b c", ", "]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        inner.map("({})".format),
        inner.map("[{}]".format),
        st.tuples(inner, st.sampled_from(["0.5", "1.3", "-1"])).map(lambda pair: f"({pair[0]}:{pair[1]})"),
    ),
    max_leaves=12,
)


@given(nested)
@settings(max_examples=200, deadline=None)
def test_where_brackets_are_nested_the_tree_says_the_same(text: str) -> None:
    def letters(items: tuple[Node, ...], weight: float) -> list[tuple[str, float]]:
        found = []
        for item in items:
            if isinstance(item, Emphasis):
                found += letters(item.items, weight * item.factor)
            else:
                assert isinstance(item, Text)
                found += [(letter, weight) for letter in unescaped(item.source)]
        return found

    spelled = [(letter, span.weight) for span in segments(text)[0] for letter in span.text]
    expected = letters(parse(text).parts[0].items, 1.0)
    assert [letter for letter, _ in spelled] == [letter for letter, _ in expected]
    assert [weight for _, weight in spelled] == pytest.approx([weight for _, weight in expected])

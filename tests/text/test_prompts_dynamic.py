"""Choices in prompts: drawn by a seed alone, all in turn, and words where there is nothing to choose."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.text.prompt_choices import Choice, Option, Wildcard, read
from sfumato.text.prompt_dynamic import combinations, expand, uniform, unknown_wildcards
from sfumato.text.wildcards import read_wildcards

COLOURS = {"colour": ("red", "green", "blue"), "deep/colour": ("black",), "two": ("__colour__ {a|b}",)}
SEEDS = range(200)


def drawn(text: str, wildcards: dict[str, tuple[str, ...]] | None = None) -> Counter[str]:
    return Counter(expand(text, seed, wildcards or COLOURS) for seed in SEEDS)


def test_reading() -> None:
    a, b = Option(("a",)), Option(("b",))
    assert read("x {a|b} y") == ("x ", Choice((a, b)), " y")
    assert read("{2$$a|b}") == (Choice((a, b), 2, 2),)
    assert read("{1-2$$ and $$a|b}") == (Choice((a, b), 1, 2, " and "),)
    assert read("{-2$$a|b}{1-$$a|b}") == (Choice((a, b), 0, 2), Choice((a, b), 1, None))
    assert read("{0.5::a|3::b}") == (Choice((Option(("a",), 0.5), Option(("b",), 3.0))),)
    assert read("__c__{a|__d/*__}") == (Wildcard("c"), Choice((a, Option((Wildcard("d/*"),)))))
    assert read("{a|{b|c}}") == (Choice((a, Option((Choice((b, Option(("c",)))),)))),)


@pytest.mark.parametrize(
    "text",
    ["a", "", "{a}", "{{a}}", "a|b", "{a|b", "a|b}", r"\{a|b\}", r"\__colour\__", "{", "}", "{0.5::a}",
     "{2$$a|b",     "/* {a|b} */", "# {a|b}\n", "__unknown__", "__", "____", "{0.5::a|{b"],
)  # fmt: skip
def test_where_there_is_nothing_to_choose_it_is_text(text: str) -> None:
    assert drawn(text) == {text: len(SEEDS)}
    assert list(combinations(text, COLOURS)) == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x {a|b|} y", {"x a y", "x b y", "x  y"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c}}", {"a", "b", "c"}),
        ("{2$$a|b|c}", {f"{one}, {two}" for one in "abc" for two in "abc" if one != two}),
        ("{1-2$$+$$a|b}", {"a", "b", "a+b", "b+a"}),
        ("{-1$$a}", {"", "a"}),
        ("{9$$a|b}", {"a, b", "b, a"}),
        ("{0::a|b}", {"b"}),
        ("{0::a|0::b}", {"a", "b"}),
        ("{[a|b]}", {"[a", "b]"}),
        ("__colour__", {"red", "green", "blue"}),
        ("__*colour__", {"red", "green", "blue", "black"}),
        ("{2$$-$$__colour__}", {f"{a}-{b}" for a in COLOURS["colour"] for b in COLOURS["colour"] if a != b}),
        ("__two__", {f"{colour} {letter}" for colour in COLOURS["colour"] for letter in "ab"}),
        ("{{a}|b}", {"{a}", "b"}),
    ],
)
def test_everything_that_can_be_drawn_is(text: str, expected: set[str]) -> None:
    assert drawn(text).keys() == expected
    sets = {frozenset(each) for each in combinations(text, COLOURS)}
    assert sets == {frozenset(each) for each in expected}


def test_all_in_turn_in_order() -> None:
    assert list(combinations("{a|b} {c|d}")) == ["a c", "a d", "b c", "b d"]
    assert list(combinations("{2$$a|b|c}")) == ["a, b", "a, c", "b, c"]
    assert list(combinations("__colour__!", COLOURS)) == ["red!", "green!", "blue!"]
    endless = "{a|b|c|d|e}" * 200  # 5^200 of them: none is made before it is asked for
    assert len(list(islice(combinations(endless), 10))) == 10


def test_weights_are_frequencies() -> None:
    counts = Counter(expand("{3::a|1::b}", seed) for seed in range(4000))
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    counts = Counter(expand("__w__", seed, {"w": ("3::a", "b")}) for seed in range(4000))
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_numbers_are_fixed_and_spread() -> None:
    assert expand("{a|b|c} {a|b|c} {a|b|c} {a|b|c}", 7) == expand("{a|b|c} {a|b|c} {a|b|c} {a|b|c}", 7)
    assert [expand("{0|1|2|3|4|5|6|7|8|9}" * 8, seed) for seed in (0, 1)] == ["79806627", "64250321"]
    numbers = [uniform(seed, draw, 1) for seed in range(50) for draw in range(50)]
    assert min(numbers) > 0 and max(numbers) < 1 and len(set(numbers)) == 2500
    assert sum(numbers) / 2500 == pytest.approx(0.5, abs=0.02)


def test_circles_and_growth_are_refused() -> None:
    with pytest.raises(InputError, match="more than 8 deep"):
        expand("__a__", 0, {"a": ("__b__",), "b": ("__a__",)})
    with pytest.raises(InputError, match="more than 8 deep"):
        next(combinations("__a__", {"a": ("__a__",)}))
    doubling = {str(level): (f"__{level + 1}__" * 40,) for level in range(7)} | {"7": ("x" * 100,)}
    with pytest.raises(InputError, match="grows beyond"):
        expand("__0__", 0, doubling)


def test_unknown_names_are_told() -> None:
    assert unknown_wildcards("__x__ {a|__y__} __colour__ __x__ __no*__", COLOURS) == ("x", "y", "no*")


@given(
    st.lists(
        st.sampled_from([*"{}|$\\_ ", "a", "2$$", "1-2$$,$$", "0.5::", "__c__", "/*", "*/"]), max_size=40
    ),
    st.integers(),
)
@settings(max_examples=300, deadline=None)
def test_every_text_can_be_expanded(pieces: list[str], seed: int) -> None:
    text = "".join(pieces)
    result = expand(text, seed, {"c": ("red", "{a|b}")})
    assert result == expand(text, seed, {"c": ("red", "{a|b}")})
    assert isinstance(next(combinations(text)), str)


def test_folders_of_wildcards(tmp_path: Path) -> None:
    root = tmp_path / "wild"
    (root / "deep").mkdir(parents=True)
    (root / "colour.txt").write_text("\ufeffred\n\n# no\n 2::green \n", encoding="utf-8")
    (root / "deep" / "sea.txt").write_bytes(b"fish\r\nsh\xffell")
    (root / "note.md").write_text("not one")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "way-out.txt").symlink_to(tmp_path / "secret.txt")
    index = read_wildcards(root)
    assert index == {"colour": ("red", "2::green"), "deep/sea": ("fish", "sh\ufffdell")}
    assert expand("__../secret__", 0, index) == "__../secret__"
    with pytest.raises(InputError, match="no folder of wildcards"):
        read_wildcards(tmp_path / "secret.txt")

"""The prompt language's trees: what every mark means, text written back, and no text refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sfumato.text.prompt_tree import (
    MAX_DEPTH,
    Alternation,
    Break,
    Comment,
    Embedding,
    Emphasis,
    Part,
    Prompt,
    Scheduled,
    Tag,
    Text,
    ignored,
    networks,
    render,
    walk,
)
from sfumato.text.prompts import parse, unescaped

MARKS = [
    *"()[]:|\\,<># \na", "1", ".5", ":1.2)", ":0.5]", "BREAK", "AND", "<lora:x:1>", "/*", "*/", "//",
    "embedding:q",
]  # fmt: skip
prompts = st.one_of(
    st.text(st.characters(exclude_categories=())),  # with lone surrogates
    st.lists(st.sampled_from(MARKS), max_size=40).map("".join),
)


def items(text: str) -> tuple[object, ...]:
    (part,) = parse(text).parts
    return part.items


@given(prompts)
@settings(max_examples=300, deadline=None)
@example("(" * 5000)
@example("[a:b:" * 2000 + "c" + ":1]" * 2000)
@example("/*/")
def test_every_text_has_a_tree_and_comes_back(text: str) -> None:
    for compose in (True, False):
        tree = parse(text, compose)
        assert render(tree) == text
        assert parse(render(tree), compose) == tree


@given(prompts)
@settings(max_examples=200, deadline=None)
def test_trees_are_shallow_and_texts_have_no_text_beside_them(text: str) -> None:
    for node in walk(parse(text)):
        if isinstance(node, Emphasis):
            texts = [isinstance(item, Text) for item in node.items]
            assert not any(one and two for one, two in pairwise(texts))


def test_emphasis() -> None:
    assert items("a (b) [c] (d:1.5)") == (
        Text("a "),
        Emphasis((Text("b"),), 1.1, "(", ")"),
        Text(" "),
        Emphasis((Text("c"),), 1 / 1.1, "[", "]"),
        Text(" "),
        Emphasis((Text("d"),), 1.5, "(", ":1.5)"),
    )
    assert items("((a) b") == (Emphasis((Emphasis((Text("a"),), 1.1, "(", ")"), Text(" b")), 1.1, "(", ""),)


@pytest.mark.parametrize(
    "weight",
    ["1e309", "1e3", "nan", "inf", "-inf", "1.2.3", "", "+", ".", "0x1", "1_0", "١", "9" * 10, "1,5"],
)
def test_what_is_no_plain_number_is_text(weight: str) -> None:
    (emphasis,) = items(f"(a:{weight})")
    assert emphasis == Emphasis((Text(f"a:{weight}"),), 1.1, "(", ")")
    (weaker,) = items(f"[a:{weight}]")
    assert isinstance(weaker, Emphasis)


@pytest.mark.parametrize(("weight", "value"), [("1", 1), (" -.5 ", -0.5), ("+2.", 2), ("0.25", 0.25)])
def test_numbers(weight: str, value: float) -> None:
    (emphasis,) = items(f"(a:{weight})")
    assert isinstance(emphasis, Emphasis) and emphasis.factor == value


def test_escapes() -> None:
    assert items(r"\(a\) \[b\] \\ \: \| \<lora:x:1> \BREAK \AND \# \{") == (
        Text(r"\(a\) \[b\] \\ \: \| \<lora:x:1> \BREAK \AND \# \{"),
    )
    assert unescaped(r"\(a\) \\ \x \ ") == r"(a) \ x  "
    assert unescaped("a\\") == "a"
    assert items(r"[a\:b:c:3]") == (Scheduled((Text(r"a\:b"),), (Text("c"),), "3"),)


def test_schedules_and_alternations() -> None:
    a, b = (Text("a"),), (Text("b"),)
    assert items("[a:b:0.5]") == (Scheduled(a, b, "0.5"),)
    assert items("[a:10]") == (Scheduled(None, a, "10"),)
    assert items("[a::0.6]") == (Scheduled(a, (), "0.6"),)
    assert items("[:a: 3 ]") == (Scheduled((), a, " 3 "),)
    assert items("[a|b|]") == (Alternation((a, b, ())),)
    assert items("[a:[b:a:2]:1]") == (Scheduled(a, (Scheduled(b, a, "2"),), "1"),)
    assert items("[[a|b]:a:.5]") == (Scheduled((Alternation((a, b)),), a, ".5"),)
    # Bars before the number at the end are words; other colons among bars are.
    assert items("[a|b:3]") == (Scheduled(None, (Text("a|b"),), "3"),)
    assert items("[a:b|b]") == (Alternation(((Text("a:b"),), b)),)


@pytest.mark.parametrize("text", ["[a:b]", "[a:b:c:3]", "[a(:3]", "[:a:b", "[3]", "[a:b:3)]", "[(a:b:3]"])
def test_what_is_no_schedule_is_words(text: str) -> None:
    assert not any(isinstance(node, Scheduled) for node in walk(parse(text)))


def test_brackets_that_cross_keep_the_first_that_closes() -> None:
    assert items("(a [b) c]") == (Emphasis((Text("a [b"),), 1.1, "(", ")"), Text(" c]"))


def test_brackets_deeper_than_the_limit_are_text() -> None:
    tree = parse("(" * (MAX_DEPTH + 3) + "a")
    assert sum(isinstance(node, Emphasis) for node in walk(tree)) == MAX_DEPTH
    assert Text("(((a") in walk(tree)


def test_composition() -> None:
    assert parse("a AND b :0.7 AND (c) : -1 ") == Prompt(
        (
            Part((Text("a "),)),
            Part((Text(" b "),), ":0.7 "),
            Part((Text(" "), Emphasis((Text("c"),), 1.1, "(", ")"), Text(" ")), ": -1 "),
        )
    )
    assert [part.weight for part in parse("a AND b :0.7 AND c: -1 ").parts] == [1, 0.7, -1]
    assert parse("a AND b", compose=False) == Prompt((Part((Text("a AND b"),)),))
    assert parse("SAND ANDROID") == Prompt((Part((Text("SAND ANDROID"),)),))
    assert parse("(a AND b)").parts[0].items == (Emphasis((Text("a "),), 1.1, "(", ""),)


@pytest.mark.parametrize("text", ["a, 16:9", r"a AND b\:9", "a AND b:x", "a AND (b:2"])
def test_what_is_no_weight_of_a_part(text: str) -> None:
    assert [part.weight for part in parse(text).parts] == [1.0] * len(parse(text).parts)


@pytest.mark.parametrize(
    ("tag", "unet", "te"),
    [
        ("<lora:x>", 1, 1),
        ("<lora:x:0.5>", 0.5, 0.5),
        ("<lora:x:0.5:0.2>", 0.5, 0.2),
        ("<lora:x:te=0.2:unet=-1>", -1, 0.2),
        ("<lora:x:0.5:te=0.2>", 0.5, 0.2),
        ("<lora:x:loud:1e309>", 1, 1),
        ("<lora:x:>", 1, 1),
        ("<lyco:x:2>", 2, 2),
    ],
)
def test_tags_of_networks(tag: str, unet: float, te: float) -> None:
    tree = parse(f"a [{tag} b:{tag}:0.5]")
    kind = tag[1:5]
    assert networks(tree) == (Tag(tag, kind, "x", unet, te),) * 2 and ignored(tree) == ()


def test_tags_that_are_ignored_and_those_that_are_text() -> None:
    tree = parse("<hypernet:h:1> a <b> <lora:> <lora:a <lora:../../x:1> <3")
    assert [node.source for node in ignored(tree)] == ["<hypernet:h:1>"]
    assert [tag.name for tag in networks(tree)] == ["../../x"]


def test_embeddings_are_named_with_or_without_weight() -> None:
    assert items("(embedding:easy-neg.v2:1.2), embedding:x") == (
        Emphasis((Embedding("embedding:easy-neg.v2", "easy-neg.v2"),), 1.2, "(", ":1.2)"),
        Text(", "),
        Embedding("embedding:x", "x"),
    )
    assert items("myembedding:x") == (Text("myembedding:x"),)


def test_comments() -> None:
    assert items("a #b\n # c [\n#d\ne //f (\nhttp://g /* h [ */ i /* j") == (
        Text("a #b\n"),
        Comment(" # c [\n#d"),
        Text("\ne "),
        Comment("//f ("),
        Text("\nhttp://g "),
        Comment("/* h [ */"),
        Text(" i /* j"),
    )


def test_break_is_a_word_of_its_own() -> None:
    assert items("a BREAK(b BREAK)") == (
        Text("a "),
        Break(),
        Emphasis((Text("b "), Break()), 1.1, "(", ")"),
    )
    assert items("BREAKFAST") == (Text("BREAKFAST"),)

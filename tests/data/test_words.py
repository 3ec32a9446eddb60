"""The grammar of captions."""

from __future__ import annotations

import pytest

from sfumato.data.labels import noun_phrase
from sfumato.data.words import listed, plural, sentence, with_article


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("fox", "a fox"),
        ("owl", "an owl"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("onion", "an onion"),
        ("OK hand", "an OK hand"),
        ("ewe", "a ewe"),
        ("x-ray", "an x-ray"),
        ("house", "a house"),
    ],
)
def test_article(noun: str, expected: str) -> None:
    assert with_article(noun) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("fox", "foxes"),
        ("butterfly", "butterflies"),
        ("key", "keys"),
        ("mouse", "mice"),
        ("computer mouse", "computer mice"),
        ("snowman", "snowmen"),
        ("loaf of bread", "loaves of bread"),
        ("pair of scissors", "pairs of scissors"),
        ("tomato", "tomatoes"),
        ("fish", "fish"),
        ("birthday cake", "birthday cakes"),
        ("clothes hanger on wall", "clothes hangers on wall"),
        ("match", "matches"),
    ],
)
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


@pytest.mark.parametrize(
    ("label", "phrase", "many"),
    [
        ("fox", "a fox", "foxes"),
        ("grapes", "grapes", None),
        ("octopus", "an octopus", "octopuses"),
        ("drinking glass", "a drinking glass", "drinking glasses"),
        ("people with bunny ears", "people with bunny ears", None),
        ("person lifting weights", "a person lifting weights", None),
        ("man: red hair", "a man with red hair", "men with red hair"),
        ("woman: bald", "a bald woman", "bald women"),
        ("person: beard", "a person with a beard", "people with a beard"),
        ("fork and knife", "a fork and knife", None),
        ("locked", "a padlock", "padlocks"),
        ("sun", "the sun", None),
        ("spaghetti", "spaghetti", None),
        ("flexed biceps", "a flexed biceps", "flexed bicepses"),
    ],
)
def test_labels_become_noun_phrases(label: str, phrase: str, many: str | None) -> None:
    _, found, found_plural = noun_phrase(label)
    assert (found, found_plural) == (phrase, many)


def test_lists_leave_out_empty_parts() -> None:
    assert listed(["", "one eye", "a smile"]) == "one eye and a smile"
    assert listed(["horns", "one eye", "a smile"]) == "horns, one eye and a smile"
    assert listed(["", ""]) == ""
    assert sentence("a fox", "", ",", "on a red background") == "a fox, on a red background"

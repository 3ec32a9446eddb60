"""Rows of tokens: against the rule told another way, with embeddings, BREAK, and rows of any length."""

from __future__ import annotations

import random

import pytest

from sfumato.errors import InputError
from sfumato.text.chunks import COMMA_REACH, Chunk, Placed, chunked, empty_chunk, missing
from sfumato.text.emphasis import segments
from sfumato.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["red fox", "a blue house", "a b c d e f g"], 560, 77)


def reference(
    tokens: list[tuple[int, float]], comma: int, room: int, reach: int
) -> list[list[tuple[int, float]]]:
    """A1111's rule for the tokens between two BREAKs, by slicing the list that is left."""
    rows = []
    begin, blind = (
        0,
        False,
    )  # blind: the first token is a comma that was carried over, which counts for nothing
    while len(tokens) - begin > room:
        end = begin + room
        commas = [
            place
            for place in range(begin, end)
            if tokens[place][0] == comma and not (blind and place == begin)
        ]
        near = tokens[end][0] != comma and commas and end - commas[-1] <= reach
        stop = commas[-1] + 1 if near else end
        rows.append(tokens[begin:stop])
        begin, blind = stop, tokens[stop][0] == comma
    rows.append(tokens[begin:])
    return rows


def shown(chunk: Chunk) -> list[tuple[int, float]]:
    return list(zip(chunk.tokens, chunk.weights, strict=True))[1 : 1 + chunk.count]


@pytest.mark.parametrize("reach", [COMMA_REACH, 0, 7])
@pytest.mark.parametrize("commas", [0.0, 0.02, 0.08, 0.3, 1.0])
def test_prompts_of_300_tokens_follow_the_reference_rule(
    tokenizer: Tokenizer, commas: float, reach: int
) -> None:
    chance = random.Random(f"{commas} {reach}")
    comma = tokenizer.encode(",")[-1]
    for _ in range(20):
        count = chance.randint(280, 320)
        words = [" ," if chance.random() < commas else " " + chance.choice("abcdefg") for _ in range(count)]
        cut = chance.randrange(count)
        text = "".join(words[:cut]) + "(" + "".join(words[cut:]) + ":1.5)"
        tokens = [(token, 1.0) for token in tokenizer.encode("".join(words[:cut]))]
        tokens += [(token, 1.5) for token in tokenizer.encode("".join(words[cut:]))]
        assert len(tokens) == count
        rows = chunked(segments(text), tokenizer, comma_reach=reach)
        assert [shown(row) for row in rows] == reference(tokens, comma, 75, reach)


def test_the_comma_rule_by_hand(tokenizer: Tokenizer) -> None:
    def counts(text: str) -> list[int]:
        return [chunk.count for chunk in chunked(segments(text), tokenizer)]

    assert counts("a " * 75) == [75]
    assert counts("a " * 76) == [75, 1]
    assert counts("a " * 55 + ", " + "b " * 20) == [56, 20]  # the comma is the 20th from the end
    assert counts("a " * 54 + ", " + "b " * 21) == [75, 1]
    assert counts("a " * 74 + ", " + "b ") == [75, 1]
    assert counts("a " * 75 + ", " + "b ") == [75, 2]  # a comma that does not fit moves nothing
    assert counts("a " * 70 + "," + "b " * 4 + ", c") == [75, 2]


def test_rows_are_framed_like_the_tokenizers_own(tokenizer: Tokenizer) -> None:
    for length, pad_id in ((77, None), (8, 0), (3, 5)):
        row = chunked(segments("a"), tokenizer, length, pad_id)[0]
        assert list(row.tokens) == tokenizer.batch(["a"], length, pad_id)[0][0].tolist()
        assert len(row.weights) == length and row.count == 1
        empty = empty_chunk(tokenizer, length, pad_id)
        assert list(empty.tokens) == tokenizer.batch([""], length, pad_id)[0][0].tolist()


def test_breaks_begin_rows(tokenizer: Tokenizer) -> None:
    def counts(text: str) -> list[int]:
        return [chunk.count for chunk in chunked(segments(text), tokenizer)]

    assert counts("a b BREAK c") == [2, 1]
    assert counts("a BREAK") == [1]
    assert counts("BREAK a") == [0, 1]
    assert counts("a BREAK BREAK b") == [1, 0, 1]
    assert counts("BREAK") == [0]
    assert counts("") == [0]


def test_embeddings_take_the_places_of_their_vectors(tokenizer: Tokenizer) -> None:
    vectors = {"red": 2, "red fox": 3, "q": 1}
    (row,) = chunked(segments("a (Red  Fox:1.5) red embedding:q embedding:z b"), tokenizer, vectors=vectors)
    assert row.placed == (Placed("red fox", 2, 3), Placed("red", 5, 2), Placed("q", 7, 1))
    assert row.weights[1:9] == (1, 1.5, 1.5, 1.5, 1, 1, 1, 1)
    assert row.tokens[2:8] == (0,) * 6 and row.count == 8
    assert missing(segments("embedding:q embedding:z embedding:z"), vectors) == ("z",)


def test_embeddings_are_never_split(tokenizer: Tokenizer) -> None:
    vectors = {"red": 4}
    first, second = chunked(segments("a a a red b"), tokenizer, 8, vectors=vectors)
    assert first.placed == () and second.placed == (Placed("red", 1, 4),)
    # Into the next row with what follows a comma: its place goes with it.
    first, second = chunked(segments("a, red b c d"), tokenizer, 8, vectors={"red": 2})
    assert first.count == 2 and second.placed == (Placed("red", 1, 2),) and second.count == 5


def test_what_fits_no_row_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="has 7 vectors; this text encoder has room for 6"):
        chunked(segments("a"), tokenizer, 8, vectors={"red": 7})
    with pytest.raises(InputError, match="length is 2"):
        chunked(segments("a"), tokenizer, 2)

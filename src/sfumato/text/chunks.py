"""Prompts of any length as rows of tokens: where a row ends, and what each token weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sfumato.errors import InputError
from sfumato.text.emphasis import Segments
from sfumato.text.tokenizer import Tokenizer

COMMA_REACH = 20  # tokens: a comma so near a row's end takes what follows it into the next row
VECTOR_TOKEN = 0  # the token that keeps a learned vector's place


@dataclass(frozen=True)
class Placed:
    """`length` learned vectors of an embedding, from `start` in a row on."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A row for the text encoder: start token, words, end token, padding; and a weight for each.

    count: how many of the tokens are the prompt's. placed: where learned vectors replace the tokens' own.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    count: int
    placed: tuple[Placed, ...] = ()


@dataclass
class _Row:
    """A row that is being filled."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)
    comma: int | None = None  # the place of the last one

    def split_after_comma(self) -> _Row:
        """What stands after the last comma, taken out of this row."""
        assert self.comma is not None
        place = self.comma + 1
        tail = _Row(self.tokens[place:], self.weights[place:])
        del self.tokens[place:], self.weights[place:]
        moved = [each for each in self.placed if each.start >= place]
        self.placed = [each for each in self.placed if each.start < place]
        tail.placed = [Placed(each.name, each.start - place, each.length) for each in moved]
        return tail


class _Names:
    """Embeddings by the tokens of their names, so that a bare name is found among the words' tokens."""

    def __init__(self, vectors: Mapping[str, int], tokenizer: Tokenizer) -> None:
        self.vectors = vectors
        self.by_token: dict[int, list[tuple[list[int], str]]] = {}
        for name in vectors:
            if ids := tokenizer.encode(name):
                self.by_token.setdefault(ids[0], []).append((ids, name))
        for names in self.by_token.values():
            names.sort(key=lambda each: len(each[0]), reverse=True)

    def at(self, ids: list[int], place: int) -> tuple[str, int] | None:
        """The longest name that stands there, and how many tokens it takes."""
        for name_ids, name in self.by_token.get(ids[place], ()):
            if ids[place : place + len(name_ids)] == name_ids:
                return name, len(name_ids)
        return None


def chunked(
    segments: Segments,
    tokenizer: Tokenizer,
    length: int | None = None,
    pad_id: int | None = None,
    vectors: Mapping[str, int] | None = None,
    comma_reach: int = COMMA_REACH,
) -> tuple[Chunk, ...]:
    """The rows of a text, at least one: AUTOMATIC1111's rule.

    A row takes `length` - 2 tokens (75 of CLIP's 77). When the next one does not fit and there is a comma
    among the last `comma_reach`, what follows the comma goes to the next row with it; 0 turns that off. Each
    segment after the first begins a row. vectors: for every embedding that may be named, by bare name too,
    how many tokens it takes the place of; `missing` lists names that are not there. Raises InputError for an
    embedding longer than a row, and for a row without room.
    """
    length = tokenizer.context_length if length is None else length
    room = length - 2
    if room < 1:
        raise InputError(
            f"length is {length}.", "A row holds start, end and at least one token between them."
        )
    names = _Names(vectors or {}, tokenizer)
    for name, count in names.vectors.items():
        if count > room:
            raise InputError(
                f"The embedding {name!r} has {count} vectors; this text encoder has room for {room}.",
                "Take it out of the folder, or another model.",
            )
    comma = tokenizer.encode(",")[-1]
    done: list[_Row] = []
    row = _Row()

    def make_room(token: int | None) -> None:
        """Before a token that finds the row full: end it, after its last comma where that is near."""
        nonlocal row
        if len(row.tokens) == room:
            near = token != comma and row.comma is not None and room - row.comma <= comma_reach
            tail = row.split_after_comma() if near else _Row()
            done.append(row)
            row = tail
        elif token == comma:
            row.comma = len(row.tokens)

    def add(token: int, weight: float) -> None:
        make_room(token)
        row.tokens.append(token)
        row.weights.append(weight)

    def place(name: str, token: int | None, weight: float) -> None:
        nonlocal row
        make_room(token)
        count = names.vectors[name]
        if len(row.tokens) + count > room:
            done.append(row)
            row = _Row()
        row.placed.append(Placed(name, len(row.tokens), count))
        row.tokens += [VECTOR_TOKEN] * count
        row.weights += [weight] * count

    for index, spans in enumerate(segments):
        if index:
            done.append(row)
            row = _Row()
        for span in spans:
            if span.embedding:
                if span.text in names.vectors:
                    place(span.text, None, span.weight)
                continue
            ids, at = tokenizer.encode(span.text), 0
            while at < len(ids):
                if found := names.at(ids, at):
                    place(found[0], ids[at], span.weight)
                    at += found[1]
                else:
                    add(ids[at], span.weight)
                    at += 1
    if row.tokens or not done:
        done.append(row)
    pad = tokenizer.pad_id if pad_id is None else pad_id
    return tuple(_framed(each, length, tokenizer, pad) for each in done)


def empty_chunk(tokenizer: Tokenizer, length: int | None = None, pad_id: int | None = None) -> Chunk:
    """The row of the empty text."""
    return chunked(((),), tokenizer, length, pad_id)[0]


def missing(segments: Segments, vectors: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """Names written as `embedding:name` that are not there; they are left out of the rows."""
    spans = (span for each in segments for span in each if span.embedding)
    return tuple(dict.fromkeys(span.text for span in spans if span.text not in (vectors or {})))


def _framed(row: _Row, length: int, tokenizer: Tokenizer, pad: int) -> Chunk:
    count = len(row.tokens)
    rest = length - 2 - count
    tokens = (tokenizer.start_id, *row.tokens, tokenizer.end_id, *[pad] * rest)
    weights = (1.0, *row.weights, 1.0, *[1.0] * rest)
    placed = tuple(Placed(each.name, each.start + 1, each.length) for each in row.placed)
    return Chunk(tokens, weights, count, placed)

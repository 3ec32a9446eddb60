"""Words with their weights: what the brackets of a text without schedules mean, in either dialect."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sfumato.text.prompt_tree import EMPHASIS
from sfumato.text.prompts import EMBEDDING, NUMBER, unescaped

Dialect = Literal["a1111", "comfyui"]
MAX_WEIGHT = 1e6  # a product of weights stops here, so that no nest of brackets leaves the finite numbers
TOKEN = re.compile(
    rf"(?P<escape>\\.?)|(?P<close>:\s*(?P<weight>{NUMBER})\s*\)|[)\]])|(?P<open>[(\[])"
    rf"|(?P<named>{EMBEDDING})|(?P<break>\bBREAK\b)",
    re.DOTALL,
)
FACTORS = {"(": EMPHASIS, "[": 1 / EMPHASIS}


@dataclass(frozen=True, slots=True)
class Span:
    """Words that share a weight; embedding: the text is the name of one, written as `embedding:name`."""

    text: str
    weight: float = 1.0
    embedding: bool = False


Segments: TypeAlias = tuple[tuple[Span, ...], ...]


def segments(text: str, dialect: Dialect = "a1111") -> Segments:
    """The spans of any text, one tuple for every stretch between two BREAKs; in linear time.

    `(` multiplies by 1.1 up to its `)`, or by the number in `:1.3)`; `[` divides up to its `]`; one that is
    never closed reaches to the end. Round and square brackets do not know of each other: they may cross.
    "a1111" multiplies all numbers; in "comfyui" one that is written replaces those around it.
    """
    pieces, factors = _pieces(text)
    reach: dict[str, list[float]] = {"(": [1.0], "[": [1.0]}
    done: list[tuple[Span, ...]] = []
    spans: list[Span] = []
    words: list[str] = []
    spoken = 1.0  # the weight of `words`

    def end_span() -> None:
        if words:
            spans.append(Span("".join(words), spoken))
            words.clear()

    for index, (kind, piece) in enumerate(pieces):
        if kind == "open":
            factor = factors.get(index)
            product = reach[piece][-1] * (FACTORS[piece] if factor is None else factor)
            if factor is not None and dialect == "comfyui":
                product = factor
            reach[piece].append(min(max(product, -MAX_WEIGHT), MAX_WEIGHT))
        elif kind == "close":
            reach[piece].pop()
        elif kind == "break":
            end_span()
            done.append(_without_space(spans, first=not done, last=False))
            spans = []
        else:
            weight = reach["("][-1] * reach["["][-1]
            if weight != spoken or kind == "named":
                end_span()
            spoken = weight
            if kind == "named":
                spans.append(Span(piece, weight, embedding=True))
            else:
                words.append(piece)
    end_span()
    return (*done, _without_space(spans, first=not done, last=True))


def plain(text: str) -> str:
    """The words alone, for encoders that read neither weights nor rows."""
    return " ".join("".join(span.text for span in spans if not span.embedding) for spans in segments(text))


def _pieces(text: str) -> tuple[list[tuple[str, str]], dict[int, float]]:
    """(kind, what) of texts, embeddings, BREAKs and brackets that count, and the written factors by place."""
    pieces: list[tuple[str, str]] = []
    factors: dict[int, float] = {}
    waiting: dict[str, list[int]] = {"(": [], "[": []}  # places of brackets that are open
    begin = position = 0
    while found := TOKEN.search(text, position):
        kind, (start, position) = str(found.lastgroup), found.span()
        bracket = "[" if text[position - 1] in "[]" else "("
        if kind == "escape" or (kind == "close" and not waiting[bracket]):
            continue
        if start > begin:
            pieces.append(("text", unescaped(text[begin:start])))
        begin = position
        if kind == "open":
            waiting[bracket].append(len(pieces))
            pieces.append((kind, bracket))
        elif kind == "close":
            place = waiting[bracket].pop()
            if found["weight"] is not None:
                factors[place] = float(found["weight"])
            pieces.append((kind, bracket))
        else:
            pieces.append((kind, found["embedding"] or found[0]))
    if begin < len(text):
        pieces.append(("text", unescaped(text[begin:])))
    return pieces, factors


def _without_space(spans: list[Span], first: bool, last: bool) -> tuple[Span, ...]:
    """The spans of a stretch without the white space on either side of a BREAK, and without empty ones."""
    if spans and not first and not spans[0].embedding:
        spans[0] = Span(spans[0].text.lstrip(), spans[0].weight)
    if spans and not last and not spans[-1].embedding:
        spans[-1] = Span(spans[-1].text.rstrip(), spans[-1].weight)
    return tuple(span for span in spans if span.text)

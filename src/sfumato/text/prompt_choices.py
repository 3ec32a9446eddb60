"""Choices in a prompt, `{a|b}` and `__name__`: text to a small tree, for every text and in linear time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TypeAlias

from sfumato.text.prompts import COMMENT

MAX_BRACES = 16  # braces deeper than this are text
HEADER = re.compile(r"\s*(?:(?P<count>[0-9]{1,4})|(?P<low>[0-9]{0,4})-(?P<high>[0-9]{0,4}))\$\$")
JOINER = re.compile(r"(?P<joiner>[^{}|$\\]*)\$\$")
WEIGHT = re.compile(r"\s*(?P<weight>[0-9]{1,6}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})::")
WILDCARD = r"__(?P<name>[\w\-./* ]{1,200}?)__"
TOKEN = re.compile(
    rf"(?P<escape>\\.?)|(?P<brace>[{{}}|])|(?P<wildcard>{WILDCARD})|(?P<comment>{COMMENT})|(?P<block>/\*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Wildcard:
    """A line of a file: `__name__`, where the name may hold `*` for several files."""

    name: str


@dataclass(frozen=True, slots=True)
class Option:
    """One of the alternatives, as likely as its weight among those of the others; a line is not read yet."""

    words: tuple[Item, ...] | str
    weight: float = 1.0

    @property
    def items(self) -> tuple[Item, ...]:
        """The choices in it."""
        return read(self.words) if isinstance(self.words, str) else self.words


@dataclass(frozen=True, slots=True)
class Choice:
    """`low` to `high` of the options, each at most once; `high` None: all of them."""

    options: tuple[Option, ...]
    low: int = 1
    high: int | None = 1
    joiner: str = ", "


Item: TypeAlias = str | Wildcard | Choice


@dataclass(slots=True)
class _Brace:
    """A brace that is open, or the whole text: its header, and the options that have ended."""

    source: str
    header: tuple[int, int | None, str] | None = None
    options: list[Option] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    weight: float = 1.0
    prefix: str = ""  # the spelling of that weight
    spelled: list[Item] = field(default_factory=list)  # what stands in the brace, should it be text


def read(text: str) -> tuple[Item, ...]:
    """The choices in any text, in linear time; comments, escapes and lone braces stay text."""
    stack = [_Brace("")]
    begin = position = 0
    last_block_end = text.rfind("*/")

    def flush(end: int) -> None:
        if end > begin:
            stack[-1].items.append(text[begin:end])

    while found := TOKEN.search(text, position):
        start, position = found.span()
        if found.lastgroup == "block" and position <= last_block_end:
            position = text.index("*/", position) + 2
        elif found.lastgroup == "wildcard":
            flush(start)
            stack[-1].items.append(Wildcard(found["name"]))
            begin = position
        elif found[0] == "{" and len(stack) <= MAX_BRACES:
            flush(start)
            position, header = _header(text, position)
            stack.append(_Brace(text[start:position], header))
            begin = position = _weigh(stack[-1], text, position)
        elif found[0] == "|" and len(stack) > 1:
            flush(start)
            _end_option(stack[-1], "|")
            begin = position = _weigh(stack[-1], text, position)
        elif found[0] == "}" and len(stack) > 1:
            flush(start)
            brace, begin = stack.pop(), position
            stack[-1].items += _closed(brace)
    flush(len(text))
    while len(stack) > 1:
        brace = stack.pop()
        stack[-1].items += [brace.source, *brace.spelled, brace.prefix, *brace.items]
    return tuple(stack[0].items)


def _header(text: str, place: int) -> tuple[int, tuple[int, int | None, str] | None]:
    """Where a brace's first option begins, and (low, high, joiner) where a count stands before it."""
    found = HEADER.match(text, place)
    if found is None:
        return place, None
    if found["count"] is not None:
        low, high = int(found["count"]), int(found["count"])
    else:
        low, high = int(found["low"] or 0), int(found["high"]) if found["high"] else None
    joiner = JOINER.match(text, found.end())
    if joiner is None:
        return found.end(), (low, high, ", ")
    return joiner.end(), (low, high, joiner["joiner"])


def _weigh(brace: _Brace, text: str, place: int) -> int:
    """Read an option's weight, if there is one; returns where its words begin."""
    found = WEIGHT.match(text, place)
    brace.weight, brace.prefix = (1.0, "") if found is None else (float(found["weight"]), found[0])
    return place if found is None else found.end()


def _end_option(brace: _Brace, separator: str) -> None:
    brace.options.append(Option(tuple(brace.items), brace.weight))
    brace.spelled += [brace.prefix, *brace.items, separator]
    brace.items = []


def _closed(brace: _Brace) -> list[Item]:
    """A closed brace as a choice; braces around one thing, without a count, are text as elsewhere."""
    _end_option(brace, "}")
    if brace.header is not None:
        return [Choice(tuple(brace.options), *brace.header)]
    if len(brace.options) == 1:
        return [brace.source, *brace.spelled]
    return [Choice(tuple(brace.options))]

"""The prompt language: text to a tree, for every text and in linear time; docs/prompts.md describes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sfumato.text.prompt_tree import (
    APPLIED_TAGS,
    EMPHASIS,
    MAX_DEPTH,
    TAG_WEIGHTS,
    Alternation,
    Break,
    Comment,
    Embedding,
    Emphasis,
    Node,
    Part,
    Prompt,
    Scheduled,
    Tag,
    Text,
)

# No exponents, no nan, no inf, and so few digits that every number is finite.
NUMBER = r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})"
EMBEDDING = r"(?<!\w)embedding:(?P<embedding>[^\s,;:()\[\]|<>{}\\]+)"
TAG = r"<(?P<kind>lora|lyco|hypernet):(?P<arguments>[^<>]+)>"
# `#` begins a comment at a line's start, `//` there and after white space, so that colours (#fff) and
# addresses (http://) are text; the end of `/*` is looked for by hand, once.
COMMENT = r"(?m:^)[ \t]*\#[^\n]*(?:\n[ \t]*\#[^\n]*)*|(?<!\S)//[^\n]*"
TOKEN = re.compile(
    rf"(?P<escape>\\.?)|(?P<close>:\s*(?P<weight>{NUMBER})\s*\)|\))|(?P<mark>[(\[\]:|])"
    rf"|(?P<tag>{TAG})|(?P<named>{EMBEDDING})|(?P<comment>{COMMENT})|(?P<block>/\*)"
    r"|(?P<word>\b(?:AND|BREAK)\b)",
    re.DOTALL,
)
NUMBER_ALONE = re.compile(NUMBER)
MARKS = {mark: Text(mark) for mark in "([:|"}
ESCAPED = re.compile(r"\\(.?)", re.DOTALL)


@dataclass(slots=True)
class _Frame:
    """A bracket that is open: what stands in it so far, and where its own `:` and `|` are among that."""

    opening: str
    items: list[Node]
    colons: list[int]
    bars: list[int]


def parse(text: str, compose: bool = True) -> Prompt:
    """The tree of any text at all; `render` gives the text back.

    compose: False takes AND for a word, as negative prompts do.
    """
    return _Parser(text, compose).parse()


def unescaped(text: str) -> str:
    r"""The words that are meant: `\(` is a bracket; a backslash before anything else vanishes too."""
    return ESCAPED.sub(r"\1", text)


class _Parser:
    """One pass over the text with a stack of open brackets."""

    def __init__(self, text: str, compose: bool) -> None:
        self.text, self.compose = text, compose
        self.frames = [_Frame("", [], [], [])]
        self.open = {"(": 0, "[": 0}  # how many of the frames are of that bracket
        self.parts: list[Part] = []
        self.begin = 0  # of the plain text that is not a node yet
        self.last_block_end = text.rfind("*/")

    def parse(self) -> Prompt:
        position = 0
        while found := TOKEN.search(self.text, position):
            kind = found.lastgroup
            if kind == "mark":
                position = found.end()
                self.mark(position - 1, found[0])
            elif kind == "close":
                position = self.close_round(found)
            else:
                position = self.take(kind, found)
        self.end_part(len(self.text))
        if len(self.parts) == 1:
            return Prompt(tuple(self.parts))
        return Prompt(tuple(_with_weight(part) for part in self.parts))

    def take(self, kind: str | None, found: re.Match[str]) -> int:
        """Take in a token that is no bracket, colon or bar; returns where to read on."""
        begin, end = found.span()
        match kind:
            case "comment":
                self.node(begin, end, Comment(found[0]))
            case "word" if found[0] == "BREAK":
                self.node(begin, end, Break())
            case "word" if self.compose:
                self.end_part(begin)
                self.begin = end
            case "tag":
                self.node(begin, end, _tag(found))
            case "named":
                self.node(begin, end, Embedding(found[0], found["embedding"]))
            case "block" if end <= self.last_block_end:
                end = self.text.index("*/", end) + 2
                self.node(begin, end, Comment(self.text[begin:end]))
            case _:
                pass  # an escape, or a word that is one
        return end

    def mark(self, place: int, mark: str) -> None:
        """An opening bracket, `]`, `:` or `|`; whatever has no meaning where it stands is text."""
        if mark == "(" or mark == "[":
            if len(self.frames) <= MAX_DEPTH:
                self.flush(place)
                self.begin = place + 1
                self.frames.append(_Frame(mark, [], [], []))
                self.open[mark] += 1
        elif mark == "]":
            if self.unwind_to("[", place):
                bracket = _bracket(self.pop())
                self.frames[-1].items.append(bracket)
                self.begin = place + 1
        elif (top := self.frames[-1]).opening == "[":
            self.flush(place)
            (top.colons if mark == ":" else top.bars).append(len(top.items))
            top.items.append(MARKS[mark])
            self.begin = place + 1

    def close_round(self, found: re.Match[str]) -> int:
        """`)` or `:1.3)`; text where no round bracket is open, but its colon may be a square one's."""
        begin, end = found.span()
        if self.unwind_to("(", begin):
            factor = EMPHASIS if found["weight"] is None else float(found["weight"])
            emphasis = Emphasis(_joined(self.pop().items), factor, "(", found[0])
            self.frames[-1].items.append(emphasis)
            self.begin = end
        elif found["weight"] is not None:
            self.mark(begin, ":")
            return begin + 1
        return end

    def unwind_to(self, opening: str, place: int) -> bool:
        """Make the innermost such bracket the top of the stack, those inside it text; False without one."""
        if not self.open[opening]:
            return False
        self.flush(place)
        while self.frames[-1].opening != opening:
            inner = self.pop()
            self.frames[-1].items += [MARKS[inner.opening], *inner.items]
        return True

    def pop(self) -> _Frame:
        frame = self.frames.pop()
        self.open[frame.opening] -= 1
        return frame

    def end_part(self, place: int) -> None:
        """End the part before `place`; brackets that are still open reach to its end."""
        self.flush(place)
        while len(self.frames) > 1:
            frame = self.pop()
            factor = EMPHASIS if frame.opening == "(" else 1 / EMPHASIS
            self.frames[-1].items.append(Emphasis(_joined(frame.items), factor, frame.opening, ""))
        self.parts.append(Part(_joined(self.frames[0].items)))
        self.frames = [_Frame("", [], [], [])]

    def node(self, begin: int, end: int, node: Node) -> None:
        items = self.frames[-1].items
        if begin > self.begin:
            items.append(Text(self.text[self.begin : begin]))
        items.append(node)
        self.begin = end

    def flush(self, place: int) -> None:
        """Make a node of the plain text before `place`."""
        if place > self.begin:
            self.frames[-1].items.append(Text(self.text[self.begin : place]))
        self.begin = place


def _bracket(frame: _Frame) -> Node:
    """What a closed `[` is: scheduled if a number ends it, in turn if bars are in it, else weaker words."""
    items, colons, bars = frame.items, frame.colons, frame.bars
    if colons and len(colons) <= 2 and colons[-1] == len(items) - 2:
        match items[-1]:
            case Text(when) if NUMBER_ALONE.fullmatch(when.strip()):
                before = _joined(items[: colons[0]]) if len(colons) == 2 else None
                after = items[colons[0] + 1 if len(colons) == 2 else 0 : colons[-1]]
                return Scheduled(before, _joined(after), when)
    if bars:
        ends = zip([-1, *bars], [*bars, len(items)], strict=True)
        return Alternation(tuple(_joined(items[begin + 1 : end]) for begin, end in ends))
    return Emphasis(_joined(items), 1 / EMPHASIS, "[", "]")


def _joined(items: list[Node]) -> tuple[Node, ...]:
    """The items with neighbouring texts as one."""
    if len(items) < 2:
        return tuple(items)
    result: list[Node] = []
    texts: list[str] = []
    for item in items:
        if isinstance(item, Text):
            texts.append(item.source)
            continue
        if texts:
            result.append(Text("".join(texts)))
            texts = []
        result.append(item)
    if texts:
        result.append(Text("".join(texts)))
    return tuple(result)


def _tag(found: re.Match[str]) -> Tag:
    """<lora:name>, <lora:name:w>, <lora:name:unet:te>, with `unet=` and `te=` too; what is no number is 1."""
    name, *arguments = found["arguments"].split(":")
    kind = found["kind"]
    if kind not in APPLIED_TAGS:
        return Tag(found[0], kind, name)
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    plain = [argument for argument in arguments if "=" not in argument]
    values = {
        **dict.fromkeys(TAG_WEIGHTS, *plain[:1]),
        **dict(zip(TAG_WEIGHTS, plain, strict=False)),
        **named,
    }
    weights = {
        which: float(value) if NUMBER_ALONE.fullmatch(value := (values.get(which) or "").strip()) else 1.0
        for which in TAG_WEIGHTS
    }
    return Tag(found[0], kind, name, weights["unet"], weights["te"])


def _with_weight(part: Part) -> Part:
    """The part with the `:0.7` at its end, if there is one, as its weight."""
    if not part.items or not isinstance(last := part.items[-1], Text):
        return part
    head, colon, tail = last.source.rpartition(":")
    backslashes = len(head) - len(head.rstrip("\\"))
    if not colon or backslashes % 2 or not NUMBER_ALONE.fullmatch(tail.strip()):
        return part
    rest = (*part.items[:-1], Text(head)) if head else part.items[:-1]
    return Part(rest, colon + tail)

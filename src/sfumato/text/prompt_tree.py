"""The parse tree of a prompt: frozen nodes that keep their spelling, so that the text can be written back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

EMPHASIS = 1.1  # what one pair of brackets multiplies or divides by; AUTOMATIC1111's and NovelAI-like tools'
MAX_DEPTH = 64  # brackets deeper than this are text: trees stay shallow enough for every reader of them
# The order of a tag's two numbers, <lora:name:unet:te>; `unet=` and `te=` say it in either order.
TAG_WEIGHTS = ("unet", "te")
APPLIED_TAGS = ("lora", "lyco")  # lyco: an older spelling, for the same files


@dataclass(frozen=True, slots=True)
class Text:
    """Plain words as they were written, with their backslashes."""

    source: str


@dataclass(frozen=True, slots=True)
class Break:
    """`BREAK`: what follows begins a new chunk of tokens."""

    source: str = "BREAK"


@dataclass(frozen=True, slots=True)
class Comment:
    """A remark, without the end of its line."""

    source: str


@dataclass(frozen=True, slots=True)
class Tag:
    """`<kind:name:arguments>`; the weights are None where the tag is not of a kind that has them."""

    source: str
    kind: str
    name: str
    unet: float | None = None
    te: float | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """`embedding:name`: a textual-inversion embedding."""

    source: str
    name: str


@dataclass(frozen=True, slots=True)
class Emphasis:
    """Brackets that multiply their items' weights by `factor`; `closing` is "" where none was written."""

    items: tuple[Node, ...]
    factor: float
    opening: str
    closing: str


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`[before:after:when]`: one until `when`, then the other. before: None where only `[after:when]` was
    written. when: the number as written; with a point it is a fraction of all steps, without one a step."""

    before: tuple[Node, ...] | None
    after: tuple[Node, ...]
    when: str

    def step(self, steps: int, first_pass: int = 0) -> int:
        """The last of `steps` steps that `before` is for; 0 and below for none.

        first_pass: the steps of a pass before this one; numbers then count on from it: 1.5 is halfway
        through the second pass, and so is step first_pass + steps / 2.
        """
        number = float(self.when)
        if "." in self.when:
            number = (number - (first_pass > 0)) * steps
        else:
            number -= first_pass
        return int(min(number, steps))


@dataclass(frozen=True, slots=True)
class Alternation:
    """`[a|b|c]`: the options in turn, another one each step."""

    options: tuple[tuple[Node, ...], ...]


Node: TypeAlias = Text | Break | Comment | Tag | Embedding | Emphasis | Scheduled | Alternation


@dataclass(frozen=True, slots=True)
class Part:
    """One of the prompts that `AND` composes; `ending` is its weight as written (":0.7"), or ""."""

    items: tuple[Node, ...]
    ending: str = ""

    @property
    def weight(self) -> float:
        """What the part's guidance is multiplied by."""
        return float(self.ending.strip()[1:]) if self.ending else 1.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: at least one part, with `AND` between two."""

    parts: tuple[Part, ...]


def render(tree: Prompt) -> str:
    """The text that the tree was parsed from, character by character."""
    return "AND".join(source(part.items) + part.ending for part in tree.parts)


def source(items: Iterable[Node]) -> str:
    """The text of some nodes."""
    return "".join(_spelled(item) for item in items)


def _spelled(node: Node) -> str:
    match node:
        case Emphasis(items, _, opening, closing):
            return opening + source(items) + closing
        case Scheduled(before, after, when):
            first = "" if before is None else source(before) + ":"
            return f"[{first}{source(after)}:{when}]"
        case Alternation(options):
            return "[" + "|".join(source(option) for option in options) + "]"
        case _:
            return node.source


def walk(tree: Prompt) -> Iterator[Node]:
    """Every node, parents before children, from left to right."""
    stack = [item for part in reversed(tree.parts) for item in reversed(part.items)]
    while stack:
        node = stack.pop()
        yield node
        stack += [item for items in reversed(children(node)) for item in reversed(items)]


def children(node: Node) -> tuple[tuple[Node, ...], ...]:
    """The lists of nodes in a node; none in a leaf."""
    match node:
        case Emphasis(items):
            return (items,)
        case Scheduled(before, after):
            return (before or (), after)
        case Alternation(options):
            return options
        case _:
            return ()


def networks(tree: Prompt) -> tuple[Tag, ...]:
    """The tags of networks to apply, in the order written, for all steps wherever they stand."""
    return tuple(node for node in walk(tree) if isinstance(node, Tag) and node.kind in APPLIED_TAGS)


def ignored(tree: Prompt) -> tuple[Tag | Comment, ...]:
    """What has no effect: comments, and tags of kinds that this package has nothing for."""
    return tuple(
        node
        for node in walk(tree)
        if isinstance(node, Comment) or (isinstance(node, Tag) and node.kind not in APPLIED_TAGS)
    )

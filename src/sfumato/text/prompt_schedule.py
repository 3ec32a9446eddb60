"""Prompts that change over the steps: which text holds at which step, and until when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sfumato.text.prompt_tree import (
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
    children,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A text without schedules, alternations, tags and comments, and the last step, from 1, it is for."""

    until: int
    text: str


@dataclass(frozen=True, slots=True)
class Branch:
    """One of the prompts that `AND` composes: its weight, and its stages in order of their steps."""

    weight: float
    stages: tuple[Stage, ...]

    def at(self, step: int) -> str:
        """The text at a step from 1; the last one's from there on."""
        return next((stage.text for stage in self.stages if step <= stage.until), self.stages[-1].text)


def plan(tree: Prompt, steps: int, first_pass: int = 0) -> tuple[Branch, ...]:
    """For each part its weight and its texts over the steps, equal neighbours as one."""
    return tuple(Branch(part.weight, tuple(changes(part, steps, first_pass))) for part in tree.parts)


def schedule(part: Part, steps: int, first_pass: int = 0) -> list[Stage]:
    """A stage for every step at which anything was asked to change, the last one until `steps`.

    first_pass: steps of a pass before this one, see `Scheduled.step`. Neighbours may be equal: `changes`
    joins them.
    """
    ends = {steps}
    stack = list(part.items)
    while stack:
        node = stack.pop()
        if isinstance(node, Alternation):
            ends.update(range(1, steps + 1))
        elif isinstance(node, Scheduled):
            ends.add(node.step(steps, first_pass))
        stack += [item for items in children(node) for item in items]
    return [Stage(end, text_at(part, end, steps, first_pass)) for end in sorted(ends) if end > 0]


def changes(part: Part, steps: int, first_pass: int = 0) -> list[Stage]:
    """The stages of `schedule`, those that follow each other with the same text as one."""
    stages: list[Stage] = []
    for stage in schedule(part, steps, first_pass):
        if stages and stages[-1].text == stage.text:
            stages.pop()
        stages.append(stage)
    return stages


def text_at(part: Part, step: int, steps: int, first_pass: int = 0) -> str:
    """What the part says at a step from 1 of `steps`, spelled as it was written."""
    words: list[str] = []
    _choose(part.items, step, steps, first_pass, words)
    return "".join(words)


def _choose(items: Iterable[Node], step: int, steps: int, first_pass: int, words: list[str]) -> None:
    """Append what the items say at the step."""
    for item in items:
        match item:
            case Text(written):
                words.append(written)
            case Emphasis(inner, _, opening, closing):
                words.append(opening)
                _choose(inner, step, steps, first_pass, words)
                words.append(closing)
            case Scheduled(before, after):
                now = (before or ()) if step <= item.step(steps, first_pass) else after
                _choose(now, step, steps, first_pass, words)
            case Alternation(options):
                _choose(options[(step - 1) % len(options)], step, steps, first_pass, words)
            case Break(written) | Embedding(written):
                words.append(written)
            case Tag() | Comment():
                pass

"""The modules of a network out of the names of its tensors, and what damaged shapes are outvoted by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.errors import CheckpointError

Tree = dict[str, Any]  # the modules and tensors inside a module, by name
NUMBER_DIGITS = 5  # a longer number in a name is no index
SHOWN = 16  # numbers in a message
DEPTH = 6  # down_blocks.1.attentions.0.transformer_blocks.0: nothing deeper tells an option


def tree(names: Iterable[str]) -> Tree:
    """The modules that tensors of these names lie in, six levels of them."""
    root: Tree = {}
    for name in names:
        node = root
        for part in name.split(".", DEPTH)[:DEPTH]:
            node = node.setdefault(part, {})
    return root


def inside(node: Tree, *path: str | int) -> Tree:
    """The module at the end of the path; an empty one where there is none."""
    for part in path:
        node = node.get(str(part), {})
    return node


def numbers(node: Tree) -> list[int]:
    """The numbered modules right inside, in order."""
    return sorted(int(name) for name in node if name.isdecimal() and len(name) <= NUMBER_DIGITS)


def shown(values: Sequence[int]) -> str:
    """The first of some numbers, for messages."""
    return f"[{', '.join(map(str, values[:SHOWN]))}{', ...' if len(values) > SHOWN else ''}]"


def vote(values: Iterable[int | None], what: str) -> int:
    """The value that most tensors agree on; `CheckpointError` where none is left to tell `what`."""
    counts = Counter(value for value in values if value is not None)
    if not counts:
        raise CheckpointError(f"no tensor is left that tells {what}", "The file is incomplete. Get it again.")
    return counts.most_common(1)[0][0]


def side(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int = 0) -> int | None:
    """A side of a tensor; None where there is no such tensor or it has fewer sides."""
    shape = shapes.get(name, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None

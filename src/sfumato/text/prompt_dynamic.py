"""One prompt that stands for many: its choices drawn by a seed, or all of them in turn."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from sfumato.errors import InputError
from sfumato.text.prompt_choices import WEIGHT, Choice, Item, Option, Wildcard, read

Wildcards: TypeAlias = Mapping[str, Sequence[str]]

MAX_FILES = 8  # wildcards inside wildcards inside ...
MAX_LENGTH = 100_000  # characters of a result: a few lines that name each other could fill any memory
MAX_OPTIONS = 1_000_000  # looked at while drawing
MASK = 2**64 - 1


def expand(text: str, seed: int, wildcards: Wildcards | None = None) -> str:
    """The text with every choice drawn, a function of text, seed and wildcards alone.

    A wildcard that nothing is known of stays as it is. Raises InputError for wildcards that name each other
    more than 8 deep, and where the result has more than 100,000 characters.
    """
    drawing = _Drawing(seed, wildcards or {})
    return drawing.text(read(text), 0)


def combinations(text: str, wildcards: Wildcards | None = None) -> Iterator[str]:
    """Every text that could be drawn, lazily: the last choice changes first, weights do not count.

    Of several options every set is given once, in the order written. Errors as `expand`.
    """
    return _every(read(text), wildcards or {}, 0)


def unknown_wildcards(text: str, wildcards: Wildcards) -> tuple[str, ...]:
    """The names of wildcards in the text that nothing is known of, each once."""
    stack, names = list(reversed(read(text))), dict[str, None]()
    while stack:
        item = stack.pop()
        if isinstance(item, Wildcard) and not _lines(item.name, wildcards):
            names[item.name] = None
        elif isinstance(item, Choice):
            stack += [part for option in reversed(item.options) for part in reversed(option.items)]
    return tuple(names)


def _lines(name: str, wildcards: Wildcards) -> list[str]:
    """The lines of the files that a name means."""
    if "*" not in name:
        return list(wildcards.get(name, ()))
    return [line for key in sorted(fnmatch.filter(wildcards, name)) for line in wildcards[key]]


def _options(item: Choice | Wildcard, wildcards: Wildcards, depth: int) -> tuple[tuple[Option, ...], int]:
    """What to choose from, and how deep in wildcards that is; a count before one wildcard is of its lines."""
    if isinstance(item, Choice):
        match item.options:
            case (Option((Wildcard() as only,)),) if _lines(only.name, wildcards):
                item = only
            case _:
                return _possible(item.options), depth
    if depth >= MAX_FILES:
        raise InputError(
            f"The wildcard __{item.name}__ stands in wildcards more than {MAX_FILES} deep.",
            "See whether two of the files name each other.",
        )
    options = []
    for line in _lines(item.name, wildcards):
        found = WEIGHT.match(line)
        words = line if found is None else line[found.end() :]
        options.append(Option(words, 1.0 if found is None else float(found["weight"])))
    return _possible(tuple(options)), depth + 1


def _possible(options: tuple[Option, ...]) -> tuple[Option, ...]:
    """Those of any weight; all of them, alike, where none has one."""
    some = tuple(option for option in options if option.weight)
    return some or tuple(Option(option.words) for option in options)


def _check_growth(length: int, options: int = 0) -> None:
    if length > MAX_LENGTH or options > MAX_OPTIONS:
        raise InputError(
            f"The prompt grows beyond {MAX_LENGTH} characters or {MAX_OPTIONS} options.",
            "See what its wildcards stand for.",
        )


class _Drawing:
    """The draws of one expansion, numbered in the order in which they are made."""

    def __init__(self, seed: int, wildcards: Wildcards) -> None:
        self.seed, self.wildcards = seed, wildcards
        self.draws = self.looked_at = self.length = 0

    def text(self, items: Sequence[Item], depth: int) -> str:
        return "".join(item if isinstance(item, str) else self.drawn(item, depth) for item in items)

    def drawn(self, item: Choice | Wildcard, depth: int) -> str:
        options, inner = _options(item, self.wildcards, depth)
        if not options:
            return f"__{item.name}__" if isinstance(item, Wildcard) else ""
        low, high, joiner = (item.low, item.high, item.joiner) if isinstance(item, Choice) else (1, 1, "")
        self.draws += 1
        self.looked_at += len(options)
        _check_growth(self.length, self.looked_at)
        draw = self.draws
        most = len(options) if high is None else min(high, len(options))
        low = min(low, most)
        count = low + int(uniform(self.seed, draw, 0) * (most - low + 1))
        # The `count` smallest of exponential times are a weighted draw without replacement
        # (Efraimidis and Spirakis 2006).
        times = [
            (-math.log(uniform(self.seed, draw, index)) / option.weight, index)
            for index, option in enumerate(options, start=1)
        ]
        chosen = [options[index - 1] for _, index in sorted(times)[:count]]
        result = joiner.join(self.text(option.items, inner) for option in chosen)
        self.length += len(result)
        _check_growth(self.length)
        return result


def uniform(seed: int, draw: int, option: int) -> float:
    """A number in 0..1 without its ends, of three numbers alone (splitmix64; Steele, Lea and Flood 2014)."""
    state = 0
    for number in (seed, draw, option):
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return ((state >> 12) + 0.5) / 2**52


def _every(items: Sequence[Item], wildcards: Wildcards, depth: int) -> Iterator[str]:
    def texts(item: Item) -> Callable[[], Iterator[str]]:
        if isinstance(item, str):
            return lambda: iter((item,))
        return lambda: _every_choice(item, wildcards, depth)

    for values in _product([texts(item) for item in items]):
        _check_growth(sum(map(len, values)))
        yield "".join(values)


def _every_choice(item: Choice | Wildcard, wildcards: Wildcards, depth: int) -> Iterator[str]:
    options, inner = _options(item, wildcards, depth)
    if not options and isinstance(item, Wildcard):
        yield f"__{item.name}__"
        return
    low, high, joiner = (item.low, item.high, item.joiner) if isinstance(item, Choice) else (1, 1, "")
    most = len(options) if high is None else min(high, len(options))
    for count in range(min(low, most), most + 1):
        for chosen in itertools.combinations(options, count):
            makers = [lambda option=option: _every(option.items, wildcards, inner) for option in chosen]
            for values in _product(makers):
                yield joiner.join(values)


def _product(makers: Sequence[Callable[[], Iterator[str]]]) -> Iterator[list[str]]:
    """One value of each, in all ways, the last changing first; none of them is ever held whole."""
    values: list[str] = []
    running: list[Iterator[str]] = []
    while True:
        if len(running) < len(makers):
            running.append(makers[len(running)]())
            values.append("")
        else:
            yield values
        while running:
            value = next(running[-1], None)
            if value is not None:
                values[-1] = value
                break
            running.pop()
            values.pop()
        if not running:
            return

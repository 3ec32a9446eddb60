"""Splits and choices by hash of names: independent of order, so they survive additions and new versions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def unit(*names: object) -> float:
    """A number in [0, 1) that is a function of the names alone (the first 53 bits of their SHA-256)."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def pick(options: Sequence[T], *names: object) -> T:
    """One of `options`, chosen by the hash of the names."""
    return options[int(unit(*names) * len(options))]


def is_held_out(share: float, *names: object) -> bool:
    """Whether a thing of this name belongs to the held-out `share` (0..1)."""
    return unit("held out", *names) < share


def held_out_pairs(
    purpose: str, first: Iterable[str], second: Iterable[str], share: float
) -> frozenset[tuple[str, str]]:
    """Pairs (a, b) that training must not show; every single a and b keeps at least one training pair.

    A pair is held out by the hash of its own two names; a value whose partners would all be held out gets the
    pair with the largest hash back.
    """
    first, second = sorted(set(first)), sorted(set(second))
    hashes = {(a, b): unit("held out", purpose, a, b) for a in first for b in second}
    held = {pair for pair, number in hashes.items() if number < share}
    for axis, values in enumerate((first, second)):
        for value in values:
            pairs = [pair for pair in hashes if pair[axis] == value]
            if all(pair in held for pair in pairs):
                held.discard(max(pairs, key=hashes.__getitem__))
    return frozenset(held)

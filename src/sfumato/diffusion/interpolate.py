"""Ways between latents and between conditions: arcs through noise, lines through prompts (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.noise import slerp
from sfumato.errors import InputError

MAX_CONTEXT = 4096  # tokens that contexts of unequal lengths are repeated to


def positions(keys: int, frames: int, *, loop: bool = False) -> list[tuple[int, float]]:
    """(key, share) of every frame on the way through `keys` stations: share of the way to the next key, 0..1.

    frames: from each key to the next; the key it starts from is the first of them. loop: go on from the last
    to the first; else the last key is a frame of its own. Raises InputError for fewer than two keys, and for
    fewer than one frame.
    """
    if keys < 2 or frames < 1:
        raise InputError(
            f"there are {keys} stations with {frames} frames between them", "Give two stations and one frame."
        )
    ways = keys if loop else keys - 1
    found = [(key, frame / frames) for key in range(ways) for frame in range(frames)]
    return found if loop else [*found, (keys - 1, 0.0)]


def between_noises(noises: Sequence[Tensor], key: int, share: float) -> Tensor:
    """The noise at `share` of the arc from `noises[key]` to the next, the first after the last; like them.

    The arc keeps noise as large as it is, where a line would make it weaker half-way, and pictures blurred.
    """
    return slerp(share, noises[key], noises[(key + 1) % len(noises)])


def between_conditions(first: Conditioning, second: Conditioning, share: float) -> Conditioning:
    """The conditions at `share` of the line from `first` (0) to `second` (1), like them.

    Contexts of unequal length are repeated, which attention does not notice. Labels, which are numbers of
    classes, are `first`'s before the middle and `second`'s from there. Raises InputError where one has a kind
    that the other lacks.
    """
    joined = {}
    for field in fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if (one is None) != (other is None):
            raise InputError(f"only one of the two conditions has {field.name}", "Take two of the same kind.")
        if one is None:
            continue
        if isinstance(one, tuple):
            joined[field.name] = tuple(_mixed(a, b, share) for a, b in zip(one, other, strict=True))
        else:
            one, other = _equally_long(one, other) if field.name == "context" else (one, other)
            joined[field.name] = _mixed(one, other, share)
    return replace(first, **joined)


def _mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    if first.shape != second.shape:
        raise InputError(f"conditions of shape {tuple(first.shape)} and {tuple(second.shape)} do not mix.")
    if not first.is_floating_point():
        return first if share < 0.5 else second
    return torch.lerp(first, second, share)


def _equally_long(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    lengths = first.shape[1], second.shape[1]
    whole = math.lcm(*lengths)
    if whole > MAX_CONTEXT:
        raise InputError(f"contexts of {lengths[0]} and {lengths[1]} tokens do not mix.")
    return first.repeat(1, whole // lengths[0], 1), second.repeat(1, whole // lengths[1], 1)

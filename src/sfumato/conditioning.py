"""The values a denoising network is conditioned on (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What one batch of samples is conditioned on; an absent kind is None, the sample axis is first.

    context: (b, tokens, width), read by cross-attention. vector: (b, width) floats, or (b,) long labels.
    concat: (b, c, ...) joined to the network's input channels. hints: pictures for control networks, each
    (b, c, h, w). image_tokens: (b, tokens, width) of an image encoder.
    """

    context: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    hints: tuple[Tensor, ...] | None = None
    image_tokens: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same conditioning with `function` applied to every tensor in it."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                changed[field.name] = tuple(function(item) for item in value)
            elif value is not None:
                changed[field.name] = function(value)
        return replace(self, **changed)

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """Moved to a device, floating tensors in `dtype`; labels stay integers."""
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def rows(self, start: int, stop: int) -> Conditioning:
        """The samples start..stop of the batch."""
        return self.map(lambda value: value[start:stop])

    def repeat(self, count: int) -> Conditioning:
        """Every sample `count` times in a row; one sample becomes a batch of `count`."""
        return self.map(lambda value: value.repeat_interleave(count, dim=0))

    def same_shape(self, other: Conditioning) -> bool:
        """Whether both can be joined along the sample axis: the same kinds, equal in all other axes."""
        return _shape(self) == _shape(other)


def _shape(conditioning: Conditioning) -> list[object]:
    values = [getattr(conditioning, field.name) for field in fields(conditioning)]
    return [
        tuple(tuple(item.shape[1:]) for item in value)
        if isinstance(value, tuple)
        else None
        if value is None
        else tuple(value.shape[1:])
        for value in values
    ]


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings of equal shape along the sample axis; `ValueError` where shapes differ."""
    first = parts[0]
    if not all(first.same_shape(part) for part in parts[1:]):
        raise ValueError("conditionings of unequal shape cannot share a batch; run them in separate passes")
    joined = {}
    for field in fields(first):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], tuple):
            joined[field.name] = tuple(torch.cat(items) for items in zip(*values, strict=True))
        elif values[0] is not None:
            joined[field.name] = torch.cat(values)
    return Conditioning(**joined)

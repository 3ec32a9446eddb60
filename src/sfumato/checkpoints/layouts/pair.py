"""One line of a table of names: a tensor of ours, the tensors of another layout, and the way between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How the tensors of another layout become one of ours, and back, exactly.

    to_native takes the foreign tensors in the pair's order, to_foreign gives them; the two on shapes do the
    same for shapes alone. No transform computes: each views, cuts, joins or reorders. piece: (i, n) where the
    native tensor is only the i-th of n equal slices of the rows of one foreign tensor: `to_foreign` gives the
    slice, `foreign_shapes` the whole tensor's shape.
    """

    name: str
    to_native: Callable[[Sequence[Tensor]], Tensor]
    to_foreign: Callable[[Tensor], list[Tensor]]
    native_shape: Callable[[Sequence[Shape]], Shape]
    foreign_shapes: Callable[[Shape], list[Shape]]
    piece: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """`native`, a key of our module of the given shape, made of the `foreign` keys by the transform."""

    native: str
    foreign: tuple[str, ...]
    transform: Transform
    shape: Shape

    def foreign_shapes(self) -> list[Shape]:
        """The shapes of the foreign tensors, in the order of their names."""
        return self.transform.foreign_shapes(self.shape)


SAME = Transform(
    "same", lambda given: given[0], lambda own: [own], lambda given: tuple(given[0]), lambda own: [own]
)
# The map of the pooled vector: a matrix for `x @ m` in OpenCLIP, the weight of a linear layer here.
TRANSPOSED = Transform(
    "transposed",
    lambda given: given[0].T.contiguous(),
    lambda own: [own.T.contiguous()],
    lambda given: tuple(reversed(given[0])),
    lambda own: [tuple(reversed(own))],
)


@cache
def reshaped(native: Shape, foreign: Shape) -> Transform:
    """The same values under another shape: a 1-wide convolution that is a linear layer elsewhere."""
    assert prod(native) == prod(foreign), f"{native} and {foreign} differ in size"
    return Transform(
        "reshaped",
        lambda given: given[0].reshape(native),
        lambda own: [own.reshape(foreign)],
        lambda given: native,
        lambda own: [foreign],
    )


@cache
def row_slice(index: int, count: int) -> Transform:
    """The index-th of `count` equal parts of the rows: q, k or v out of one matrix for all three."""

    def cut(given: Sequence[Tensor]) -> Tensor:
        return given[0].unflatten(0, (count, -1))[index]

    return Transform(
        f"rows {index + 1} of {count}",
        cut,
        lambda own: [own],
        lambda given: (given[0][0] // count, *given[0][1:]),
        lambda own: [(count * own[0], *own[1:])],
        piece=(index, count),
    )


@cache
def split_heads(heads: int, *, by_head: bool) -> Transform:
    """q, k and v as three matrices, joined here: one head after the other if `by_head`, else q, k, v in turn.

    Ours is the 1-wide convolution of `AttentionBlock` (3c, c, 1), theirs linear layers (c, c); biases too.
    """
    grouping, axis = ((heads, 3, -1), 1) if by_head else ((3, heads, -1), 0)

    def join(given: Sequence[Tensor]) -> Tensor:
        parts = torch.stack([part.unflatten(0, (heads, -1)) for part in given], dim=axis)
        joined = parts.flatten(0, 2)
        return joined.unsqueeze(-1) if joined.ndim == 2 else joined

    def part(own: Tensor) -> list[Tensor]:
        flat = own.squeeze(-1) if own.ndim == 3 else own
        return [part.flatten(0, 1) for part in flat.unflatten(0, grouping).unbind(axis)]

    def join_shapes(given: Sequence[Shape]) -> Shape:
        rows, *columns = given[0]
        return (3 * rows, *columns, 1) if columns else (3 * rows,)

    def part_shape(own: Shape) -> list[Shape]:
        return [(own[0] // 3, *own[1:2])] * 3

    return Transform(f"{heads} heads", join, part, join_shapes, part_shape)


def same(native: str, foreign: str, shape: Shape) -> Pair:
    """A tensor that only goes by another name."""
    return Pair(native, (foreign,), SAME, shape)


def affine(native: str, foreign: str, weight: Shape) -> Iterator[Pair]:
    """The weight, of the given shape, and the bias of a layer that only goes by another name."""
    yield Pair(f"{native}.weight", (f"{foreign}.weight",), SAME, weight)
    yield Pair(f"{native}.bias", (f"{foreign}.bias",), SAME, weight[:1])


def convolution(
    native: str, foreign: str, inputs: int, outputs: int, kernel: Shape = (3, 3)
) -> Iterator[Pair]:
    """A convolution, 3-wide in two dimensions unless said otherwise."""
    return affine(native, foreign, (outputs, inputs, *kernel))


def linear_of_convolution(native: str, foreign: str, channels: int, rank: int) -> Iterator[Pair]:
    """A 1-wide convolution over `rank` axes that keeps its channels, and is a linear layer elsewhere."""
    shape, flat = (channels, channels, *[1] * rank), (channels, channels)
    yield Pair(f"{native}.weight", (f"{foreign}.weight",), reshaped(shape, flat), shape)
    yield same(f"{native}.bias", f"{foreign}.bias", (channels,))

"""A layer's weight changed by few numbers: LoRA (Hu et al. 2021), LoCon, LoHa, LoKr, DoRA, and differences.

Every function takes the tensors of one layer under the names that files give them, and works on matrices
(rows, columns), where a convolution's columns are its inputs times its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """The matrix that a change makes, and the rank that its alpha is divided by; None where none is."""

    rows: int
    columns: int
    rank: int | None


@dataclass(frozen=True)
class Kind:
    """A way to write a change: which tensors it takes, what they make, how large that is.

    change(tensors, scale): the matrix of `size`, times scale. size(tensors): from shapes alone, for which it
    raises ValueError where they do not fit together, or one is missing.
    """

    title: str
    slots: frozenset[str]
    change: Callable[[Tensors, float], Tensor]
    size: Callable[[Tensors], Size]


def low_rank(tensors: Tensors, scale: float) -> Tensor:
    """up @ down (Hu et al. 2021, eq. 3); with `lora_mid` a Tucker decomposition of a kernel (LoCon)."""
    up, down = tensors["lora_up"].flatten(1) * scale, tensors["lora_down"].flatten(1)
    if "lora_mid" not in tensors:
        return up @ down
    return tucker(tensors["lora_mid"], up.T, down)


def hadamard(tensors: Tensors, scale: float) -> Tensor:
    """The elementwise product of two low-rank changes (Hyeon-Woo et al. 2022, propositions 1 and 3)."""
    first, second = (
        tucker(tensors[f"hada_t{i}"], tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"])
        if f"hada_t{i}" in tensors
        else tensors[f"hada_w{i}_a"] @ tensors[f"hada_w{i}_b"]
        for i in (1, 2)
    )
    return first.mul_(second).mul_(scale)


def kronecker(tensors: Tensors, scale: float) -> Tensor:
    """The Kronecker product of two matrices, each whole or of low rank (Yeh et al. 2024, section 3.3)."""
    return torch.kron(_factor(tensors, 1).flatten(1) * scale, _factor(tensors, 2).flatten(1))


def difference(tensors: Tensors, scale: float) -> Tensor:
    """The whole change as it is; files give it no rank to divide an alpha by."""
    return tensors["diff"].reshape(len(tensors["diff"]), -1) * scale


def tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """core (i, j, *kernel), outputs (i, rows), inputs (j, channels) -> (rows, channels * kernel)."""
    return torch.einsum("ij...,ip,jr->pr...", core, outputs, inputs).flatten(1)


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """m * (W + BA) / |W + BA| (Liu et al. 2024, eq. 5), all of a weight's shape but m.

    magnitude: (rows, 1, ...) where the norm of each output's weights is taken, (1, inputs, 1, ...) where it
    is that of each input's; see `magnitude_of`.
    """
    changed = weight + change
    norm = torch.linalg.vector_norm(changed, dim=_others(magnitude, changed), keepdim=True)
    return changed * (magnitude / (norm + torch.finfo(norm.dtype).eps))


def magnitude_of(tensor: Tensor, shape: tuple[int, ...], *, of_outputs: bool) -> Tensor:
    """A file's magnitudes so that they broadcast over a weight of that shape; ValueError where they cannot.

    of_outputs: one number for each output is meant where both readings fit, as they do in a square.
    """
    outputs, inputs = shape[0], shape[1] if len(shape) > 1 else 1
    flat = tuple(tensor.shape[:1]) == (1,) and tensor.ndim > 1
    fits_outputs, fits_inputs = tensor.numel() == outputs, tensor.numel() == inputs
    if fits_outputs and (of_outputs or not flat or not fits_inputs):
        return tensor.reshape(outputs, *[1] * (len(shape) - 1))
    if fits_inputs and len(shape) > 1:
        return tensor.reshape(1, inputs, *[1] * (len(shape) - 2))
    raise ValueError(f"its magnitudes {tuple(tensor.shape)} are for another layer than {shape}")


def kind_of(slots: frozenset[str]) -> Kind | None:
    """The kind that takes all of these tensors, None where none does."""
    return next((kind for kind in KINDS if slots and slots <= kind.slots), None)


def _others(magnitude: Tensor, weight: Tensor) -> tuple[int, ...]:
    kept = 0 if magnitude.shape[0] == weight.shape[0] and prod(magnitude.shape[1:]) == 1 else 1
    return tuple(axis for axis in range(weight.ndim) if axis != kept)


def _factor(tensors: Tensors, index: int) -> Tensor:
    name = f"lokr_w{index}"
    if name in tensors:
        return tensors[name]
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    core = tensors.get(f"lokr_t{index}")
    return left @ right if core is None else tucker(core, left, right)


def _low_rank_size(tensors: Tensors) -> Size:
    up, down, mid = _needed(tensors, "lora_up"), _needed(tensors, "lora_down"), tensors.get("lora_mid")
    _check(up.ndim >= 2 and down.ndim >= 2, "its factors are no matrices")
    rank, inner = len(down), up.numel() // max(1, len(up))
    if mid is None:
        _check(rank == inner, f"its factors have ranks {rank} and {inner}")
        return Size(len(up), down.numel() // max(1, rank), rank)
    _check(mid.ndim >= 2 and tuple(mid.shape[:2]) == (inner, rank), "its lora_mid has another rank")
    return Size(len(up), down.numel() // max(1, rank) * prod(mid.shape[2:]), rank)


def _hadamard_size(tensors: Tensors) -> Size:
    first, second = (
        _product_size(
            tensors.get(f"hada_t{i}"),
            _needed(tensors, f"hada_w{i}_a"),
            _needed(tensors, f"hada_w{i}_b"),
        )
        for i in (1, 2)
    )
    _check((first.rows, first.columns) == (second.rows, second.columns), "its two factors differ in shape")
    return first


def _kronecker_size(tensors: Tensors) -> Size:
    sizes: list[Size] = []
    for name in ("lokr_w1", "lokr_w2"):
        whole, core = tensors.get(name), tensors.get(name.replace("w", "t"))
        if whole is not None:
            _check(whole.ndim >= 2 and f"{name}_a" not in tensors, f"its {name} is no matrix, or there twice")
            sizes.append(Size(len(whole), whole.numel() // max(1, len(whole)), None))
        else:
            left, right = _needed(tensors, f"{name}_a"), _needed(tensors, f"{name}_b")
            sizes.append(_product_size(core, left, right))
    first, second = sizes
    rank = first.rank if second.rank is None else second.rank
    return Size(first.rows * second.rows, first.columns * second.columns, rank)


def _difference_size(tensors: Tensors) -> Size:
    whole = _needed(tensors, "diff")
    _check(whole.ndim >= 1, "its difference is one number")
    return Size(len(whole), whole.numel() // max(1, len(whole)), None)


def _product_size(core: Tensor | None, left: Tensor, right: Tensor) -> Size:
    """Of left @ right, or of a Tucker decomposition: (i, rows) and (j, channels) around (i, j, *kernel)."""
    _check(left.ndim == right.ndim == 2, "its factors are no matrices")
    if core is None:
        ranks = (left.shape[1], len(right))
        _check(ranks[0] == ranks[1], f"its factors have ranks {ranks[0]} and {ranks[1]}")
        return Size(len(left), right.shape[1], len(right))
    _check(core.ndim >= 2 and tuple(core.shape[:2]) == (len(left), len(right)), "its core has another rank")
    return Size(left.shape[1], right.shape[1] * prod(core.shape[2:]), len(right))


def _needed(tensors: Tensors, name: str) -> Tensor:
    _check(name in tensors, f"it lacks {name}")
    return tensors[name]


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


KINDS = (
    Kind("LoRA", frozenset({"lora_down", "lora_up", "lora_mid"}), low_rank, _low_rank_size),
    Kind(
        "LoHa",
        frozenset(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        hadamard,
        _hadamard_size,
    ),
    Kind(
        "LoKr",
        frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "t1", "w2", "w2_a", "w2_b", "t2")),
        kronecker,
        _kronecker_size,
    ),
    Kind("difference", frozenset({"diff"}), difference, _difference_size),
)

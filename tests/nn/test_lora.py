"""Changes of weights against the formulas of their papers, element by element in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sfumato.nn.lora import (
    KINDS,
    Size,
    decomposed,
    hadamard,
    kind_of,
    kronecker,
    low_rank,
    magnitude_of,
)

R, OUT, IN = 2, 6, 4


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product from its definition."""
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64)
    for i, j, k in itertools.product(*map(range, (*total.shape, len(right)))):
        total[i, j] += left[i, k] * right[k, j]
    return total


def cores(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """A Tucker decomposition from its definition: sum over i, j of core[i, j] outputs[i, o] inputs[j, c]."""
    total = torch.zeros(outputs.shape[1], inputs.shape[1], *core.shape[2:], dtype=torch.float64)
    for i, j, o, c in itertools.product(*map(range, (*core.shape[:2], outputs.shape[1], inputs.shape[1]))):
        total[o, c] += core[i, j] * outputs[i, o] * inputs[j, c]
    return total


def test_low_rank_is_the_product_of_its_factors() -> None:
    """Hu et al. 2021, eq. 3: W + (alpha / r) B A."""
    up, down = drawn(OUT, R), drawn(R, IN)
    made = low_rank({"lora_up": up, "lora_down": down}, 0.5)
    close(made, 0.5 * product(up, down))


def test_low_rank_of_a_convolution_is_two_convolutions_in_turn() -> None:
    down, up, x = drawn(R, IN, 3, 3), drawn(OUT, R, 1, 1), drawn(1, IN, 5, 5)
    made = low_rank({"lora_up": up, "lora_down": down}, 1.0).reshape(OUT, IN, 3, 3)
    one = torch.nn.functional.conv2d(x, made, padding=1)
    two = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)
    close(one, two)


def test_a_decomposed_convolution_is_three_in_turn() -> None:
    """LoCon with a core: 1-wide, 3-wide, 1-wide."""
    down, mid, up, x = drawn(R, IN, 1, 1), drawn(3, R, 3, 3), drawn(OUT, 3, 1, 1), drawn(1, IN, 5, 5)
    tensors = {"lora_up": up, "lora_down": down, "lora_mid": mid}
    made = low_rank(tensors, 1.0).reshape(OUT, IN, 3, 3)
    convolve = torch.nn.functional.conv2d
    three = convolve(convolve(convolve(x, down), mid, padding=1), up)
    close(convolve(x, made, padding=1), three)
    assert KINDS[0].size(tensors) == Size(OUT, IN * 9, R)


def test_hadamard_product() -> None:
    """Hyeon-Woo et al. 2022, proposition 1: (X1 Y1^T) * (X2 Y2^T)."""
    w = {"hada_w1_a": drawn(OUT, R), "hada_w1_b": drawn(R, IN), "hada_w2_a": drawn(OUT, R, seed=9),
         "hada_w2_b": drawn(R, IN, seed=9)}  # fmt: skip
    first, second = product(w["hada_w1_a"], w["hada_w1_b"]), product(w["hada_w2_a"], w["hada_w2_b"])
    close(hadamard(w, 0.25), 0.25 * first * second)
    assert torch.equal(w["hada_w1_a"], drawn(OUT, R)), "the file's tensors stay"


def test_hadamard_product_of_kernels() -> None:
    """The same, proposition 3: each a Tucker decomposition."""
    w = {
        f"hada_{name}": drawn(*shape, seed=index)
        for index, (name, shape) in enumerate({
            "t1": (R, R, 3, 3), "w1_a": (R, OUT), "w1_b": (R, IN),
            "t2": (R, R, 3, 3), "w2_a": (R, OUT), "w2_b": (R, IN),
        }.items())
    }  # fmt: skip
    first, second = (cores(w[f"hada_t{i}"], w[f"hada_w{i}_a"], w[f"hada_w{i}_b"]) for i in (1, 2))
    close(hadamard(w, 2.0).reshape(OUT, IN, 3, 3), 2 * first * second)
    assert KINDS[1].size(w) == Size(OUT, IN * 9, R)


def blocks(left: Tensor, right: Tensor) -> Tensor:
    """A Kronecker product from its definition: the block at (i, j) is left[i, j] * right."""
    return torch.cat([torch.cat([number * right for number in row], dim=1) for row in left])


def test_kronecker_product_of_whole_and_of_low_rank() -> None:
    """Edalati et al. 2022, eq. 3; either factor may be a product."""
    whole, a, b = drawn(2, 2), drawn(3, R), drawn(R, 2)
    expected = blocks(whole, product(a, b))
    made = kronecker({"lokr_w1": whole, "lokr_w2_a": a, "lokr_w2_b": b}, 1.5)
    close(made, 1.5 * expected)
    other = kronecker({"lokr_w1_a": drawn(2, R), "lokr_w1_b": drawn(R, 2), "lokr_w2": drawn(3, 2)}, 1.0)
    close(other, blocks(product(drawn(2, R), drawn(R, 2)), drawn(3, 2)))


@pytest.mark.parametrize("core", [False, True])
def test_kronecker_product_of_kernels(core: bool) -> None:
    """At every place of the kernel the Kronecker product of the first factor and the second's slice."""
    first = drawn(2, 2)
    if core:
        w = {"lokr_t2": drawn(R, R, 3, 3), "lokr_w2_a": drawn(R, 3), "lokr_w2_b": drawn(R, 2, seed=4)}
        second = cores(w["lokr_t2"], w["lokr_w2_a"], w["lokr_w2_b"])
    else:
        w = {"lokr_w2": drawn(3, 2, 3, 3)}
        second = w["lokr_w2"]
    made = kronecker({"lokr_w1": first, **w}, 1.0).reshape(OUT, IN, 3, 3)
    for y, x in itertools.product(range(3), repeat=2):
        close(made[..., y, x], blocks(first, second[..., y, x]))
    assert KINDS[2].size({"lokr_w1": first, **w}) == Size(OUT, IN * 9, R if core else None)


@pytest.mark.parametrize("shape", [(OUT, IN), (OUT, IN, 3, 3)])
def test_decomposition_gives_every_output_its_magnitude(shape: tuple[int, ...]) -> None:
    """Liu et al. 2024, eq. 5, with the norm of each output's weights."""
    weight, change = drawn(*shape), drawn(*shape, seed=7)
    magnitude = drawn(OUT, 1).abs().reshape(OUT, *[1] * (len(shape) - 1))
    made = decomposed(weight, change, magnitude)
    for row in range(OUT):
        whole = weight[row] + change[row]
        expected = magnitude[row] * whole / whole.square().sum().sqrt()
        close(made[row], expected)


@pytest.mark.parametrize("shape", [(OUT, IN), (OUT, IN, 3, 3), (OUT, OUT)])
def test_decomposition_gives_every_input_its_magnitude(shape: tuple[int, ...]) -> None:
    weight, change = drawn(*shape), drawn(*shape, seed=7)
    magnitude = drawn(1, shape[1]).abs().reshape(1, shape[1], *[1] * (len(shape) - 2))
    made = decomposed(weight, change, magnitude)
    for column in range(shape[1]):
        whole = weight[:, column] + change[:, column]
        expected = magnitude[0, column] * whole / whole.square().sum().sqrt()
        close(made[:, column], expected)


def test_decomposition_of_nothing_is_finite() -> None:
    zeros = torch.zeros(3, 2)
    assert torch.equal(decomposed(zeros, zeros, torch.ones(3, 1)), zeros)


@pytest.mark.parametrize(
    ("given", "weight", "of_outputs", "expected"),
    [
        ((6, 1), (6, 4), False, (6, 1)),
        ((1, 4), (6, 4), False, (1, 4)),
        ((6,), (6, 4), False, (6, 1)),
        ((4,), (6, 4), False, (1, 4)),
        ((1, 4, 1, 1), (6, 4, 3, 3), False, (1, 4, 1, 1)),
        ((1, 6, 1, 1), (6, 4, 3, 3), True, (6, 1, 1, 1)),  # PEFT's convolutions
        ((1, 6), (6, 6), False, (1, 6)),
        ((6, 1), (6, 6), False, (6, 1)),
        ((1, 6), (6, 6), True, (6, 1)),
        ((6,), (6, 6), False, (6, 1)),
    ],
)
def test_magnitudes_say_whose_they_are_by_their_shape(
    given: tuple[int, ...], weight: tuple[int, ...], of_outputs: bool, expected: tuple[int, ...]
) -> None:
    assert tuple(magnitude_of(torch.ones(given), weight, of_outputs=of_outputs).shape) == expected


def test_magnitudes_of_another_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 1\).*another layer"):
        magnitude_of(torch.ones(5, 1), (6, 4), of_outputs=False)


SIZES = {  # tensors -> the size, or the reason why there is none
    "lora": ({"lora_up": (6, 2), "lora_down": (2, 4)}, Size(6, 4, 2)),
    "lora of a kernel": ({"lora_up": (6, 2, 1, 1), "lora_down": (2, 4, 3, 3)}, Size(6, 36, 2)),
    "lora, ranks": ({"lora_up": (6, 3), "lora_down": (2, 4)}, "ranks 2 and 3"),
    "lora, half": ({"lora_up": (6, 3)}, "lacks lora_down"),
    "lora, flat": ({"lora_up": (6,), "lora_down": (1, 4)}, "no matrices"),
    "mid": ({"lora_up": (6, 2), "lora_down": (2, 4), "lora_mid": (2, 3, 3, 3)}, "another rank"),
    "loha, half": ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4)}, "lacks hada_w2_a"),
    "loha, shapes": (
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
        "differ in shape",
    ),
    "lokr": ({"lokr_w1": (2, 2), "lokr_w2": (3, 2)}, Size(6, 4, None)),
    "lokr, first": ({"lokr_w1_a": (2, 5), "lokr_w1_b": (5, 2), "lokr_w2": (3, 2)}, Size(6, 4, 5)),
    "lokr, twice": ({"lokr_w1": (2, 2), "lokr_w1_a": (2, 2), "lokr_w2": (3, 2)}, "there twice"),
    "lokr, core": (
        {"lokr_w1": (2, 2), "lokr_t2": (2, 3, 3, 3), "lokr_w2_a": (3, 3), "lokr_w2_b": (2, 2)},
        "another rank",
    ),
    "diff": ({"diff": (6, 4, 3, 3)}, Size(6, 36, None)),
    "diff of a norm": ({"diff": (6,)}, Size(6, 1, None)),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_told_or_refused_by_shapes_alone(case: str) -> None:
    shapes, expected = SIZES[case]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = kind_of(frozenset(tensors))
    assert kind is not None
    if isinstance(expected, Size):
        assert kind.size(tensors) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            kind.size(tensors)


def test_a_mixture_is_of_no_kind() -> None:
    assert kind_of(frozenset({"lora_up", "hada_w1_a"})) is None
    assert kind_of(frozenset()) is None

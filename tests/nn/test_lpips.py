"""LPIPS against an implementation of its own formula, and distances in other features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from sfumato.nn.lpips import LPIPS, VGG16, feature_distance

SMALL = (4, 6, 0, 8, 8, 0, 5, 6, 7, 0, 8, 8, 8, 0, 8, 8, 9)


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(c, h, w) by a 3x3 kernel, padded with zeros, rectified."""
    windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
    return np.maximum(np.einsum("ihwkl,oikl->ohw", windows, weight) + bias[:, None, None], 0)


def by_hand(first: np.ndarray, second: np.ndarray, state: dict[str, np.ndarray]) -> float:
    """Zhang et al. 2018, eq. 1, in double precision, layer by layer by the indices of torchvision's VGG."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    both = [(x - shift[:, None, None]) / scale[:, None, None] for x in (first, second)]
    total = 0.0
    for tap, convolutions in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        if tap:
            both = [x.reshape(len(x), x.shape[1] // 2, 2, -1, 2).max(axis=(2, 4)) for x in both]
        for number in convolutions:
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            both = [convolved(x, weight, bias) for x in both]
        one, other = (x / (np.sqrt((x**2).sum(axis=0)) + 1e-10) for x in both)
        head = state[f"lin{tap}.model.1.weight"][0, :, 0, 0]
        total += (head[:, None, None] * (one - other) ** 2).sum(axis=0).mean()
    return float(total)


def pictures(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_lpips_is_the_formula_of_its_paper() -> None:
    torch.manual_seed(0)
    network = LPIPS(SMALL).eval()
    for name, value in network.state_dict().items():
        if name.startswith("lin"):
            value.abs_()
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    first, second = pictures(2, 32), pictures(2, 32).flip(0)
    wanted = [
        by_hand(a, b, state) for a, b in zip(first.double().numpy(), second.double().numpy(), strict=True)
    ]
    assert network(first, second).tolist() == pytest.approx(wanted, rel=1e-4)
    assert min(wanted) > 0.01
    assert network(first, first).tolist() == [0, 0]


def test_the_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LPIPS(VGG16).state_dict().items()}
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions in torchvision's vgg16
    assert {int(name.split(".")[1]) for name in shapes if name.startswith("features.")} == set(numbers)
    assert shapes["features.0.weight"] == (64, 3, 3, 3) and shapes["features.28.weight"] == (512, 512, 3, 3)
    assert [shapes[f"lin{i}.model.1.weight"] for i in range(5)] == [
        (1, width, 1, 1) for width in (64, 128, 256, 512, 512)
    ]
    assert len(shapes) == 2 * len(numbers) + 5


def test_equal_pictures_have_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    first = torch.zeros(1, 3, 16, 16, requires_grad=True)
    LPIPS(SMALL)(first, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert first.grad is not None and torch.equal(first.grad, torch.zeros_like(first))


def test_feature_distance_is_one_less_the_cosine() -> None:
    first, second = torch.tensor([[[3.0], [0.0]]]), torch.tensor([[[1.0], [1.0]]])  # (1, 2, 1)
    assert feature_distance([first], [second]).item() == pytest.approx(1 - 0.5**0.5)
    opposite = feature_distance([first, first], [first, -first])
    assert opposite.tolist() == pytest.approx([1.0])  # the mean of 0 and 2

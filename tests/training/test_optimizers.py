"""Optimizers step as their papers say, at the rates of the recipe, and go on from their saved state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TheirAdafactor

from sfumato.errors import InputError
from sfumato.training.eight_bit import BLOCK, SMALLEST, Adam8bit, dynamic_codes, quantised, restored
from sfumato.training.optimizers import KINDS, Adafactor, Lion, learning_rate, make_optimizers, set_rates
from sfumato.training.settings_loop import OptimizerConfig
from sfumato.training.snapshot import restore, tensors_of
from sfumato.training.state import State

RATES = {  # decay: rate at the start, in the warm-up, after it, at half, at nine tenths, at the end
    "constant": (1 / 101, 51 / 101, 1, 1, 1, 1),
    "cosine": (1 / 101, 0.9938 * 51 / 101, 0.9755, 0.5, 0.02447, 0),
    "linear": (1 / 101, 0.95 * 51 / 101, 0.9, 0.5, 0.1, 0),
    "trapezoid": (1 / 101, 51 / 101, 1, 1, 0.5, 0),
}


@pytest.mark.parametrize(("decay", "shares"), RATES.items(), ids=list(RATES))
def test_learning_rates(decay: Any, shares: tuple[float, ...]) -> None:
    config = OptimizerConfig(learning_rate=3e-4, warmup_images=100, decay=decay)
    rates = [learning_rate(config, seen, 1000) for seen in (0, 50, 100, 500, 900, 1000)]
    assert rates == pytest.approx([3e-4 * share for share in shares], rel=1e-3, abs=1e-12)
    assert learning_rate(OptimizerConfig(warmup_images=0, decay=decay), 0, 1000) == 1e-4
    assert learning_rate(config, 2000, 1000) == learning_rate(config, 1000, 1000)
    assert learning_rate(config, 500, 1000, 1e-5) == pytest.approx(learning_rate(config, 500, 1000) / 30)


STEP = """
import sys, torch
from sfumato.training.optimizers import KINDS, OptimizerConfig, set_rates
for name, kind in KINDS.items():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = kind([{"params": [weight], "lr": 0.1, "weight_decay": 0.1}], OptimizerConfig(name=name))
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert float(weight.sum()) != 16 and optimizer.state_dict()["state"] and weight.grad is None
assert "torch._dynamo" not in sys.modules
"""


def test_a_step_does_not_import_the_compiler() -> None:
    subprocess.run([sys.executable, "-c", STEP], check=True)


def test_networks_and_optimizers_have_rates_of_their_own() -> None:
    modules = {"unet": nn.Linear(2, 3), "text": nn.Linear(3, 1, bias=False), "critic": nn.Linear(1, 1)}
    parameters = {
        "denoiser": [*modules["unet"].parameters(), *modules["text"].parameters()],
        "critic": list(modules["critic"].parameters()),
    }
    config = OptimizerConfig(
        learning_rate=1e-3, learning_rates={"text": 1e-5, "critic": 2e-3}, warmup_images=0, decay="linear"
    )
    made = make_optimizers(config, parameters, modules)
    for optimizer in made.values():
        set_rates(config, optimizer, 50, 100)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for optimizer in made.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found[id(modules["unet"].weight)] == (5e-4, 0.01)
    assert found[id(modules["unet"].bias)] == (5e-4, 0.0)
    assert found[id(modules["text"].weight)] == (5e-6, 0.01)
    assert found[id(modules["critic"].weight)] == (1e-3, 0.01)
    assert len(found) == 5
    with pytest.raises(InputError, match=r"names 'texts', which .*\nDid you mean 'text'"):
        make_optimizers(OptimizerConfig(learning_rates={"texts": 1e-5}), parameters, modules)


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 1) for step in range(steps)]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int = 4) -> Tensor:
    for gradient in gradients(tuple(parameter.shape), steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def groups_of(parameter: nn.Parameter, rate: float = 0.01, decay: float = 0.1) -> list[dict[str, Any]]:
    return [{"params": [parameter], "lr": rate, "weight_decay": decay}]


def fresh(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shape", [(5, 7), (6,)])
def test_adafactor_equals_an_independent_one(shape: tuple[int, ...]) -> None:
    ours, theirs = fresh(*shape), fresh(*shape)
    stepped(Adafactor(groups_of(ours)), ours)
    reference = TheirAdafactor(
        [theirs], lr=0.01, weight_decay=0.1, relative_step=False, scale_parameter=False, warmup_init=False
    )
    stepped(reference, theirs)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_adafactor_keeps_a_row_and_a_column_of_a_kernel() -> None:
    kernel, matrix = fresh(6, 4, 3, 3), nn.Parameter(fresh(6, 4, 3, 3).detach().flatten(1))
    optimizer = Adafactor(groups_of(kernel))
    same = stepped(Adafactor(groups_of(matrix)), matrix)  # the draws of equal counts are equal
    assert torch.equal(stepped(optimizer, kernel).flatten(1), same)
    assert {name: tuple(value.shape) for name, value in optimizer.state[kernel].items()} == {
        "step": (), "exp_avg_sq_row": (6,), "exp_avg_sq_col": (36,),
    }  # fmt: skip


def test_lion_follows_its_algorithm() -> None:
    parameter, rate, decay = fresh(4, 3), 0.01, 0.1
    expected, moment = parameter.detach().clone().double(), torch.zeros(4, 3, dtype=torch.float64)
    for gradient in gradients((4, 3), 4):
        gradient = gradient.double()
        direction = torch.sign(0.9 * moment + 0.1 * gradient)
        expected -= rate * (direction + decay * expected)
        moment = 0.99 * moment + 0.01 * gradient
    stepped(Lion(groups_of(parameter, rate, decay), (0.9, 0.99)), parameter)
    assert torch.allclose(parameter.double(), expected, atol=1e-6)


def test_sgd_has_momentum_of_the_first_beta() -> None:
    parameter = fresh(2)
    start, (first, second) = parameter.detach().clone(), gradients((2,), 2)
    config = OptimizerConfig(name="sgd", betas=(0.5, 0.99))
    stepped(KINDS["sgd"](groups_of(parameter, 0.1, 0.0), config), parameter, 2)
    assert torch.allclose(parameter, start - 0.1 * (first + second + 0.5 * first), atol=1e-6)


def test_codes_are_256_and_fine_where_values_are_large() -> None:
    for signed in (True, False):
        codes = dynamic_codes(signed)
        assert len(codes) == 256 == len(codes.unique()) and codes[-1] == 1 and 0 in codes
        assert codes[0] == pytest.approx(-0.993, abs=1e-3) if signed else codes[0] == 0
        assert codes[codes > 0].min() < 1e-6
    values = torch.randn(10 * BLOCK + 7, generator=torch.Generator().manual_seed(0))
    values[:BLOCK] *= 1e4  # a loud block coarsens no other
    back = restored(*quantised(values, dynamic_codes(True)), dynamic_codes(True))
    assert float((back - values)[BLOCK:].abs().max()) < 0.03 * float(values[BLOCK:].abs().max())
    large = values.abs() > 1
    assert float(((back - values) / values)[large].abs().max()) < 0.09
    zeros = restored(*quantised(torch.zeros(300), dynamic_codes(False)), dynamic_codes(False))
    assert torch.equal(zeros, torch.zeros(300))


def test_eight_bits_step_nearly_as_thirty_two() -> None:
    one, other = fresh(SMALLEST), fresh(SMALLEST)
    optimizer = Adam8bit(groups_of(one), (0.9, 0.99), 1e-8)
    stepped(optimizer, one, 8)
    stepped(torch.optim.AdamW(groups_of(other), betas=(0.9, 0.99)), other, 8)
    moved = (other - fresh(SMALLEST)).detach()
    assert float((one - other).detach().norm() / moved.norm()) < 0.02
    bytes_kept = sum(value.nbytes for value in optimizer.state[one].values())
    assert bytes_kept < 2.1 * SMALLEST
    small, exact = fresh(100), fresh(100)
    stepped(Adam8bit(groups_of(small), (0.9, 0.99), 1e-8), small)
    stepped(torch.optim.AdamW(groups_of(exact), betas=(0.9, 0.99)), exact)
    assert torch.allclose(small, exact, atol=1e-6)


def test_eight_bits_leave_no_weight_without_a_second_moment() -> None:
    """A gradient 10,000 times smaller than its neighbours' steps no further than they do."""
    parameter = nn.Parameter(torch.zeros(SMALLEST))
    optimizer = Adam8bit(groups_of(parameter, 0.01, 0.0), (0.9, 0.99), 1e-12)
    for _ in range(5):
        parameter.grad = torch.where(torch.arange(SMALLEST) % 2 == 0, 1.0, 1e-4)
        optimizer.step()
    assert float(parameter.detach().abs().max()) < 0.06


@pytest.mark.parametrize("name", list(KINDS))
def test_a_loss_falls_and_a_restored_optimizer_goes_on_bit_by_bit(name: Any) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.0, warmup_images=0)
    wanted = torch.randn(70, 64, generator=torch.Generator().manual_seed(5))

    def begun() -> tuple[Mapping[str, nn.Module], dict[str, torch.optim.Optimizer]]:
        torch.manual_seed(0)
        modules = {"net": nn.Linear(64, 70)}
        return modules, make_optimizers(config, {"net": list(modules["net"].parameters())}, modules)

    def train(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (modules["net"](torch.eye(64)) - wanted.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    modules, made = begun()
    losses = train(modules, made["net"], 20)
    kept = {key: value.clone() for key, value in tensors_of(modules, {}, made).items()}
    assert losses[-1] < losses[0]
    train(modules, made["net"], 3)
    again, remade = begun()
    restore(State(20, {}, kept), again, {}, remade)
    train(again, remade["net"], 3)
    now, then = tensors_of(again, {}, remade), tensors_of(modules, {}, made)
    assert now.keys() == then.keys() and all(torch.equal(value, then[key]) for key, value in now.items())

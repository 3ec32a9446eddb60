"""Fine-tuning that is killed goes on bit by bit; what it does not train stays as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.checkpoints.files import read_tensors, sha256
from sfumato.checkpoints.load import load_file
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.loop import Task, train
from sfumato.training.run import make_task

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import BOTH, METHODS, tables, written

CPU = torch.device("cpu")
Made = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: written(folder, config) for name, config in BOTH.items()}


@pytest.fixture
def recipe(models: dict[str, Path], pictures: Path, tmp_path: Path) -> Made:
    """A function of (method, family, out, finetune keys, other tables) that gives a recipe."""

    def make(
        method: str, family: str = "sd1", out: str = "run", more: dict[str, Any] | None = None, **other: Any
    ) -> TrainingConfig:
        values = tables(
            models[family],
            tmp_path / out,
            pictures,
            **{**METHODS.get(method, {"method": method}), **(more or {})},
        )
        for name, table in other.items():
            values[name] = {**values[name], **table} if isinstance(table, dict) else table
        return TrainingConfig.model_validate(values)

    return make


def ran(config: TrainingConfig) -> tuple[FinetuneTask, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    task = make_task(config, CPU)
    assert isinstance(task, FinetuneTask)
    train(config, task, CPU, lambda line: lines.append(dict(line)))
    return task, lines


def state(config: TrainingConfig) -> dict[str, torch.Tensor]:
    newest = max((config.out / "states").glob("[0-9]*"))
    found: dict[str, torch.Tensor] = {}
    for path in newest.glob("*.safetensors"):
        found |= read_tensors(path)[0]
    return found


FAMILIES = [*((name, "sd1") for name in METHODS), ("lora", "sdxl"), ("textual_inversion", "sdxl")]


@pytest.mark.parametrize(("method", "family"), FAMILIES[:5])
def test_a_killed_run_goes_on_bit_by_bit(recipe: Made, method: str, family: str) -> None:
    short = {"images": 4, "batch": 2, "save_images": 2, "preview_images": 4}
    whole, parted = (recipe(method, family, out=name, loop=short) for name in ("whole", "parted"))
    task, _ = ran(whole)
    ran(parted.model_copy(update={"loop": parted.loop.model_copy(update={"images": 2})}))
    ran(parted)
    first, second = state(whole), state(parted)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = {name.split(".")[1] for name in first if name.startswith("module.")}
    assert names == set(task.modules)  # what is frozen is in no state


@pytest.mark.parametrize(("method", "family"), FAMILIES)
def test_what_is_not_trained_stays_byte_by_byte(
    recipe: Made, models: dict[str, Path], method: str, family: str
) -> None:
    before = sha256(models[family])
    task = make_task(recipe(method, family, more={"text": False}), CPU)
    assert isinstance(task, FinetuneTask)
    gradients(task)
    torch.optim.AdamW(task.method.parameters(), lr=0.1, weight_decay=0.1).step()
    task.method.write(task.config.out)
    assert sha256(models[family]) == before
    original = load_file(models[family], torch.float32)
    for part in original.modules:
        if method == "full" and part == "unet":
            continue
        own = task.model.part(part)
        assert own is not None
        plain = {name.replace(".layer.", "."): value for name, value in own.named_parameters()}
        for name, value in original.module(part).named_parameters():
            assert torch.equal(plain[name], value), (part, name)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(recipe: Made, method: str) -> None:
    more = {"lora": {"rank": 2, "dropout": 0.5, "text": True}} if method == "lora" else {}
    found = []
    for saving in (False, True):
        task = make_task(recipe(method, more=more, loop={"gradient_checkpointing": saving}), CPU)
        torch.manual_seed(1)  # dropout draws from it, as the loop lets it
        found.append(gradients(task))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 0
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def gradients(task: Task) -> dict[str, torch.Tensor]:
    """Of the first batch, by name."""
    named = {f"{part}.{n}": p for part, each in task.modules.items() for n, p in each.named_parameters()}
    for _, loss, _ in task.losses(next(task.batches(0, 2)), 0):
        loss.backward(inputs=list(named.values()))
    return {name: p.grad for name, p in named.items() if p.grad is not None}

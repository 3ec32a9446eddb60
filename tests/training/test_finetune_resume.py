"""Fine-tuning that is killed goes on bit by bit; what it does not train stays as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.load import load_file
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.loop import Task
from sfumato.training.run import make_task

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import METHODS, ran, state

CPU = torch.device("cpu")
Made = Callable[..., TrainingConfig]


FAMILIES = [*((name, "sd1") for name in METHODS), ("lora", "sdxl"), ("textual_inversion", "sdxl")]


@pytest.mark.parametrize(("method", "family"), FAMILIES[:5])
def test_a_killed_run_goes_on_bit_by_bit(finetune: Made, method: str, family: str) -> None:
    short = {"images": 4, "batch": 2, "save_images": 2, "preview_images": 4}
    whole, parted = (finetune(method, family, out=name, loop=short) for name in ("whole", "parted"))
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
    finetune: Made, finetune_bases: dict[str, Path], method: str, family: str
) -> None:
    before = sha256(finetune_bases[family])
    task = make_task(finetune(method, family, more={"text": False}), CPU)
    assert isinstance(task, FinetuneTask)
    gradients(task)
    torch.optim.AdamW(task.method.parameters(), lr=0.1, weight_decay=0.1).step()
    task.method.write(task.config.out)
    assert sha256(finetune_bases[family]) == before
    original = load_file(finetune_bases[family], torch.float32)
    for part in original.modules:
        if method == "full" and part == "unet":
            continue
        own = task.model.part(part)
        assert own is not None
        plain = {name.replace(".layer.", "."): value for name, value in own.named_parameters()}
        for name, value in original.module(part).named_parameters():
            assert torch.equal(plain[name], value), (part, name)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(finetune: Made, method: str) -> None:
    more = {"lora": {"rank": 2, "dropout": 0.5, "text": True}} if method == "lora" else {}
    found = []
    for saving in (False, True):
        task = make_task(finetune(method, more=more, loop={"gradient_checkpointing": saving}), CPU)
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

"""What a run will take: counted bytes are those of the run, and nothing of a plan stays."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfumato.cli import main
from sfumato.training import plan as planning
from sfumato.training.config import OptimizerConfig, TrainingConfig
from sfumato.training.optimizers import make_optimizers
from sfumato.training.plan import plan, state_bytes

FIRST_STAGE = """z_channels = 2
resolution = 8
ch = 8
ch_mult = [1, 2]
num_res_blocks = 1
embed_dim = 2
num_groups = 4
"""


def config(pictures: Path, out: Path, **loop: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({
        "task": "autoencoder", "out": out, "data": {"path": pictures, "size": 8},
        "first_stage": tomllib.loads(FIRST_STAGE),
        "loop": {"images": 1000, "batch": 8, **loop},
    })  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "adafactor", "lion", "sgd"])
def test_the_state_of_optimizers(name: Any) -> None:
    network = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Linear(64, 512))
    every = list(network.parameters())
    (optimizer,) = make_optimizers(OptimizerConfig(name=name), {"a": every}, {"a": network}).values()
    for parameter in every:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    kept = sum(
        value.numel() * value.element_size()
        for state in states for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )  # fmt: skip
    assert state_bytes(name, every) == pytest.approx(kept, rel=0.06)


def test_what_is_counted(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = plan(config(pictures, out))
    assert not out.exists() and found.trained == found.parameters > 1000
    assert found.weights == found.gradients == 4 * found.parameters
    assert found.optimizer == 8 * found.parameters and found.averages == 4 * found.parameters
    assert found.steps == 125 and found.seconds is not None and found.total == found.seconds * 125
    double = plan(config(pictures, out, batch=16))
    assert double.activations == pytest.approx(2 * found.activations, rel=0.1)
    assert plan(config(pictures, out, gradient_checkpointing=True)).activations < 0.6 * found.activations


def test_activations_are_what_the_backward_pass_keeps() -> None:
    """Two linear layers with a ReLU keep their inputs and what the ReLU gave."""

    class Task:
        def __init__(self) -> None:
            self.network = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 1))
            self.modules = {"network": self.network}

        def optimized(self) -> dict[str, list[nn.Parameter]]:
            return {"a": list(self.network.parameters())}

        def batches(self, seen: int, size: int) -> Any:
            while True:
                yield torch.randn(size, 100)

        def losses(self, batch: torch.Tensor, seen: int) -> Any:
            loss = self.network(batch).sum()
            yield "a", loss, {}

    loop = config(Path(), Path())
    kept = planning._activations(Task(), loop, torch.device("cpu"))  # type: ignore[arg-type]
    assert kept == (4 * (100 + 50), 0)


def test_what_does_not_fit_is_said(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'task = "autoencoder"\nout = "{tmp_path / "run"}"\n[data]\npath = "{pictures}"\nsize = 8\n'
        f"[loop]\nbatch = 8\n[first_stage]\n{FIRST_STAGE}"
    )
    assert main(["train", str(recipe), "--dry-run", "--loop.images=80"]) == 0
    out = capsys.readouterr().out
    assert "a step" in out and "for 10 steps" in out
    monkeypatch.setattr("sfumato.training.plan._available", lambda device: 1000)
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["train", str(tmp_path / "a.ini"), "--dry-run"]) == 2  # there is none

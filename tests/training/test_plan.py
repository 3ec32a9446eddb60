"""What a run will take: counted bytes are those of the run, and nothing of a plan stays."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import tomllib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.training import plan as planning
from sfumato.training.config import OptimizerConfig, TrainingConfig
from sfumato.training.data import Placed, open_dataset
from sfumato.training.optimizers import make_optimizers
from sfumato.training.plan import plan, state_bytes
from sfumato.training.run import make_task

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
    assert found.activations is not None and double.activations is not None
    assert double.activations == pytest.approx(2 * found.activations, rel=0.1)
    saving = plan(config(pictures, out, gradient_checkpointing=True))
    assert saving.activations is not None and saving.activations < 0.6 * found.activations


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


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are made while it lasts, the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("wide", [{"ch": 8}, {"ch": 48}])  # activations weigh most; weights do
def test_what_is_predicted_is_what_steps_take(pictures: Path, tmp_path: Path, wide: dict[str, int]) -> None:
    recipe = config(pictures, tmp_path / "run")
    assert recipe.first_stage is not None
    recipe = recipe.model_copy(update={"first_stage": dataclasses.replace(recipe.first_stage, **wide)})
    predicted = plan(recipe)
    task = make_task(recipe, torch.device("cpu"))
    parameters = task.optimized()
    with Peak() as peak:
        optimizers = make_optimizers(recipe.optimizer, parameters, task.modules)
        averages = planning.averages_of(task.modules, recipe.loop.half_lives)
        planning._timed(task, recipe, torch.device("cpu"), optimizers, averages)
    assert 0.85 < (peak.most + predicted.weights) / predicted.memory < 1.15


def test_class_pictures_are_neither_drawn_nor_counted(
    finetune: Callable[..., TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "dogs"
    prior = {"prompt": "a square", "path": own, "images": 10_000}
    found = plan(finetune("full", more={"prior": prior}))
    assert found.seconds is not None and not own.exists() and not (tmp_path / "run").exists()
    assert 0 < found.encoding < 60


def test_unreadable_pictures_are_replaced_by_others_of_the_few(
    finetune: Callable[..., TrainingConfig], pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    for number in range(8):
        shutil.copytree(pictures, folder / str(number))
    (folder / "0" / "0.png").write_bytes(b"no picture")
    found = plan(finetune("lora", data={"path": folder, "max_bad": 0.5}))
    assert found.seconds is not None
    shutil.copytree(pictures, folder / "last")
    data = {"path": folder, "max_bad": 0.5, "repeats": {"last": 2, **dict.fromkeys("01234567", 0)}}
    assert plan(finetune("lora", data=data)).seconds is not None  # none of the first ones is shown


def test_few_of_any_data_set_are_such_a_data_set(pictures: Path) -> None:
    class Plain:
        digest, order = "plain", range(3)

        def __len__(self) -> int:
            return 3

        def picture(self, index: int) -> Image.Image:
            return Image.new("RGB", (8, 8))

        def captions(self, index: int) -> list[str]:
            return [str(index)]

    few = planning._Few(Plain(), 2)
    assert not isinstance(few, Placed) and few.captions(0) == ["0", "1", "2"] and len(few) == 2
    few.picture(0)
    few.encoded({"encoded": 1, "images_per_second": 1.0, "seconds_left": 1.0})
    assert few.seconds > 0
    placed = planning._Few(open_dataset(pictures, (8, 8), 3, "train"), 2)
    assert isinstance(placed, Placed)
    for name in ("classes", "flip", "only", "shown", "label"):
        assert (
            inspect.getattr_static(placed, name, None) is not None
        )  # as isinstance asks from Python 3.12 on


def test_nothing_is_allocated_for_what_cannot_fit(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan(config(pictures, tmp_path / "run"))
    assert whole.activations is not None
    kept = whole.weights + whole.gradients + whole.optimizer + whole.averages
    monkeypatch.setattr(planning, "_available", lambda device: kept + 1)
    found = plan(config(pictures, tmp_path / "run"))
    assert found.activations == whole.activations and not found.fits and "a batch" in "".join(found.lines())
    monkeypatch.setattr(planning, "_available", lambda device: kept - 1)
    for name in ("_activations", "make_optimizers", "averages_of"):
        monkeypatch.setattr(planning, name, lambda *_: pytest.fail("it was allocated"))
    found = plan(config(pictures, tmp_path / "run"))
    assert found.activations is None and found.averages == whole.averages and not found.fits
    assert "this does not fit, with no picture yet" in "".join(found.lines())


def test_one_process_plans(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started"):
        plan(config(pictures, tmp_path / "run"))


def test_control_groups_count(tmp_path: Path) -> None:
    """Each group between this process and the top has a limit; version 1 lies beside version 2."""
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,memory:/job\n0::/a/b\n")
    inner, outer, old = (tmp_path / name for name in ("a/b", "a", "memory/job"))
    for folder, name, most, used, more in (
        (inner, ("memory.max", "memory.current"), "max", 5, ""),
        (outer, ("memory.max", "memory.current"), "1000", 300, "anon 1\ninactive_file 200\n"),
        (old, ("memory.limit_in_bytes", "memory.usage_in_bytes"), "700", 100, "total_inactive_file 50\n"),
    ):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name[0]).write_text(f"{most}\n")
        (folder / name[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(more)
    assert sorted(planning._left(tmp_path, own)) == [650, 900]
    assert list(planning._left(tmp_path, tmp_path / "none")) == []
    assert planning._available(torch.device("cpu")) > 0

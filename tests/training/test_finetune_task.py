"""Fine-tuning as runs: every method learns, resumes bit by bit, and leaves alone what it does not train."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sfumato
from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.load import load_file
from sfumato.errors import InputError
from sfumato.training.config import TrainingConfig
from sfumato.training.finetune import FinetuneTask
from sfumato.training.optimizers import make_optimizers
from sfumato.training.run import make_task

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import SD1, ran

CPU = torch.device("cpu")
Made = Callable[..., TrainingConfig]


@pytest.mark.parametrize(
    ("method", "rate", "left"),
    [("full", 1e-2, 0.5), ("lora", 2e-2, 0.5), ("textual_inversion", 0.3, 0.9), ("controlnet", 2e-2, 0.5)],
)
def test_every_method_overfits_one_batch(finetune: Made, method: str, rate: float, left: float) -> None:
    task = make_task(finetune(method), CPU)
    batches = task.batches(0, 2)
    batch = next(batches)
    batches.close()
    ((_, parameters),) = task.optimized().items()
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses: list[float] = []
    for _ in range(30):
        ((_, loss, _),) = task.losses(batch, 0)
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < left * losses[0]


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-2), ("lora", 2e-2)])
def test_a_thing_and_its_class_are_learned_together(
    finetune: Made, pictures: Path, method: str, rate: float
) -> None:
    more = {"prompt": "the pim", "prior": {"prompt": "a number", "path": pictures, "weight": 0.5}}
    task = make_task(finetune(method, more=more), CPU)
    batches = task.batches(0, 2)
    batch = next(batches)
    batches.close()
    ((_, parameters),) = task.optimized().items()
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses: dict[str, list[float]] = {"loss": [], "prior_loss": []}
    for _ in range(40):
        optimizer.zero_grad()
        for _, loss, told in task.losses(batch, 0):
            loss.backward(inputs=parameters)
            for name, value in told.items():
                losses[name].append(float(torch.as_tensor(value).detach()))
        optimizer.step()
    for name, each in losses.items():
        assert len(each) == 40 and min(each[-5:]) < 0.5 * each[0], name


def test_text_encoders_of_a_lora_learn_at_their_own_rate(finetune: Made) -> None:
    with pytest.raises(InputError, match=r"finetune\.text") as caught:
        make_task(finetune("lora", more={"text": True}), CPU)
    assert "finetune.lora.text" in caught.value.hint
    config = finetune("lora", "sdxl", optimizer={"learning_rates": {"text": 5e-5, "text2": 2e-5}})
    task = make_task(config, CPU)
    ((_, optimizer),) = make_optimizers(config.optimizer, task.optimized(), task.modules).items()
    rates = {p: group["rate"] for group in optimizer.param_groups for p in group["params"]}
    for part, rate in (("unet", 1e-3), ("text", 5e-5), ("text2", 2e-5)):
        own = list(task.modules[part].parameters())
        assert own and {rates[parameter] for parameter in own} == {rate}
    assert len(rates) == sum(p.numel() > 0 for p in task.optimized()["lora"])


def test_a_whole_model_is_written_and_its_other_parts_are_the_old_ones(
    finetune: Made, finetune_bases: dict[str, Path]
) -> None:
    config = finetune("full", more={"text": False}, notices="by nobody")
    task, _ = ran(config)
    assert task.written is not None and task.written == config.out / "model.safetensors"
    new, old = read_tensors(task.written)[0], read_tensors(finetune_bases["sd1"])[0]
    assert new.keys() == old.keys()
    changed = {name.split(".")[0] for name in new if not torch.equal(new[name], old[name])}
    assert changed == {"model"}
    model = sfumato.load(task.written, device="cpu")
    assert (model.name, model.config.notices) == ("tuned", "by nobody")
    assert sfumato.generate(model, sfumato.Request(prompt="a", seed=0)).images[0].size == (8, 8)


def test_class_pictures_are_drawn_once_and_their_loss_counts(finetune: Made) -> None:
    prior = {"prompt": "a number", "images": 5, "weight": 0.5}
    config = finetune("lora", more={"prompt": "a pim", "prior": prior})
    _, lines = ran(config)
    assert any("prior_loss" in line for line in lines)
    folder = config.out / "prior"
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(drawn) == 5
    (folder / "000002.png").unlink()
    make_task(config, CPU)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == drawn
    other = {**prior, "prompt": "something else"}
    with pytest.raises(InputError, match="drawn by another model"):
        make_task(finetune("lora", more={"prior": other}), CPU)


def test_given_class_pictures_are_taken_as_they_are(finetune: Made, pictures: Path, tmp_path: Path) -> None:
    prior = {"prompt": "a number", "path": pictures}
    config = finetune("full", more={"prior": prior})
    before = sorted(pictures.iterdir())
    task = make_task(config, CPU)
    assert sorted(pictures.iterdir()) == before
    assert isinstance(task, FinetuneTask) and task.prior is not None


def test_the_prior_is_a_second_loss_of_its_weight(finetune: Made, pictures: Path) -> None:
    prior = {"prompt": "a number", "path": pictures, "weight": 0.25}
    task = make_task(finetune("lora", more={"prior": prior}), CPU)
    batch = next(task.batches(0, 4))
    (_, first, shown), (_, second, told) = task.losses(batch, 0)
    assert first.detach().item() == pytest.approx(float(torch.as_tensor(shown["loss"]).detach()))
    assert second.detach().item() == pytest.approx(0.25 * float(torch.as_tensor(told["prior_loss"]).detach()))
    assert batch.prior is not None and batch.prior.order[0].seed != batch.pictures.order[0].seed


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "controlnet"])
def test_frozen_networks_in_half_the_memory(finetune: Made, method: str) -> None:
    exact, half = (
        make_task(finetune(method, out=kind, more={"frozen_precision": kind}), CPU)
        for kind in ("float32", "bfloat16")
    )
    assert isinstance(half, FinetuneTask) and half.model.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in half.method.parameters())
    found = []
    for task in (exact, half):
        ((_, loss, _),) = task.losses(next(task.batches(0, 4)), 0)
        loss.backward(inputs=task.optimized()[method])
        found.append(loss.detach().item())
    assert found[1] == pytest.approx(found[0], rel=0.1) and found[0] != found[1]


def test_the_schedule_and_the_prediction_are_the_models_own(finetune: Made) -> None:
    task = make_task(finetune("lora", "sdxl"), CPU)
    assert isinstance(task, FinetuneTask) and task.objective.prediction == "v"
    asked = make_task(finetune("lora", "sdxl", more={"prediction": "eps"}), CPU)
    assert isinstance(asked, FinetuneTask) and asked.objective.prediction == "eps"


@pytest.mark.parametrize(
    ("method", "more", "told"),
    [
        ("controlnet", {"control": None}, "finetune.control"),
        ("controlnet", {"control": {"preprocessor": "cany"}}, "cany"),
        ("controlnet", {"control": {"preprocessor": "canny", "widths": (4, 4, 4)}}, "widths"),
        ("textual_inversion", {"inversion": None}, "finetune.inversion"),
        (
            "textual_inversion",
            {"inversion": {"word": "pim", "templates": "captions"}},
            "do not hold the word",
        ),
        ("textual_inversion", {"inversion": {"word": "pim", "templates": ("no place",)}}, "no place"),
        ("textual_inversion", {"prior": {"prompt": "a"}}, "finetune.prior"),
        ("lora", {"timestep_range": (0, 5000)}, "timestep_range"),
    ],
)
def test_recipes_that_cannot_work_say_so(
    finetune: Made, method: str, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        make_task(finetune(method, more=more), CPU)


def test_pictures_of_another_size_or_colour(finetune: Made) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        make_task(finetune("lora", data={"size": 18}), CPU)
    with pytest.raises(InputError, match=r"data\.channels"):
        make_task(finetune("lora", data={"channels": 1}), CPU)


def test_the_digest_tells_of_pictures_and_model(finetune: Made, finetune_bases: dict[str, Path]) -> None:
    first = make_task(finetune("lora"), CPU).digest
    assert make_task(finetune("lora", out="again"), CPU).digest == first
    assert make_task(finetune("lora", "sdxl"), CPU).digest != first
    assert json.loads(load_file(finetune_bases["sd1"]).config.to_json())["name"] == SD1.name


def test_other_averages_are_written_beside_the_first(finetune: Made) -> None:
    for method, first in (("lora", "tuned"), ("textual_inversion", "embeddings/pim"), ("full", "model")):
        task = make_task(finetune(method, out=method), CPU)
        assert isinstance(task, FinetuneTask)
        out = task.config.out
        task.finish(out / "model.safetensors")
        task.finish(out / "model-ema-5.safetensors")
        assert task.written == out / f"{first}.safetensors"
        assert (out / f"{first}-ema-5.safetensors").is_file()

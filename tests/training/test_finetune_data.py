"""What fine-tuning makes of its pictures: sizes, hints, words and classes, and those that are damaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import InputError
from sfumato.training.config import TrainingConfig
from sfumato.training.data import Position, held_out
from sfumato.training.finetune import FinetuneTask
from sfumato.training.finetune.inversion import says, with_word_kept
from sfumato.training.run import make_task

sys.path.insert(0, str(Path(__file__).parent))
from finetune_models import METHODS, TOKENIZER, ran, state

CPU = torch.device("cpu")
Made = Callable[..., TrainingConfig]


def made(config: TrainingConfig) -> FinetuneTask:
    task = make_task(config, CPU)
    assert isinstance(task, FinetuneTask)
    return task


def folder(path: Path, count: int, caption: str = "") -> Path:
    """Pictures of a colour each, of which some belong to those held out."""
    path.mkdir()
    for index, colour in enumerate(np.random.default_rng(1).integers(0, 255, (count, 3), dtype=np.uint8)):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8) + colour).save(path / f"{index:02d}.png")
        if caption:
            (path / f"{index:02d}.txt").write_text(caption)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_previews_have_the_size_that_is_trained(finetune: Made, method: str, tmp_path: Path) -> None:
    for size in ((8, 16), (16, 16)) if method == "controlnet" else ((8, 16),):
        task = made(finetune(method, out=str(size), data={"size": size}))
        hints = None if task.hints is None else task.hints[1].of([Position(0, -1, 0, 0)])
        with torch.no_grad():
            assert task.method.draw(["a pim"], hints).shape == (1, 3, *size)
            task.preview(tmp_path / "sheet.png")


def test_class_pictures_are_drawn_in_the_size_that_is_trained(finetune: Made) -> None:
    prior = {"prompt": "a number", "images": 1}
    config = finetune("lora", more={"prior": prior}, data={"size": (8, 16)})
    made(config)
    assert Image.open(config.out / "prior" / "000000.png").size == (16, 8)


def test_a_damaged_hint_is_replaced_with_its_picture(finetune: Made, tmp_path: Path) -> None:
    """One that is met in training and one that was known before give the same weights."""
    pictures, hints = folder(tmp_path / "own", 16, "a square"), tmp_path / "hints"
    shutil.copytree(pictures, hints)
    bad = next(path.name for path in sorted(hints.iterdir())[6::2] if not held_out(path.name))
    (hints / bad).write_bytes(b"once upon a time")
    data = {"path": pictures, "conditions": hints, "max_bad": 0.5, "workers": 2}
    more = {"control": {"widths": (4, 8)}}
    met = finetune("controlnet", out="met", more=more, data=data)
    task = made(met)
    names = [path.name for path in task.dataset.paths]  # type: ignore[attr-defined]
    batches = task.batches(0, 4)
    for batch in islice(batches, 8):  # two epochs
        assert batch.pictures.hints is not None
        for place, hint in zip(batch.pictures.order, batch.pictures.hints, strict=True):
            assert names[place.index] != bad
            own = torch.tensor(np.asarray(Image.open(pictures / names[place.index]))[0, 0] / 255)
            assert torch.allclose(hint[:, 0, 0].double(), own, atol=1e-6)
    batches.close()
    shutil.rmtree(met.out)
    runs = []
    for name in ("met", "known"):
        config = finetune("controlnet", out=name, more=more, data=data, loop={"images": 16})
        if runs:
            listed = (met.out / "quarantine.jsonl").read_text()
            assert bad in listed and listed.count("\n") == 1
            config.out.mkdir()
            (config.out / "quarantine.jsonl").write_text(listed)
        torch.manual_seed(config.seed)  # as `run` does, before the first layers of the hints are made
        ran(config)
        runs.append(config)
    a, b = map(state, runs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_chance_leaves_out_no_word_that_is_trained(finetune: Made, tmp_path: Path) -> None:
    pictures = folder(tmp_path / "own", 4, "blue, pim, square")
    inversion = {"word": "pim", "templates": "captions"}
    tags = {"path": pictures, "captions": {"tag_dropout": 0.9}}
    none = {"path": pictures}
    for name, data, dropout in (("tags", tags, 0.0), ("none", none, 1.0)):
        more = {"inversion": inversion, "caption_dropout": dropout}
        task = made(finetune("textual_inversion", out=name, more=more, data=data))
        said = [task._caption(Position(0, 0, place, 0)) for place in range(20)]
        assert all(text and says(TOKENIZER, "pim", text) for text in said)
        assert (len(set(said)) == 1) == (name == "none")
        for batch in islice(task.batches(0, 1), 3):
            ((_, loss, _),) = task.losses(batch, 0)
            loss.backward(inputs=task.method.parameters())


def test_a_word_is_told_whole() -> None:
    assert says(TOKENIZER, "pim", "a Pim, blue") and says(TOKENIZER, "pim", "(pim)")
    assert not says(TOKENIZER, "pim", "pimples") and not says(TOKENIZER, "pim", "")
    assert with_word_kept("a pim", "pim", ",", TOKENIZER) == "a pim"
    assert with_word_kept("pimples, red", "pim", ", ", TOKENIZER) == "pim, pimples, red"
    assert with_word_kept(None, "pim", ",", TOKENIZER) == with_word_kept("", "pim", ",", TOKENIZER) == "pim"


@pytest.mark.parametrize(
    ("more", "data", "told"),
    [
        ({"prompt": "a square"}, {}, "prompt"),
        ({"inversion": {"word": "pim", "templates": "captions"}}, {}, "pimples"),
        ({"inversion": {"word": "pim", "templates": ("a {}ple",)}}, {}, "a pimple"),
        (
            {"inversion": {"word": "pim", "templates": "captions"}},
            {"captions": {"prefix": "pim ", "templates": ("of {}",), "suffix": "", "word": "cat"}},
            None,
        ),
    ],
)
def test_data_that_never_say_the_word(
    finetune: Made, tmp_path: Path, more: dict[str, Any], data: dict[str, Any], told: str | None
) -> None:
    data["path"] = folder(tmp_path / "own", 4, "with pimples")
    config = finetune("textual_inversion", more=more, data=data)
    if told is None:
        made(config)
        return
    with pytest.raises(InputError, match=told) as caught:
        made(config)
    assert "pim" in caught.value.message and caught.value.hint


def test_all_class_pictures_are_shown_and_damaged_ones_replaced(finetune: Made, tmp_path: Path) -> None:
    theirs = folder(tmp_path / "class", 40)
    assert any(held_out(path.name) for path in theirs.iterdir())
    (theirs / "05.png").write_bytes(b"once upon a time")
    prior = {"prompt": "a number", "path": theirs}
    config = finetune("lora", more={"prior": prior}, data={"max_bad": 0.1}, loop={"images": 40})
    task, lines = ran(config)
    assert any("prior_loss" in line for line in lines)
    assert task.prior is not None and len(task.prior[0]) == 40
    batches = task.batches(0, 40)
    batch = next(batches)
    batches.close()
    assert batch.prior is not None
    assert {place.index for place in batch.prior.order} == set(range(40)) - {5}
    assert "05.png" in (config.out / "quarantine-prior.jsonl").read_text()
    assert "05.png" not in "".join(path.read_text() for path in config.out.glob("quarantine.jsonl"))


def test_class_pictures_among_the_data(finetune: Made, tmp_path: Path) -> None:
    theirs = folder(tmp_path / "class", 10)
    data = {"folders": [{"path": theirs, "prior": True}]}
    more = {"prompt": "a pim", "prior": {"prompt": "a number", "weight": 0.25}}
    task = made(finetune("full", more=more, data=data))
    assert task.prior is None and not (task.config.out / "prior").exists()  # none is drawn
    batch = next(task.batches(0, 8))
    places = batch.pictures.order
    of_class = torch.tensor([task._of_class(task.dataset, place) for place in places])
    assert of_class.any() and not of_class.all()
    captions = [task._caption(place) for place in places]
    assert captions == ["a number" if each else "a pim" for each in of_class]
    ((_, loss, told),) = task.losses(batch, 0)
    each = task._losses(batch.pictures, captions).detach()
    wanted = (each[~of_class].sum() + 0.25 * each[of_class].sum()) / 8
    assert loss.detach().item() == pytest.approx(float(wanted))
    share = 10 / len(task.dataset.order)
    assert torch.as_tensor(told["prior_loss"]).item() == pytest.approx(
        float(each[of_class].sum() / 8 / share)
    )
    assert torch.as_tensor(told["loss"]).item() == pytest.approx(
        float(each[~of_class].sum() / 8 / (1 - share))
    )
    # Without a table they count as the others do; where they are no use, it is said.
    plain = made(finetune("lora", out="plain", data=data))
    ((_, loss, _),) = plain.losses(batch, 0)
    captions = [plain._caption(place) for place in places]
    each = plain._losses(batch.pictures, captions).detach()
    assert loss.detach().item() == pytest.approx(float(each.mean()))
    with pytest.raises(InputError, match=r"data\.folders"):
        made(finetune("textual_inversion", out="word", data=data))


@torch.no_grad()
def test_held_out_scores_by_timestep(finetune: Made) -> None:
    task = made(finetune("lora"))
    scores = task.evaluate()
    assert scores.keys() == {"held_out_loss", *(f"held_out_loss_{part}" for part in range(4))}
    assert task.evaluate() == scores
    early = made(finetune("lora", out="early", more={"timestep_range": (0, 249)})).evaluate()
    assert early.keys() == {"held_out_loss", "held_out_loss_0"}
    assert early["held_out_loss"] == early["held_out_loss_0"]


def test_a_control_network_in_buckets_runs_to_its_end(finetune: Made, tmp_path: Path) -> None:
    pictures = folder(tmp_path / "own", 12, "a square")
    for index, path in enumerate(sorted(pictures.glob("*.png"))):
        Image.open(path).resize((16, 16) if index % 2 else (8, 24)).save(path)
    config = finetune(
        "controlnet",
        data={"path": pictures, "size": 16, "buckets": {"min": 8, "max": 32, "step": 8, "rarest": 1}},
        loop={"batch": 2},
    )
    task, lines = ran(config)
    assert any("held_out_loss" in line for line in lines)
    assert {shown.pictures.clean.shape[2:] for shown in islice(task.batches(0, 2), 4)} > {(8, 8)}
    assert list((config.out / "previews").iterdir())

"""The classifier task: which picture is of which class, that it learns, and that it steers a denoiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.checkpoints.classifier import CLASSIFIER_KEY, load_classifier
from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.data.shapes import write_shapes
from sfumato.diffusion.classifier import ClassProbability, classifier_guided
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import CheckpointError, DataError, InputError
from sfumato.training.config import TrainingConfig
from sfumato.training.data import open_dataset, to_tensor
from sfumato.training.run import make_task
from sfumato.training.tasks.classifier import ClassifierTask, labelled

CPU = torch.device("cpu")
CLASSES = ("red", "blue")
ENCODER = {
    "in_channels": 3, "out_channels": 2, "model_channels": 8, "num_res_blocks": 1, "channel_mult": [1, 2],
    "attention_resolutions": [], "num_head_channels": 8, "num_groups": 4, "use_scale_shift_norm": True,
}  # fmt: skip
LOOP = {
    "images": 1920, "batch": 16, "ema_images": 100, "log_images": 960, "save_images": 960,
    "preview_images": 1920,
}  # fmt: skip
OPTIMIZER = {"learning_rate": 8e-3, "warmup_images": 160, "decay": "cosine"}
Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 coloured shapes of 8 pixels."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, size=8)
    return folder


@pytest.fixture(scope="session")
def colours(recipe: Recipe, shapes: Path) -> Recipe:
    """A function of (out, tables that differ) that gives a recipe: red or blue?"""

    def make(out: Path, **changes: Any) -> TrainingConfig:
        tables: dict[str, Any] = {
            "data": {"path": shapes, "workers": 0}, "classifier": {"classes": CLASSES}, "unet": ENCODER,
        }  # fmt: skip
        for name, values in changes.items():
            tables[name] = {**tables.get(name, {}), **values} if isinstance(values, dict) else values
        return recipe("classifier", out, **tables)

    return make


@pytest.fixture(scope="session")
def run(colours: Recipe, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    config = colours(tmp_path_factory.mktemp("run") / "run", loop=LOOP, optimizer=OPTIMIZER, notices="mine")
    return trained(config).parent


def red_and_blue(shapes: Path) -> tuple[Tensor, Tensor]:
    """The red and blue pictures and their classes."""
    dataset = open_dataset(shapes, (8, 8), 3, "train")
    labels = labelled(dataset, CLASSES)
    return torch.stack([to_tensor(dataset.picture(i)) for i in labels]), torch.tensor(list(labels.values()))


def test_it_learns_what_little_noise_leaves(run: Path, shapes: Path) -> None:
    loaded = load_classifier(run / "model.safetensors")
    clean, labels = red_and_blue(shapes)
    schedule, accuracy = Schedule(loaded.description.schedule), []
    for t in (100, 999):
        time = torch.full((len(clean),), t)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        logits = loaded.network(schedule.add_noise(clean, noise, time), time.float())
        accuracy.append(float((logits.argmax(dim=1) == labels).float().mean()))
    assert accuracy[0] > 0.95 and accuracy[1] < 0.8, "of two classes"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "held_out_accuracy" in line]
    assert scores[-1]["held_out_accuracy_0"] > 0.9 and scores[-1]["held_out_loss"] < 0.7
    assert [line["accuracy"] for line in lines if "accuracy" in line][-1] > 0.6


def test_it_steers_a_denoiser_that_knows_no_classes(run: Path, shapes: Path) -> None:
    """The denoiser is the ideal one of all pictures: their mean, weighted by how near each is."""
    loaded = load_classifier(run / "model.safetensors")
    clean, labels = red_and_blue(shapes)
    rows = clean.flatten(1)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        weights = (-(torch.cdist(x.flatten(1), rows) ** 2) / (2 * sigma**2)).softmax(dim=1)
        return (weights @ rows).reshape(x.shape)

    schedule, count = Schedule(loaded.description.schedule), 32
    sigmas = [5 * (0.05 / 5) ** (i / 20) for i in range(20)] + [0.0]
    shares = []
    for scale, name in ((0.0, "blue"), (30.0, "blue"), (30.0, "red")):
        wanted = torch.full((count,), loaded.description.label(name))
        probability = ClassProbability(loaded.network, schedule, wanted)
        steered = classifier_guided(Unguided(denoise), probability, scale)
        noise = ImageNoise(range(count), (3, 8, 8), device=CPU)
        *_, last = SAMPLERS["euler_a"](steered, noise.initial() * sigmas[0], sigmas, noise)
        found = labels[torch.cdist(last.x.flatten(1), rows).argmin(dim=1)]
        shares.append(float((found == loaded.description.label("blue")).float().mean()))
    unsteered, to_blue, to_red = shares
    assert 0.2 < unsteered < 0.8 and to_blue > 0.85 and to_red < 0.15


def test_the_file_says_what_it_is(run: Path) -> None:
    loaded = load_classifier(run / "model.safetensors", CPU)
    description = loaded.description
    assert description.classes == CLASSES and description.label("blue") == 1
    assert description.image_size == description.size == (8, 8) and description.pool == "attention"
    assert description.first_stage is None and description.notices == "mine"
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())
    with pytest.raises(InputError, match="no class 'blu'\nDid you mean 'blue'"):
        description.label("blu")
    sheet = Image.open(max((run / "previews").glob("*.png")), formats=["PNG"])
    assert sheet.size == (12 * 10, 2 * 10)


def edited(text: str) -> Callable[[str], str]:
    """The description with keys of other values, or without them (null)."""

    def edit(description: str) -> str:
        return json.dumps({**json.loads(description), **json.loads(text)})

    return edit


DAMAGED: dict[str, tuple[Callable[[str], str], str]] = {
    "no JSON": (lambda text: text[:-1], "description in .* is damaged"),
    "no table": (lambda text: "[]", "no table"),
    "another version": (edited('{"version": 2}'), "format 2, this program reads 1"),
    "an unknown key": (edited('{"colour": 1}'), "unknown key 'colour'"),
    "a huge number": (edited('{"schedule": {"num_timesteps": 1e12}}'), "holds the number"),
    "no number": (lambda text: text.replace('"version": 1', '"version": NaN'), "format nan, this program"),
    "other classes": (edited('{"classes": ["a", "b", "c"]}'), "there are 3 classes"),
    "another size": (edited('{"size": [16, 16]}'), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_description(run: Path, tmp_path: Path, edit: Callable[[str], str], message: str) -> None:
    tensors, metadata = read_tensors(run / "model.safetensors")
    path = tmp_path / "edited.safetensors"
    write_tensors(path, tensors, {CLASSIFIER_KEY: edit(metadata[CLASSIFIER_KEY])})
    with pytest.raises(CheckpointError, match=message):
        load_classifier(path)


def test_a_description_of_more_than_the_file_holds(run: Path, tmp_path: Path) -> None:
    tensors, metadata = read_tensors(run / "model.safetensors")
    values = json.loads(metadata[CLASSIFIER_KEY])
    values["encoder"]["num_res_blocks"] = 1_000_000
    write_tensors(tmp_path / "a.safetensors", tensors, {CLASSIFIER_KEY: json.dumps(values)})
    with pytest.raises(CheckpointError, match="more layers than it holds"):
        load_classifier(tmp_path / "a.safetensors")


def test_files_of_something_else(run: Path, first_stage: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no classifier"):
        load_classifier(first_stage / "model.safetensors")
    tensors, metadata = read_tensors(run / "model.safetensors")
    tensors["out.0.bias"] = tensors["out.0.bias"] * torch.inf
    write_tensors(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=r"out.0.bias holds values that are not finite"):
        load_classifier(tmp_path / "a.safetensors")


def test_on_latents_and_resumed(colours: Recipe, first_stage: Path, trained: Trained, tmp_path: Path) -> None:
    """In latents of an autoencoder; killed after half of its images, it ends with the same bytes."""
    tables: dict[str, Any] = {
        "classifier": {"autoencoder": first_stage / "model.safetensors", "pool": "mean"},
        "unet": {"in_channels": 2},
    }
    whole = trained(colours(tmp_path / "whole", **tables))
    trained(colours(tmp_path / "parts", **tables, loop={"images": 16}))
    parts = trained(colours(tmp_path / "parts", **tables))
    assert whole.read_bytes() == parts.read_bytes()
    loaded = load_classifier(whole)
    assert loaded.description.first_stage is not None and loaded.description.size is None
    assert loaded.network(torch.zeros(1, 2, 4, 4), torch.zeros(1)).shape == (1, 2)
    assert (tmp_path / "whole" / "latents-train.safetensors").exists()


class Captioned:
    """A data set of captions alone."""

    digest = ""

    def __init__(self, *texts: str) -> None:
        self.texts, self.order = texts, range(len(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8))

    def captions(self, index: int) -> list[str]:
        return [self.texts[index], "another caption: a dog"] if self.texts[index] else []


def test_a_caption_names_its_class() -> None:
    dataset = Captioned("a cat", "A Dog on a mat", "a cat and a dog", "cattle", "", "hot dog", "dog!")
    assert labelled(dataset, ("cat", "dog")) == {0: 0, 1: 1, 5: 1, 6: 1}
    assert labelled(dataset, ("dog", "hot dog")) == {1: 0, 2: 0, 5: 1, 6: 0}, "its whole caption"
    assert labelled(dataset, ("c.t",)) == {}


def test_without_classes_every_caption_is_one(colours: Recipe, pictures: Path, tmp_path: Path) -> None:
    config = colours(
        tmp_path / "run", data={"path": pictures}, classifier={"classes": ()}, unet={"out_channels": 3}
    )
    task = make_task(config, CPU)
    assert isinstance(task, ClassifierTask)
    assert task.description.classes == tuple(f"a square number {number}" for number in range(3))


def test_only_pictures_of_a_class_are_shown(colours: Recipe, tmp_path: Path) -> None:
    task = make_task(colours(tmp_path / "run"), CPU)
    assert isinstance(task, ClassifierTask)
    batches = task.batches(0, 40)
    order, clean = next(batches)
    batches.close()
    captions = [task.dataset.captions(place.index)[0] for place in order]
    assert clean.shape == (40, 3, 8, 8) and all("red" in text or "blue" in text for text in captions)
    assert [task.labels[place.index] for place in order] == [int("blue" in text) for text in captions]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no network": ({"unet": None}, InputError, r"needs a \[unet\] table"),
    "other classes": ({"unet": {"out_channels": 3}}, InputError, "out_channels is 3, and there are 2"),
    "one class": ({"classifier": {"classes": ["red"]}}, InputError, "the classes are red"),
    "a class twice": ({"classifier": {"classes": ["red", "red"]}}, DataError, "class 'red' alone"),
    "an empty class": ({"classifier": {"classes": ["red", "pink"]}}, DataError, "of the class 'pink' alone"),
    "channels": ({"unet": {"in_channels": 4}}, InputError, "in_channels 4; the samples need 2 and 3"),
    "an odd size": ({"data": {"size": 9}}, InputError, r"size \(9, 9\); this network takes multiples of 2"),
    "a context": (
        {"unet": {"use_spatial_transformer": True, "context_dim": 8}}, InputError, "context_dim=8",
    ),
    "checkpointing": ({"loop": {"gradient_checkpointing": True}}, InputError, "no gradient_checkpointing"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG.values(), ids=list(WRONG))
def test_a_recipe_that_does_not_fit(
    colours: Recipe, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make_task(colours(tmp_path / "run", **changes), CPU)

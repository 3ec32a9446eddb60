"""CLIP's two towers: they learn, equal captions are no wrong answers, and their file gives both back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional as F

import sfumato
from sfumato.checkpoints.clip import (
    CLIP_KEY,
    is_clip,
    load_clip,
    load_image_tower,
    load_text_tower,
    save_clip,
)
from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.errors import CheckpointError, DataError, InputError, NumericalError
from sfumato.nn.clip_vision import CLIPVisionEncoder
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import Position, open_dataset
from sfumato.training.loop import train
from sfumato.training.tasks.clip import CLIPTask, contrast, gathered

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[2] / "configs" / "illustrations-clip.toml"
TOWERS: dict[str, Any] = {
    "clip": {
        "vision": {
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 4,
        },
        "embed_dim": 4, "vocabulary": 520,
    },
    "text": {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "vocab_size": 600, "eos_token_id": 1,
    },
}  # fmt: skip
Recipe = Callable[..., TrainingConfig]


def made(config: TrainingConfig) -> CLIPTask:
    data = config.data
    torch.manual_seed(config.seed)
    sets = [open_dataset(data.path, data.shape, data.channels, split) for split in ("train", "test")]
    return CLIPTask(config, sets[0], sets[1], CPU)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of a run of eight steps."""
    out = tmp_path_factory.mktemp("clip") / "run"
    return trained(recipe("clip", out, **TOWERS), [])


def trained(config: TrainingConfig, lines: list[dict[str, Any]]) -> Path:
    return train(config, made(config), CPU, lambda line: lines.append(dict(line)))


# The loss


def test_the_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2))
    loss, _ = contrast(images, texts, torch.tensor(10.0), torch.eye(5, dtype=torch.bool))
    logits, labels = 10 * images @ texts.T, torch.arange(5)  # figure 3 of the paper
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


def test_equal_captions_are_right_answers_too() -> None:
    images = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    right = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    loss, accuracy = contrast(images, images, torch.tensor(100.0), right)
    assert float(loss) == pytest.approx(2 / 3 * math.log(2), rel=1e-4)  # two candidates are as good
    assert float(accuracy) == 1.0
    strict, _ = contrast(images, images, torch.tensor(100.0), torch.eye(3, dtype=torch.bool))
    assert float(strict) == pytest.approx(float(loss), rel=1e-4)
    images[1] = torch.tensor([0.0, 1.0])
    assert float(contrast(images, images.flip(0), torch.tensor(1.0), right)[1]) < 1.0


def test_the_captions_of_a_batch_that_belong_to_a_picture(recipe: Recipe, tmp_path: Path) -> None:
    task = made(recipe("clip", tmp_path, **TOWERS))
    captions = [task.dataset.captions(index)[0] for index in range(len(task.dataset))]
    indices = list(range(len(captions)))
    right = task._right(indices, [task.numbers[caption] for caption in captions])
    assert right.tolist() == [[a == b for b in captions] for a in captions]
    assert right.sum() > len(captions), "the pictures of the tests share captions"


def test_the_scale_never_exceeds_a_hundred(recipe: Recipe, tmp_path: Path) -> None:
    task = made(recipe("clip", tmp_path, **TOWERS))
    assert float(task.temperature().detach()) == pytest.approx(1 / 0.07)
    task.temperature.log_scale.data.fill_(9.0)
    scale = task.temperature()
    scale.backward()
    assert float(scale.detach()) == pytest.approx(100)
    assert task.temperature.log_scale.grad is not None and float(task.temperature.log_scale.grad) > 0


# What is seen


def test_captions_are_varied_as_the_recipe_says(recipe: Recipe, tmp_path: Path) -> None:
    rules = {"templates": ("a photo of {}", "a drawing of {}"), "prefix": "<", "suffix": ">"}
    task = made(recipe("clip", tmp_path, **TOWERS, data={"captions": rules}))
    said = set()
    for number in range(40):
        place = Position(3, 0, number, number % len(task.dataset))
        own = task.dataset.captions(place.index)[0]
        taken, text = task._caption(place)
        assert task.captions[taken] == own and text in (f"<a photo of {own}>", f"<a drawing of {own}>")
        said.add(text.split()[1])
    assert said == {"photo", "drawing"}
    read: list[Sequence[str]] = []
    vectors = task._text_vectors

    def watching(captions: Sequence[str]) -> Tensor:
        read.append(captions)
        return vectors(captions)

    task._text_vectors = watching  # type: ignore[method-assign]
    with closing(task.batches(0, 4)) as source:
        places, _ = batch = next(source)
    list(task.losses(batch, 0))
    assert list(read[0]) == [task._caption(place)[1] for place in places]
    read.clear()
    with torch.no_grad():
        task.evaluate()
    assert read and all(text.startswith("<a photo of ") for captions in read for text in captions)


def test_chance_depends_on_the_place_alone(recipe: Recipe, tmp_path: Path) -> None:
    task = made(recipe("clip", tmp_path, **{**TOWERS, "clip": {**TOWERS["clip"], "crop": 0.5, "flip": True}}))
    picture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    places = [Position(3, 0, place, 0) for place in range(12)]
    first = [task._augmented(picture, place) for place in places]
    assert all(torch.equal(a, task._augmented(picture, p)) for a, p in zip(first, places, strict=True))
    assert len({float(each.sum()) for each in first}) > 6 and first[0].shape == picture.shape
    whole = made(recipe("clip", tmp_path, **{**TOWERS, "clip": {**TOWERS["clip"], "crop": 1.0}}))
    assert torch.equal(whole._augmented(picture, places[0]), picture)


def test_a_batch_is_learned_by_heart(recipe: Recipe, tmp_path: Path) -> None:
    vision = {**TOWERS["clip"]["vision"], "hidden_size": 16}
    options = {**TOWERS["clip"], "vision": vision, "embed_dim": 8, "crop": 1.0, "temperature": 0.3}
    task = made(recipe("clip", tmp_path, clip=options, text={**TOWERS["text"], "hidden_size": 16}))
    batches = task.batches(0, 8)
    batch = next(batches)
    batches.close()
    optimizer = torch.optim.Adam(task.optimized()["clip"], lr=1e-2)
    losses = []
    for _ in range(35):
        ((_, loss, _),) = task.losses(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    chosen = [task._caption(place)[0] for place in batch[0]]
    right = task._right([place.index for place in batch[0]], chosen).float()
    least = (right / right.sum(dim=1, keepdim=True)).clamp_min(1e-9)  # entropy of the shared captions
    floor = float(-(least * least.log()).sum(dim=1).mean())
    assert losses[-1] - floor < 0.3 * (losses[0] - floor)


def test_pictures_without_captions(tmp_path: Path, recipe: Recipe, pictures: Path) -> None:
    for file in pictures.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match=r"no picture in .* has a caption"):
        made(recipe("clip", tmp_path / "run", **TOWERS, data={"path": tmp_path}))
    (tmp_path / "3.txt").write_text("a square")
    task = made(recipe("clip", tmp_path / "run", **TOWERS, data={"path": tmp_path}))
    assert len(task.order) <= 1 or task.order == [3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": None}, r"\[text\] table"),
        ({"data": {"size": 10}}, r"Set data.size = 8"),
        ({"data": {"size": (8, 4)}}, "takes squares"),
        ({"loop": {"gradient_checkpointing": True}}, "gradient_checkpointing"),
        ({"data": {"buckets": True}}, "Leave out data.buckets"),
        ({"data": {"masks": "masks"}}, "data.masks is masks"),
        ({"data": {"captions": {"templates": ("a {}",), "word": "<cat>"}}}, "captions.word is '<cat>'"),
    ],
)
def test_recipes_that_do_not_fit(recipe: Recipe, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(recipe("clip", tmp_path, **{**TOWERS, **changes}))


# The run and its file


def test_a_run_scores_writes_sheets_and_resumes(recipe: Recipe, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    whole = trained(recipe("clip", tmp_path / "a", **TOWERS), lines)
    scores = [line for line in lines if "held_out_loss" in line]
    assert {"held_out_caption_found", "held_out_picture_found", "held_out_candidates"} <= scores[-1].keys()
    assert 1 <= scores[-1]["held_out_candidates"] <= 64
    assert len(list((tmp_path / "a" / "previews").glob("*.png"))) == 2
    assert is_clip(whole)
    half = recipe("clip", tmp_path / "b", **{**TOWERS, "optimizer": {"decay": "constant"}})
    shorter = half.model_copy(update={"loop": half.loop.model_copy(update={"images": 16})})
    trained(shorter, [])
    straight = half.model_copy(update={"out": tmp_path / "c"})
    first, second = (read_tensors(trained(each, []))[0] for each in (half, straight))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_file_gives_both_towers_back(finished: Path) -> None:
    loaded = load_clip(finished)
    text, image = load_text_tower(finished), load_image_tower(finished)
    assert text.config.projection_dim is None and text.encoder.config == text.config
    tokens = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(text.encoder(tokens).last_hidden_state, loaded.text(tokens).last_hidden_state), (
        "the projection is not what the denoiser reads"
    )
    pictures = torch.rand(2, 1, 20, 12, requires_grad=True)
    maps = image.features(pictures)
    assert [each.shape for each in maps] == [(2, 8, 2, 2)] * 2
    maps[-1].sum().backward()
    assert pictures.grad is not None and float(pictures.grad.abs().sum()) > 0
    assert image.embed(pictures).shape == (2, 4)
    assert not any(p.requires_grad for p in image.network.parameters())
    assert 0 < loaded.logit_scale <= 100 and loaded.description.name == "model"


def test_it_is_an_image_tower_wherever_one_is_read(finished: Path) -> None:
    """Shapes alone would say one head of 8 channels; the file says two of 4."""
    tower = load_control(finished, dtype=torch.float32)
    assert isinstance(tower, CLIPVisionEncoder) and tower.config.num_attention_heads == 2
    pictures = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(tower(pictures).embeds, load_clip(finished).vision(pictures).embeds)


def test_any_text_encoder_will_do() -> None:
    model = sfumato.load()
    tower = load_text_tower(Path(sfumato.__file__).parent / "assets" / "illustrations.safetensors")
    assert tower.config == model.config.text and tower.tokenizer == model.config.tokenizer


def test_a_denoiser_reads_it_frozen(
    finished: Path, latent: Recipe, trained: Callable[..., Path], tmp_path: Path
) -> None:
    short = {"images": 8, "save_images": 8, "preview_images": 8}
    told = {"text_from": finished, "text_trainable": False, "prompts": ("a square",)}
    path = trained(latent(tmp_path / "run", diffusion=told, loop=short, text=None))
    model = sfumato.load(path, device="cpu")
    tower = load_text_tower(finished)
    assert model.text_encoder is not None and model.config.tokenizer == tower.tokenizer
    mine, theirs = model.text_encoder.state_dict(), tower.encoder.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    tokens = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        states = (each(tokens).last_hidden_state for each in (model.text_encoder, tower.encoder))
    assert torch.equal(*states)
    assert sfumato.generate(model, sfumato.Request(prompt="a square", steps=1, seed=0)).images


def damaged(
    tmp_path: Path, file: Path, changes: Mapping[str, Tensor | None], metadata: dict[str, str]
) -> Path:
    tensors, old = read_tensors(file)
    kept = {**{k: v.clone() for k, v in tensors.items()}, **changes}
    path = tmp_path / "damaged.safetensors"
    write_tensors(path, {k: v for k, v in kept.items() if v is not None}, {**old, **metadata})
    return path


def test_files_that_are_damaged(finished: Path, tmp_path: Path) -> None:
    described = json.loads(read_tensors(finished)[1][CLIP_KEY])

    def said(**changes: Any) -> dict[str, str]:
        return {CLIP_KEY: json.dumps({**described, **changes})}

    weight = "text_projection.weight"
    for changes, metadata in (
        ({"logit_scale": None}, {}),
        ({weight: None}, {}),
        ({weight: torch.full((4, 8), math.nan)}, {}),
        ({"more": torch.zeros(2)}, {}),
        ({}, said(version=2)),
        ({}, said(text={**described["text"], "num_hidden_layers": 999_999})),
        ({}, said(text={**described["text"], "hidden_size": 1e9})),
        ({}, said(vision=3)),
        ({}, said(other=1)),
        ({}, {CLIP_KEY: "[]"}),
    ):
        with pytest.raises(CheckpointError):
            load_clip(damaged(tmp_path, finished, changes, metadata))
    with pytest.raises(CheckpointError, match="no pair of CLIP"):
        load_clip(Path(sfumato.__file__).parent / "assets" / "illustrations.safetensors")


def test_what_is_not_finite_is_not_written(finished: Path, tmp_path: Path) -> None:
    loaded = load_clip(finished)
    text = {name: torch.full_like(value, 1e6) for name, value in loaded.text.state_dict().items()}
    with pytest.raises(NumericalError):
        save_clip(tmp_path / "a.safetensors", loaded.description, text, loaded.vision.state_dict(), 10.0)
    assert not (tmp_path / "a.safetensors").exists()


def test_the_recipe_runs(pictures: Path, tmp_path: Path) -> None:
    config = read_config(
        RECIPE,
        [
            f"--data.path={pictures}", f"--out={tmp_path / 'run'}", "--data.size=16", "--data.repeats={}",
            "--loop.images=8", "--loop.batch=4", "--device=cpu",
        ],
    )  # fmt: skip
    assert is_clip(trained(config, []))


# Several processes


def compare(rank: int, file: str, world: int) -> None:
    """The mean of the processes' gradients of the loss of all pairs is that of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 4, 3, generator=generator)
    weight = torch.eye(3, requires_grad=True)

    def loss(images: Tensor, texts: Tensor) -> Tensor:
        rows = [gathered(F.normalize(each @ weight, dim=1)) for each in (images, texts)]
        return contrast(rows[0], rows[1], torch.tensor(5.0), torch.eye(4, dtype=torch.bool))[0]

    loss(images[rank::world], texts[rank::world]).backward()
    assert weight.grad is not None
    mean = weight.grad.clone()
    torch.distributed.all_reduce(mean)
    torch.distributed.destroy_process_group()
    weight.grad = None
    loss(images, texts).backward()
    torch.testing.assert_close(mean / world, weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    given = (str(tmp_path / "store"), 2)
    torch.multiprocessing.start_processes(compare, given, nprocs=2, start_method="fork")

"""The tasks: they learn, finished models draw, and recipes whose parts do not fit are refused at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import sfumato
from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.load import load_file
from sfumato.conditioning import Conditioning
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.training import latents
from sfumato.training.config import TrainingConfig
from sfumato.training.data import WHOLE, Position, Share, open_dataset
from sfumato.training.latents import CachedLatents
from sfumato.training.loop import Task, train
from sfumato.training.objective import Drawn
from sfumato.training.run import make_task
from sfumato.training.sheets import save_sheet
from sfumato.training.tasks.diffusion import DiffusionTask

CPU = torch.device("cpu")
Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]


def losses_on_one_batch(config: TrainingConfig) -> list[float]:
    """The losses of a run that sees the same batch, with the same noise, in every step."""
    torch.manual_seed(config.seed)
    task = make_task(config, CPU)
    batches = task.batches(0, config.loop.batch)
    batch = next(batches)
    batches.close()

    def again(seen: int, size: int, share: Share = WHOLE) -> Generator[Any, None, None]:
        yield from itertools.repeat(batch)

    task.batches = again  # type: ignore[method-assign]
    lines: list[float] = []
    train(config, task, CPU, lambda line: lines.append(float(line["loss"])) if "loss" in line else None)
    return lines


FAST = {"learning_rate": 2e-2, "warmup_images": 0, "decay": "cosine", "weight_decay": 0.0}
LONG = {
    "images": 480, "batch": 4, "log_images": 4, "save_images": 480, "preview_images": 480, "ema_images": 0,
}  # fmt: skip


def test_an_autoencoder_overfits_one_batch(recipe: Recipe, tmp_path: Path) -> None:
    losses = losses_on_one_batch(recipe("autoencoder", tmp_path / "run", optimizer=FAST, loop=LONG))
    assert losses[-1] < 0.25 * losses[0]


def state_of(config: TrainingConfig) -> dict[str, Tensor]:
    newest = max((config.out / "states").glob("[0-9]*"))
    return read_tensors(newest / "tensors.safetensors")[0]


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str = "") -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith(prefix))


SHORT = {"images": 8, "save_images": 8, "preview_images": 8}


def test_gradient_checkpointing_changes_nothing(
    recipe: Recipe, latent: Recipe, trained: Trained, tmp_path: Path
) -> None:
    saving = {**SHORT, "gradient_checkpointing": True}
    for first, second in (
        [recipe("autoencoder", tmp_path / name, loop=loop) for name, loop in (("a", SHORT), ("b", saving))],
        [latent(tmp_path / name, loop=loop) for name, loop in (("c", SHORT), ("d", saving))],
    ):
        trained(first)
        trained(second)
        assert_equal(state_of(first), state_of(second))


def test_the_finished_model_draws(latent: Recipe, trained: Trained, tmp_path: Path) -> None:
    path = trained(latent(tmp_path / "run", loop=SHORT, name="squares", notices="by nobody"))
    model = sfumato.load(path, device="cpu")
    assert (model.name, model.image_size, model.prediction) == ("squares", (8, 8), "v")
    assert model.defaults == {"guidance": 3.0, "steps": 2, "sampler": "dpmpp_2m"}
    assert model.config.notices == "by nobody" and model.autoencoder is not None
    request = sfumato.Request(prompt="a square", seed=1)
    result = sfumato.generate(model, request)
    assert result.images[0].size == (8, 8) and result.images[0].mode == "RGB"
    again = sfumato.generate(sfumato.load(path.parent, device="cpu"), request)
    assert torch.equal(result.samples, again.samples)


def test_the_averaged_weights_are_what_is_written(latent: Recipe, trained: Trained, tmp_path: Path) -> None:
    config = latent(tmp_path / "run", loop=SHORT)
    written = load_file(trained(config), torch.float32).modules["unet"].state_dict()
    state = state_of(config)
    for name, value in written.items():
        assert torch.equal(value, state[f"ema.unet.{name}"].half().float())
    assert any(not torch.equal(state[f"ema.unet.{n}"], state[f"module.unet.{n}"]) for n in written)


def test_latents_of_the_training_pictures_have_unit_deviation(first_stage: Path, pictures: Path) -> None:
    file = load_file(first_stage / "model.safetensors", torch.float32)
    network = file.module("autoencoder")
    assert isinstance(network, AutoencoderKL)
    data = open_dataset(pictures, (8, 8), 3, "train")
    pixels = latents.Pixels(data, 0).fixed(list(range(len(data))))
    scaled = network.encode(pixels).mode() * file.config.latent_scale
    assert scaled.std().item() == pytest.approx(1, rel=0.02)


def test_a_decoder_alone_leaves_the_latents_what_they_mean(
    recipe: Recipe, first_stage: Path, trained: Trained, tmp_path: Path
) -> None:
    start = first_stage / "model.safetensors"
    alone = {"start_from": start, "freeze_encoder": True}
    before = load_file(start, torch.float32)
    path = trained(recipe("autoencoder", tmp_path / "run", autoencoder=alone, loop=SHORT))
    after = load_file(path, torch.float32)
    old, new = (file.modules["autoencoder"].state_dict() for file in (before, after))
    frozen = {name for name in old if name.startswith(("encoder.", "quant_conv."))}
    assert all(torch.equal(old[name], new[name]) for name in frozen)
    assert any(not torch.equal(old[name], new[name]) for name in old.keys() - frozen)
    assert after.config.latent_scale == before.config.latent_scale


def test_an_autoencoder_that_goes_on_from_another_measures_its_own_scale(
    recipe: Recipe, first_stage: Path, trained: Trained, tmp_path: Path
) -> None:
    start = first_stage / "model.safetensors"
    path = trained(recipe("autoencoder", tmp_path / "run", autoencoder={"start_from": start}, loop=SHORT))
    assert load_file(path).config.latent_scale != load_file(start).config.latent_scale


def test_a_diffusion_run_that_goes_on_from_another(latent: Recipe, trained: Trained, tmp_path: Path) -> None:
    first = trained(latent(tmp_path / "first", loop=SHORT))
    task = make_task(latent(tmp_path / "second", diffusion={"start_from": first}), CPU)
    written = load_file(first, torch.float32)
    for part in ("unet", "text"):
        assert_equal(dict(task.modules[part].state_dict()), dict(written.modules[part].state_dict()))


def test_pictures_without_captions(recipe: Recipe, pixel: Recipe, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (9, 9), 80 * index).save(folder / f"{index}.png")
    grey = {"in_channels": 1, "out_channels": 1}
    config = pixel(tmp_path / "run", data={"path": folder, "channels": 1}, unet=grey, loop=SHORT)
    result = sfumato.generate(sfumato.load(trained(config), device="cpu"), sfumato.Request(seed=1))
    assert result.images[0].mode == "L" and result.images[0].size == (8, 8)
    text = recipe(
        "diffusion", tmp_path / "empty", data={"path": folder}, loop=SHORT,
        diffusion={"steps": 1, "vocabulary": 514},
        unet={**config.unet.__dict__, "in_channels": 3, "out_channels": 3, "context_dim": 8},
        text={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    )  # fmt: skip
    trained(text)
    task = make_task(text, CPU)
    assert isinstance(task, DiffusionTask) and task.captions is not None
    assert task.captions.caption(Position(0, 0, 0, 1)) == ""


@pytest.mark.parametrize("count", [1, 3, 17, 20, 33])
def test_a_sheet_of_any_number_of_held_out_pictures(recipe: Recipe, tmp_path: Path, count: int) -> None:
    for index in range(count):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    task = make_task(recipe("autoencoder", tmp_path / "run", data={"path": tmp_path / "pictures"}), CPU)
    with torch.no_grad():
        task.preview(tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png", formats=["PNG"]).size
    assert width % 10 == 0 and height % 20 == 0 and height <= 40


def test_a_sheet_is_read_row_by_row(tmp_path: Path) -> None:
    pictures = torch.linspace(-1, 1, 3).reshape(3, 1, 1, 1).expand(3, 1, 4, 5)
    save_sheet(tmp_path / "sheet.png", pictures, columns=2)
    sheet = Image.open(tmp_path / "sheet.png", formats=["PNG"])
    assert sheet.size == (14, 12)
    shown = [sheet.getpixel(place) for place in ((0, 0), (7, 0), (0, 6), (7, 6), (5, 0))]
    assert shown == [(0, 0, 0), (128, 128, 128), (255, 255, 255), (255, 255, 255), (255, 255, 255)]


class Counted:
    """An autoencoder that counts what it encodes."""

    def __init__(self, network: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures = 0
        encode = network.encode

        def counting(pixels: Tensor) -> Any:
            self.pictures += len(pixels)
            return encode(pixels)

        monkeypatch.setattr(network, "encode", counting)


def test_latents_are_made_once(
    first_stage: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_file(first_stage / "model.safetensors", torch.float32).module("autoencoder")
    assert isinstance(network, AutoencoderKL)
    counted = Counted(network, monkeypatch)
    monkeypatch.setattr(latents, "ENCODE_BATCH", 4)
    told: list[tuple[int, int]] = []

    def made(size: int, digest: str = "first") -> CachedLatents:
        data = open_dataset(pictures, (size, size), 3, "train")
        shape, path = (2, size // 2, size // 2), tmp_path / "latents.safetensors"
        counted.pictures, count = 0, len(data)
        found = CachedLatents(data, network, 2.0, shape, path, digest, lambda *done: told.append(done))
        assert found.mean.shape == (count, *shape) and counted.pictures in (0, count)
        return found

    first = made(8)
    assert counted.pictures == len(first.mean) and told == [(4, len(first.mean))]
    again = made(8)
    assert counted.pictures == 0 and torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    for change in (lambda: made(16), lambda: made(8), lambda: made(8, "second")):
        change()
        assert counted.pictures > 0
    (tmp_path / "latents.safetensors").write_bytes(b"damaged")
    assert torch.equal(made(8, "second").mean, first.mean) and counted.pictures > 0


def test_every_epoch_draws_other_latents(first_stage: Path, pictures: Path, tmp_path: Path) -> None:
    network = load_file(first_stage / "model.safetensors", torch.float32).module("autoencoder")
    assert isinstance(network, AutoencoderKL)
    data = open_dataset(pictures, (8, 8), 3, "train")
    source = CachedLatents(
        data, network, 2.0, (2, 4, 4), tmp_path / "l.safetensors", "d", lambda done, of: None
    )  # fmt: skip
    places = [Position(0, 0, 1, 3), Position(0, 1, 1, 3), Position(0, 0, 1, 3), Position(0, 0, 1, 4)]
    (group, drawn) = next(source.batches(iter([places])))
    assert group == places and drawn.shape == (4, 2, 4, 4)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    deviation = (drawn[0] / 2 - source.mean[3]) / source.std[3]
    assert torch.allclose(deviation, (drawn[3] / 2 - source.mean[4]) / source.std[4], atol=1e-2)
    assert torch.equal(source.fixed([3])[0], source.mean[3].float() * 2)


def test_captions_are_dropped_as_often_as_asked(
    latent: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(latent(tmp_path / "run", diffusion={"caption_dropout": 0.25}), CPU)
    assert isinstance(task, DiffusionTask) and task.captions is not None
    shown: list[str] = []
    encoded = task.captions.encoded

    def encoding(captions: Sequence[str]) -> Conditioning:
        shown.extend(captions)
        return encoded([""])

    def errors(clean: Tensor, chance: Drawn, given: Conditioning) -> Tensor:
        assert int(chance.t.min()) >= 0 and int(chance.t.max()) <= 999 and chance.noise.shape == clean.shape
        return torch.zeros(len(clean))

    monkeypatch.setattr(task.captions, "encoded", encoding)
    monkeypatch.setattr(task, "_errors", errors)
    list(task.losses(next(task.batches(0, 2000)), 0))
    assert 0.22 < shown.count("") / len(shown) < 0.28
    assert set(shown) == {"", "a square number 0", "a square number 1", "a square number 2"}


def test_held_out_losses_come_by_timestep(latent: Recipe, tmp_path: Path) -> None:
    task: Task = make_task(latent(tmp_path / "run"), CPU)
    with torch.no_grad():
        scores = task.evaluate()
        assert scores == task.evaluate()
    assert scores.keys() <= {"held_out_loss", *(f"held_out_loss_{part}" for part in range(4))}
    assert scores["held_out_loss"] > 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no network": ({"unet": None}, r"needs a \[unet\] table"),
    "labels": ({"unet": {"num_classes": 3}}, "num_classes 3; this recipe needs 2 and None"),
    "one dimension": ({"unet": {"dims": 1}}, "dims is 1"),
    "text without a reader": ({"unet": {"context_dim": None}}, "context_dim is None, text.hidden_size 8"),
    "a reader without text": ({"text": None}, "context_dim is 8, text.hidden_size None"),
    "prompts without text": ({"text": None, "unet": {"context_dim": None}}, r"no \[text\] table"),
    "channels in": ({"unet": {"in_channels": 4}}, "in_channels is 4 and out_channels 2, but .* 2 channels"),
    "channels out": ({"unet": {"out_channels": 4}}, "4 channels, latents 2"),
    "grey pictures": ({"data": {"channels": 1}}, "data.channels is 1, the autoencoder's pictures have 3"),
    "an odd size": ({"data": {"size": 10}}, "cannot draw 10x10 pixels"),
    "a sampler": ({"diffusion": {"sampler": "dpmp"}}, "there is no sampler 'dpmp'"),
    "too many steps": ({"diffusion": {"steps": 10**6}}, "steps"),
    "a vocabulary": ({"diffusion": {"vocabulary": 500}}, "vocab_size is 500"),
    "eps to the end": (
        {"diffusion": {"prediction": "eps"}, "schedule": {"zero_terminal_snr": True}}, "eps cannot",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=list(WRONG))
def test_a_diffusion_recipe_that_does_not_fit(
    latent: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_task(latent(tmp_path / "run", **changes), CPU)
    assert not list(tmp_path.rglob("latents*")), "refused before the pictures are encoded"


WRONG_FIRST: dict[str, tuple[dict[str, Any], str]] = {
    "no network": ({"first_stage": None}, r"needs a \[first_stage\] table"),
    "channels": ({"data": {"channels": 1}}, "takes 3 channels and gives 3, data.channels is 1"),
    "an odd size": ({"data": {"size": [8, 9]}}, r"data.size is \(8, 9\); .* multiples of 2"),
    "half a decoder": ({"first_stage": {"give_pre_end": True}}, "leave out give_pre_end"),
    "an untrained encoder": ({"autoencoder": {"freeze_encoder": True}}, "needs a trained encoder"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG_FIRST.values(), ids=list(WRONG_FIRST))
def test_an_autoencoder_recipe_that_does_not_fit(
    recipe: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_task(recipe("autoencoder", tmp_path / "run", **changes), CPU)


def test_files_of_other_runs_are_refused(recipe: Recipe, latent: Recipe, pixel: Recipe, trained: Trained,
                                         first_stage: Path, tmp_path: Path) -> None:  # fmt: skip
    start = {"start_from": first_stage / "model.safetensors"}
    with pytest.raises(CheckpointError, match=r"does not fit \[first_stage\], .* tensors differ"):
        make_task(recipe("autoencoder", tmp_path / "a", autoencoder=start, first_stage={"ch": 8}), CPU)
    unconditional = trained(pixel(tmp_path / "pixels", loop=SHORT))
    with pytest.raises(CheckpointError, match="'model' has no autoencoder, only unet"):
        make_task(latent(tmp_path / "b", diffusion={"autoencoder": unconditional}), CPU)
    with pytest.raises(CheckpointError, match="'model' has no text, only unet"):
        make_task(latent(tmp_path / "c", diffusion={"start_from": unconditional}), CPU)
    with pytest.raises(CheckpointError, match="'model' has no unet, only autoencoder"):
        make_task(pixel(tmp_path / "d", diffusion=start), CPU)
    with pytest.raises(CheckpointError, match=r"does not fit \[unet\]"):
        deeper = {"diffusion": {"start_from": unconditional}, "unet": {"num_res_blocks": 2}}
        make_task(pixel(tmp_path / "e", **deeper), CPU)


def test_encoding_is_reported(latent: Recipe, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    make_task(latent(tmp_path / "run"), CPU, lambda line: lines.append(dict(line)))
    assert lines and lines[0].keys() == {"encoded", "images_per_second", "seconds_left"}
    assert json.dumps(lines[0])

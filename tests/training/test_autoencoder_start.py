"""First stages that begin with another's weights: codebooks taken over, encoders that stay, small buckets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.load import load_file
from sfumato.errors import InputError
from sfumato.nn.codebook import chosen
from sfumato.nn.vq import VQModel
from sfumato.training.config import TrainingConfig
from sfumato.training.loop import train
from sfumato.training.tasks.autoencoder import AutoencoderTask
from sfumato.training.tasks.autoencoder.task import _format

sys.path.insert(0, str(Path(__file__).parent))
from autoencoder_runs import CPU, SHORT, VQ, batch_of, task_of

Recipe = Callable[..., TrainingConfig]
Trained = Callable[..., Path]


def step(task: AutoencoderTask) -> Tensor:
    """The pictures of the first batch, after its losses and what follows them."""
    batch = batch_of(task)
    list(task.losses(batch, 0))
    return batch[1]


def test_a_codebook_that_is_taken_over_moves_as_the_decay_says(
    recipe: Recipe, trained: Trained, tmp_path: Path
) -> None:
    path = trained(recipe("autoencoder", tmp_path / "first", first_stage=VQ, loop=SHORT))
    options = {"start_from": path, "codebook": "ema", "codebook_images": 36, "revive_below": 0.0}
    task = task_of(recipe("autoencoder", tmp_path / "second", autoencoder=options, first_stage=VQ))
    assert isinstance(task.network, VQModel) and task.codebook is not None
    quantiser = task.network.quantize
    before = quantiser.embedding.weight.detach().clone()
    start = load_file(path, torch.float32).module("autoencoder").state_dict()
    assert torch.equal(before, start["quantize.embedding.weight"])
    pictures = step(task)
    with torch.no_grad():
        latents = task.network.encode(pictures).mode()
        found = VQModel.encode(task.network, pictures).mode()
        distances = torch.cdist(found.movedim(1, -1).flatten(0, -2), before)
        counts, sums = chosen(latents, distances.argmin(dim=1), 16)
    # Averages of equal counts and these entries, and a batch of four among half-lives of 36 images.
    kept, fair = 0.5 ** (4 / 36), counts.mean()
    wanted = (kept * fair * before + (1 - kept) * sums) / (kept * fair + (1 - kept) * counts)[:, None]
    after = quantiser.embedding.weight.detach()
    assert torch.allclose(after, wanted, rtol=1e-3, atol=1e-4 * float(before.norm()))
    assert not torch.equal(after, before)
    assert torch.allclose(after[counts == 0], before[counts == 0], rtol=1e-3)
    assert task.codebook.state.ready == 1 and 0.8 < float(after.norm() / before.norm()) < 1.25
    state = {name: value.clone() for name, value in task.modules["codebook"].state_dict().items()}
    step(task)
    assert not torch.equal(state["sums"], task.codebook.state.sums)


def test_a_frozen_encoder_drops_nothing_out(recipe: Recipe, first_stage: Path, tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def latents(**more: Any) -> Tensor:
        options = {"start_from": first_stage / "model.safetensors", **more}
        task = task_of(
            recipe("autoencoder", tmp_path / "run", autoencoder=options, first_stage={"dropout": 0.5})
        )
        encode = task.encode

        def told(pictures: Tensor) -> Any:
            found = encode(pictures)
            seen.append((pictures, found.mean.detach()))
            return found

        task.encode = told
        for module in task.modules.values():  # as the loop does after each sheet
            module.eval()
            module.train()
        step(task)
        assert task.network.decoder.training
        task.network.eval()
        with torch.no_grad():
            return task.network.encode(seen[-1][0]).mode()

    clean = latents(freeze_encoder=True)
    assert torch.equal(seen[-1][1], clean)
    clean = latents()
    assert not torch.equal(seen[-1][1], clean)


@pytest.mark.parametrize("stage", [{}, VQ])
def test_a_frozen_encoder_is_written_as_it_was_read(
    recipe: Recipe, trained: Trained, tmp_path: Path, stage: dict[str, Any]
) -> None:
    config = recipe("autoencoder", tmp_path / "first", first_stage=stage, loop=SHORT)
    task = task_of(config)
    task.written_as = torch.float32
    path = train(config, task, CPU, lambda line: None)
    options = {"start_from": path, "freeze_encoder": True}
    again = trained(
        recipe("autoencoder", tmp_path / "second", autoencoder=options, first_stage=stage, loop=SHORT)
    )
    old, new = (read_tensors(file)[0] for file in (path, again))
    same = {name for name in old if torch.equal(old[name], new[name])}
    stays = ("first_stage_model.encoder.", "first_stage_model.quant_conv.", "first_stage_model.quantize.")
    assert {name for name in old if name.startswith(stays)} <= same < old.keys()
    assert {value.dtype for value in new.values()} == {torch.float32}
    assert any(not torch.equal(old[name], old[name].half().float()) for name in same)
    first, second = (load_file(file).module("autoencoder") for file in (path, again))
    pictures = torch.rand(2, 3, 8, 8)
    encoded = [network.get_submodule("encoder")(pictures) for network in (first, second)]
    assert torch.equal(*encoded)
    free = trained(
        recipe(
            "autoencoder", tmp_path / "third", autoencoder={"start_from": path}, first_stage=stage, loop=SHORT
        )
    )
    assert {value.dtype for value in read_tensors(free)[0].values()} == {torch.float16}


def test_the_format_that_holds_others() -> None:
    assert _format([]) == _format([torch.float8_e4m3fn]) == torch.float16
    assert _format([torch.float16, torch.float8_e5m2]) == torch.float16
    assert _format([torch.bfloat16]) == torch.bfloat16
    assert _format([torch.bfloat16, torch.float16]) == torch.float32
    assert _format([torch.float64]) == torch.float32


@pytest.fixture
def tall(tmp_path: Path) -> Path:
    """Twenty pictures, square ones and ones four times as high as wide."""
    folder = tmp_path / "tall"
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 255, (20, 3), dtype=np.uint8)
    for index, colour in enumerate(colours):
        shape = (32, 32, 3) if index % 2 else (64, 16, 3)
        Image.fromarray(np.zeros(shape, np.uint8) + colour).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("buckets", "options", "message"),
    [
        (
            {"min": 4}, {"adversarial": "hinge", "disc_layers": 1, "disc_width": 4},
            r"data\.buckets .*\(16, 4\).*disc_layers = 1 needs 6 pixels a side\nRaise data\.buckets\.min to",
        ),
        ({"min": 3, "max": 15, "step": 3}, {}, r"takes multiples of 2\nSet data\.buckets\.step"),
    ],
)  # fmt: skip
def test_buckets_too_small_for_what_looks_at_them(
    recipe: Recipe, tall: Path, tmp_path: Path, buckets: dict[str, int], options: dict[str, Any], message: str
) -> None:
    data = {"path": tall, "buckets": {"max": 16, "step": 4, "rarest": 1, **buckets}}
    with pytest.raises(InputError, match=message):
        task_of(recipe("autoencoder", tmp_path / "run", data=data, autoencoder=options))


def test_buckets_that_are_large_enough(recipe: Recipe, tall: Path, trained: Trained, tmp_path: Path) -> None:
    data = {"path": tall, "buckets": {"min": 6, "max": 12, "step": 2, "rarest": 1}}
    options = {"adversarial": "hinge", "disc_layers": 1, "disc_width": 4}
    config = recipe("autoencoder", tmp_path / "run", data=data, autoencoder=options, loop=SHORT)
    assert len({task_of(config).dataset.size(index) for index in range(4)}) == 2  # type: ignore[attr-defined]
    assert trained(config).is_file()

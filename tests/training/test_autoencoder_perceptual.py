"""What reconstructions are compared in: weights of released files, features of other networks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import CheckpointError, InputError
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.nn.lpips import LPIPS
from sfumato.training.config import TrainingConfig
from sfumato.training.run import make_task
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig
from sfumato.training.tasks.autoencoder import AutoencoderTask
from sfumato.training.tasks.autoencoder.perceptual import load_lpips, perceptual

CPU = torch.device("cpu")
SMALL = (4, 6, 0, 8, 8, 0, 5, 6, 7, 0, 8, 8, 8, 0, 8, 8, 9)
Recipe = Callable[..., TrainingConfig]


def pictures(seed: int, side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def network() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS(SMALL)


@pytest.fixture(params=["pth", "safetensors"])
def files(request: pytest.FixtureRequest, network: LPIPS, tmp_path: Path) -> tuple[Path, Path]:
    """VGG with its classifier, as torchvision has it, and the linear layers, in the wanted format."""
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    vgg = {name: value for name, value in state.items() if name.startswith("features.")}
    vgg["classifier.0.weight"] = torch.zeros(3, 3)
    linear = {name: value for name, value in state.items() if name.startswith("lin")}
    paths = tmp_path / f"vgg16.{request.param}", tmp_path / f"vgg.{request.param}"
    for path, tensors in zip(paths, (vgg, linear), strict=True):
        if request.param == "pth":
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
    return paths


def test_lpips_reads_the_released_files(network: LPIPS, files: tuple[Path, Path]) -> None:
    config = AutoencoderTaskConfig(perceptual="lpips", vgg=files[0], lpips=files[1])
    found = perceptual(config, 3, 32, CPU, SMALL)
    assert found.distance is not None and "LPIPS" in found.described and len(found.digest) == 128
    assert torch.equal(found.distance(pictures(0), pictures(1)), network(pictures(0), pictures(1)))
    decoded = pictures(1).requires_grad_()
    found.distance(decoded, pictures(0)).sum().backward()
    assert decoded.grad is not None and decoded.grad.abs().sum() > 0


def test_lpips_files_of_other_networks_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lin0\.model\.1\.weight: missing"):
        load_lpips(files[0], files[0], SMALL)
    with pytest.raises(CheckpointError, match=r"features\.0\.weight: shape"):
        load_lpips(*files)
    broken = tmp_path / "broken.safetensors"
    save_file({"features.0.weight": torch.full((4, 3, 3, 3), torch.nan)}, broken)
    with pytest.raises(CheckpointError, match="not finite"):
        load_lpips(broken, files[1], SMALL)


def test_features_of_an_earlier_run_and_of_a_clip_tower(first_stage: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = CLIPVisionEncoder(
        CLIPVisionConfig(
            hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=1, image_size=8,
            patch_size=4, projection_dim=8,
        )
    )  # fmt: skip
    path = tmp_path / "tower.safetensors"
    save_file(tower.state_dict(), path)
    for kind, file in (("autoencoder", first_stage / "model.safetensors"), ("clip", path)):
        config = AutoencoderTaskConfig.model_validate({"perceptual": kind, "perceptual_model": file})
        found = perceptual(config, 3, 8, CPU)
        assert found.distance is not None and str(file) in found.described
        clean, near = pictures(0, 8), (0.9 * pictures(0, 8) + 0.1 * pictures(1, 8)).requires_grad_()
        assert found.distance(clean, clean).tolist() == pytest.approx([0, 0], abs=1e-6)
        distance = found.distance(near, clean)
        assert bool((found.distance(pictures(1, 8), clean) > distance).all()) and distance.min() > 0
        distance.sum().backward()
        assert near.grad is not None and torch.isfinite(near.grad).all() and near.grad.any()


def test_a_run_says_what_it_compares_in_and_hangs_on_the_files(
    recipe: Recipe, first_stage: Path, tmp_path: Path
) -> None:
    told: list[Any] = []

    def made(**options: Any) -> AutoencoderTask:
        task = make_task(recipe("autoencoder", tmp_path / "run", autoencoder=options), CPU, told.append)
        assert isinstance(task, AutoencoderTask)
        return task

    plain, ssim = made(), made(perceptual="ssim")
    other = made(perceptual="autoencoder", perceptual_model=first_stage / "model.safetensors")
    assert plain.digest == ssim.digest != other.digest
    assert ["perceptual" in line for line in told] == [True] * 3
    assert "SSIM" in told[1]["perceptual"] and str(first_stage) in told[2]["perceptual"]


def test_pictures_that_features_cannot_take(first_stage: Path, files: tuple[Path, Path]) -> None:
    lpips = AutoencoderTaskConfig(perceptual="lpips", vgg=files[0], lpips=files[1])
    with pytest.raises(InputError, match="colour pictures"):
        perceptual(lpips, 1, 32, CPU, SMALL)
    with pytest.raises(InputError, match="16 pixels or more"):
        perceptual(lpips, 3, 8, CPU, SMALL)
    other = AutoencoderTaskConfig(
        perceptual="autoencoder", perceptual_model=first_stage / "model.safetensors"
    )
    with pytest.raises(InputError, match="takes 3 channels"):
        perceptual(other, 1, 8, CPU)
    gone = AutoencoderTaskConfig(perceptual="clip", perceptual_model=first_stage / "none.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        perceptual(gone, 3, 8, CPU)

"""What reconstructions are compared in: weights of released files, features of other networks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.checkpoints.hub import HubName
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.nn.lpips import LPIPS
from sfumato.training.config import TrainingConfig
from sfumato.training.data import to_tensor
from sfumato.training.run import make_task
from sfumato.training.settings_autoencoder import AutoencoderTaskConfig
from sfumato.training.tasks.autoencoder import AutoencoderTask, task
from sfumato.training.tasks.autoencoder.perceptual import load_lpips, perceptual
from sfumato.training.tasks.autoencoder.shapes import Smallest

CPU = torch.device("cpu")
EIGHT = Smallest((8, 8))
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
    found = perceptual(config, 3, Smallest((32, 32)), Smallest((32, 32)), CPU, SMALL)
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
        found = perceptual(config, 3, EIGHT, EIGHT, CPU)
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
    large, bucket = Smallest((32, 32)), Smallest((8, 64), bucketed=True)
    with pytest.raises(InputError, match="colour pictures"):
        perceptual(lpips, 1, large, large, CPU, SMALL)
    with pytest.raises(InputError, match=r"data\.size is \(8, 8\); LPIPS needs 16 pixels a side"):
        perceptual(lpips, 3, EIGHT, EIGHT, CPU, SMALL)
    with pytest.raises(InputError, match=r"data\.buckets .* needs 16 .*\nRaise data\.buckets\.min to 16"):
        perceptual(lpips, 3, bucket, large, CPU, SMALL)
    scored = AutoencoderTaskConfig(perceptual="ssim", vgg=files[0], lpips=files[1])
    assert perceptual(scored, 3, bucket, large, CPU, SMALL).lpips is not None
    for channels, held_out, message in ((1, large, "colour pictures"), (3, EIGHT, r"data\.size .* needs 16")):
        with pytest.raises(InputError, match=message):
            perceptual(scored, channels, large, held_out, CPU, SMALL)
    other = AutoencoderTaskConfig(
        perceptual="autoencoder", perceptual_model=first_stage / "model.safetensors"
    )
    with pytest.raises(InputError, match="takes 3 channels"):
        perceptual(other, 1, EIGHT, EIGHT, CPU)
    gone = AutoencoderTaskConfig(perceptual="clip", perceptual_model=first_stage / "none.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        perceptual(gone, 3, EIGHT, EIGHT, CPU)


@pytest.mark.parametrize("kind", ["none", "ssim"])
def test_lpips_is_a_score_whatever_trains(
    recipe: Recipe, network: LPIPS, files: tuple[Path, Path], tmp_path: Path, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(task, "perceptual", partial(perceptual, widths=SMALL))
    told: list[Any] = []

    def made(**options: Any) -> AutoencoderTask:
        config = recipe("autoencoder", tmp_path / "run", autoencoder=options, data={"size": 16})
        torch.manual_seed(0)
        return cast(AutoencoderTask, make_task(config, CPU, told.append))

    plain = made(perceptual=kind)
    scored = made(perceptual=kind, vgg=str(files[0]), lpips=str(files[1]))
    assert "held_out_lpips" not in plain.evaluate() and plain.digest != scored.digest
    assert "scored: LPIPS" in told[-1]["perceptual"] and "scored" not in told[0]["perceptual"]
    held_out = torch.stack([to_tensor(scored.held_out.picture(each)) for each in range(len(scored.held_out))])
    back = scored.network.decode(scored.network.encode(held_out).mode()).clamp(-1, 1)
    distance = network(back, held_out).mean().item()
    assert scored.evaluate() == plain.evaluate() | {"held_out_lpips": pytest.approx(distance, rel=1e-4)}
    losses = []
    for each in (plain, scored):
        batches = each.batches(0, 4)
        losses.append([loss.item() for _, loss, _ in each.losses(next(batches), 0)])
        batches.close()
    assert losses[0] == losses[1]


class Cache:
    """A hub of one repository that is its own cache; `asked` has the patterns of each download."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.reached = folder, [], True

    def listed(self, name: HubName, revision: str | None) -> list[str] | None:
        return [each.name for each in self.folder.iterdir()] if self.reached else None

    def download(self, repo: str, *, allow_patterns: Any, local_files_only: bool, **_: Any) -> str:
        assert repo == "timm/vgg16.tv_in1k" and local_files_only is not self.reached
        self.asked.append(allow_patterns)
        return str(self.folder)


def test_weights_of_the_hub_are_fetched_where_a_name_is_given(
    network: LPIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    vgg = {name: value for name, value in state.items() if name.startswith("features.")}
    (tmp_path / "repository").mkdir()
    cache = Cache(tmp_path / "repository")
    save_file(vgg | {"pre_logits.fc1.weight": torch.zeros(2)}, cache.folder / "model.safetensors")
    for name in ("README.md", "pytorch_model.bin", "config.json"):
        (cache.folder / name).write_text("{}")
    torch.save({name: value for name, value in state.items() if name not in vgg}, cache.folder / "vgg.pth")
    monkeypatch.setattr("huggingface_hub.snapshot_download", cache.download)
    monkeypatch.setattr("sfumato.checkpoints.hub._listed", cache.listed)
    monkeypatch.chdir(tmp_path)
    config = AutoencoderTaskConfig(
        perceptual="lpips", vgg="timm/vgg16.tv_in1k", lpips="timm/vgg16.tv_in1k/vgg.pth"
    )
    digests = set()
    for cache.reached in (True, False):
        found = perceptual(config, 3, Smallest((32, 32)), Smallest((32, 32)), CPU, SMALL)
        assert found.distance is not None and "LPIPS with timm/vgg16.tv_in1k and" in found.described
        assert torch.equal(found.distance(pictures(0), pictures(1)), network(pictures(0), pictures(1)))
        digests.add(found.digest)
    assert cache.asked == [["config.json", "model.safetensors"], ["vgg.pth"], None, None]
    assert len(digests) == 1
    (cache.folder / "model.safetensors").rename(cache.folder / "other.safetensors")
    (cache.folder / "pytorch_model.bin").unlink()
    folder = config.model_copy(update={"vgg": str(cache.folder), "lpips": str(cache.folder / "vgg.pth")})
    with pytest.raises(CheckpointError, match=r"is a folder without a model\.safetensors"):
        perceptual(folder, 3, Smallest((32, 32)), Smallest((32, 32)), CPU, SMALL)

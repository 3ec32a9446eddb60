"""The recipes of first stages in configs/ run to their end, made small, and their models encode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.load import load_file
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.vq import VQModel
from sfumato.training import run

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*autoencoder*.toml"))
SMALL = (
    "device=cpu", "data.size=32", "data.repeats={}", "data.workers=0", "first_stage.ch=8",
    "first_stage.resolution=32", "loop.images=4", "loop.batch=2", "loop.log_images=2", "loop.save_images=4",
    "loop.preview_images=4",
    "loop.precision=float32", "autoencoder.preview_images=4", "autoencoder.disc_start=2",
    "autoencoder.disc_width=8",
)  # fmt: skip


def small(name: str, pictures: Path, out: Path, *more: str) -> Path:
    return run(CONFIGS / name, (*SMALL, f"data.path={pictures}", f"out={out}", *more))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_its_end(name: str, pictures: Path, tmp_path: Path) -> None:
    more = ("first_stage.num_groups=1", "first_stage.n_embed=16") if "vq" in name else ()
    path = small(name, pictures, tmp_path / "run", *more)
    model = load_file(path, torch.float32)
    network = model.module("autoencoder")
    assert isinstance(network, VQModel if "vq" in name else AutoencoderKL)
    with torch.no_grad():
        latents = network.encode(torch.zeros(1, 3, 32, 32)).mode()
        assert network.decode(latents).shape == (1, 3, 32, 32)
    assert model.config.latent_rgb is not None and (tmp_path / "run" / "previews" / "000000004.png").is_file()


def test_a_decoder_is_trained_on_with_its_latents_as_they_are(pictures: Path, tmp_path: Path) -> None:
    first = small("illustrations-autoencoder.toml", pictures, tmp_path / "first")
    second = small(
        "illustrations-decoder.toml", pictures, tmp_path / "second", f"autoencoder.start_from={first}"
    )
    one, two = (load_file(path, torch.float32).module("autoencoder").state_dict() for path in (first, second))
    changed = {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}
    assert "decoder" in changed and changed <= {"decoder", "post_quant_conv"}

"""The model as one object: prompts, pictures and latents in and out, sizes, devices and number formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.conditioning import Conditioning
from sfumato.errors import CheckpointError, InputError
from sfumato.model import EMBEDDED, StableDiffusion
from sfumato.nn.unet import UNet


def test_pictures_become_scaled_latents_and_come_back(tiny_model: StableDiffusion) -> None:
    pictures = torch.rand(2, 3, 16, 8) * 2 - 1
    latents = tiny_model.encode_image(pictures)
    assert latents.shape == (2, 2, 8, 4) and tiny_model.autoencoder is not None
    tiny_model.latent_scale = 4.0
    assert torch.allclose(tiny_model.encode_image(pictures), 4 * latents)
    back = tiny_model.decode_latents(4 * latents)
    assert back.shape == pictures.shape and back.dtype == torch.float32
    assert torch.allclose(back, tiny_model.autoencoder.decode(latents), atol=1e-6)


def test_pixels_are_their_own_latents(pixel_model: StableDiffusion) -> None:
    pictures = torch.rand(1, 1, 8, 8)
    assert torch.equal(pixel_model.encode_image(pictures), pictures)
    assert torch.equal(pixel_model.decode_latents(pictures), pictures)
    assert pixel_model.downsampling == 1


def test_prompts_become_contexts(tiny_model: StableDiffusion) -> None:
    cond = tiny_model.encode_prompt(["a red apple", ""])
    assert cond.context is not None and cond.context.shape == (2, 8, 16) and not cond.context.requires_grad
    empty = tiny_model.uncondition(3).context
    assert empty is not None and torch.allclose(empty, cond.context[1:].expand(3, -1, -1), atol=1e-6)
    assert tiny_model.prompt_cuts(["a red apple", "a red apple and a green pear"])[0] == ""
    assert tiny_model.prompt_cuts(["a red apple and a green pear, all on a table"])[0] != ""


def test_a_model_without_text(pixel_model: StableDiffusion) -> None:
    assert pixel_model.uncondition(2) == Conditioning() and pixel_model.prompt_cuts(["a"]) == [""]
    with pytest.raises(InputError, match="'pixels' has no text encoder"):
        pixel_model.encode_prompt(["a"])


def test_sizes_that_the_networks_can_take(tiny_model: StableDiffusion, pixel_model: StableDiffusion) -> None:
    assert tiny_model.latent_shape(16, 32) == (2, 8, 16)
    assert pixel_model.latent_shape(6, 8) == (1, 6, 8)
    with pytest.raises(InputError, match=r"cannot draw 30x17 pixels; .* multiples of 4") as caught:
        tiny_model.latent_shape(17, 30)
    assert "32x16 (width x height)" in caught.value.hint


@pytest.mark.parametrize(("dims", "sides", "shape"), [(1, (32,), (1, 32)), (3, (4, 8, 16), (1, 4, 8, 16))])
def test_sizes_of_sequences_and_volumes(
    pixel_model: StableDiffusion, dims: int, sides: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    unet = dataclasses.replace(pixel_model.unet.config, dims=dims)
    config = dataclasses.replace(pixel_model.config, unet=unet, image_size=sides)
    model = StableDiffusion(config, {"unet": UNet(unet)})
    assert model.latent_shape(1 if dims == 1 else sides[-2], sides[-1]) == shape


def test_concatenated_conditions_are_more_channels(pixel_model: StableDiffusion) -> None:
    unet = UNet(dataclasses.replace(pixel_model.unet.config, in_channels=3))
    model = StableDiffusion(pixel_model.config, {"unet": unet})
    x, t, concat = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.randn(2, 2, 8, 8)
    assert model.network(x, t, Conditioning(concat=concat)).shape == x.shape
    with pytest.raises(InputError):
        model.network(x, t, Conditioning())


def test_a_copy_in_float32_leaves_the_model_alone(tiny_model: StableDiffusion) -> None:
    narrow = tiny_model.to(torch.device("cpu"), torch.bfloat16)
    wide = narrow.float32()
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32 and wide.text_encoder is not None
    assert next(wide.text_encoder.parameters()).dtype == torch.float32
    assert wide.unet is not narrow.unet and wide.name == narrow.name
    assert wide.device == torch.device("cpu")


def test_parts_of_two_models(tiny_model: StableDiffusion, pixel_model: StableDiffusion) -> None:
    assert tiny_model.autoencoder is not None and tiny_model.text_encoder is not None
    with pytest.raises(InputError, match="the U-Net has 1 channels, latents 2"):
        StableDiffusion(pixel_model.config, {"unet": pixel_model.unet, "autoencoder": tiny_model.autoencoder})
    with pytest.raises(InputError, match=r"unet\.context_dim is None, text\.hidden_size 16"):
        StableDiffusion(tiny_model.config, {"unet": pixel_model.unet, "text": tiny_model.text_encoder})
    with pytest.raises(CheckpointError, match="has no U-Net"):
        StableDiffusion(tiny_model.config, {"autoencoder": tiny_model.autoencoder})


def test_load_knows_where_its_file_came_from(tiny_model_file: Path, tmp_path: Path) -> None:
    model = sfumato.load(tiny_model_file, device="cpu")
    assert model.digest is not None and len(model.digest) == 64 and model.name == "tiny"
    assert sfumato.load(str(tiny_model_file), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"cannot open .*nothing\.safetensors: No such file"):
        sfumato.load(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        sfumato.load(tmp_path)


def test_the_embedded_model_is_in_the_package() -> None:
    assert EMBEDDED.is_file() and EMBEDDED.stat().st_size <= 32 * 2**20
    model = sfumato.load(device="cpu")
    assert model.text_encoder is not None and model.autoencoder is not None and model.config.notices
    height, width = model.image_size
    assert min(height, width) >= 64 and model.latent_shape(height, width)

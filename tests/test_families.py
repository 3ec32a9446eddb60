"""The released models by their numbers of parameters, and that every one of them is a model that draws."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from sfumato.families import AUTOENCODERS, CLIP_L, FAMILIES, OPENCLIP_BIGG, OPENCLIP_H
from sfumato.model import StableDiffusion
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.bert import BERTConfig, BERTEmbedder
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet
from sfumato.nn.vq import VQModel
from sfumato.presets import PARTS, ModelConfig
from sfumato.runtime import shapes_only
from sfumato.text.tokenizer import Tokenizer


def parameters(kind: type[nn.Module], config: Any) -> int:
    with shapes_only():
        return sum(parameter.numel() for parameter in kind(config).parameters())


# Sources: model cards and the original code's logs; LDM's appendix gives 274 M, 294 M, 395 M and 400 M.
UNETS = {
    "sd1": 859_520_964,
    "sd1-inpaint": 859_535_364,
    "instruct-pix2pix": 859_532_484,
    "sd2-base": 865_910_724,
    "sd2": 865_910_724,
    "sd2-inpaint": 865_925_124,
    "sd-x4-upscaler": 473_398_020,
    "sdxl": 2_567_463_684,
    "ldm-unconditional": 274_056_163,
    "ldm-churches": 294_966_916,
    "ldm-cin256": 394_984_196,
    "ldm-cin256-v2": 400_920_579,
    "ldm-text2img-large": 872_300_484,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_the_denoisers(name: str) -> None:
    assert parameters(UNet, FAMILIES[name].unet) == UNETS[name]


@pytest.mark.parametrize(
    ("config", "count"), [(CLIP_L, 123_060_480), (OPENCLIP_H, 340_387_840), (OPENCLIP_BIGG, 694_659_840)]
)
def test_parameters_of_the_text_encoders(config: CLIPTextConfig, count: int) -> None:
    assert parameters(CLIPTextEncoder, config) == count


def test_parameters_of_the_others() -> None:
    # With the layer over the vocabulary (39.1 M) that no feature passes, this and the U-Net are the 1.45 B.
    bert = parameters(BERTEmbedder, BERTConfig())
    assert bert == 542_895_360
    assert 1.45e9 < bert + (1280 + 1) * 30522 + UNETS["ldm-text2img-large"] < 1.46e9
    counts = {
        name: parameters(AutoencoderKL if config.n_embed is None else VQModel, config)
        for name, config in AUTOENCODERS.items()
    }
    assert counts["kl-f8"] == 83_653_863
    assert counts["kl-f4-z4"] == 55_325_927
    assert counts["vq-f4"] == 55_322_782  # the released vq-f4: 55.32 M


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_named_by_its_factor(name: str) -> None:
    config = AUTOENCODERS[name]
    assert f"-f{config.downsampling}" in name
    assert (config.n_embed is None) == name.startswith("kl") == config.double_z


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_model_that_draws(name: str) -> None:
    config = FAMILIES[name]
    assert config.name == name and ModelConfig.from_json(config.to_json()) == config
    parts = {part: nn.Identity() for part in PARTS if getattr(config, part) is not None}
    model = StableDiffusion(config, parts)
    height, width = model.image_size
    assert model.latent_shape(height, width)[1:] == (
        height // model.downsampling,
        width // model.downsampling,
    )
    if config.tokenizer is not None:
        assert config.text is not None
        tokenizer = Tokenizer.from_json(config.tokenizer)
        assert tokenizer.pad_id == config.text.pad_id and tokenizer.to_json() == config.tokenizer

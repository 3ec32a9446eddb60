"""Image-to-image, inpainting and editing against diffusers' pipelines: the same networks, the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato import Request
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.load import open_model
from sfumato.checkpoints.save import save_file
from sfumato.generation import generate
from sfumato.model import StableDiffusion, load
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import clip_json

UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=(1, 2),
    channel_mult=(1, 2), num_heads=4, use_spatial_transformer=True, context_dim=32, legacy=False,
)  # fmt: skip
CLIP = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
CONFIG = ModelConfig(
    "sd1", unet=UNET, autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1), text=CLIP,
    tokenizer=clip_json(), latent_scale=0.18215, image_size=(32, 32),
)  # fmt: skip
SIDE = 32
PROMPT, NEGATIVE = "a red apple", "blue"


@dataclass(frozen=True)
class Pair:
    """A model of ours and the networks that diffusers makes of it."""

    ours: StableDiffusion
    unet: Any
    vae: Any

    def pipeline(self, kind: str) -> Any:
        import diffusers

        scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        parts: dict[str, Any] = {
            "vae": self.vae, "unet": self.unet, "scheduler": scheduler, "text_encoder": None,
            "tokenizer": None, "safety_checker": None, "feature_extractor": None,
        }  # fmt: skip
        made = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made


def random_weights(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scaled = values / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1 * values
        parameter.data = scaled if parameter.ndim > 1 else scaled + 1
    return module


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Pair]:
    """Makes the pair whose U-Net has so many input channels."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    made: dict[int, Pair] = {}

    def make(channels: int) -> Pair:
        if channels not in made:
            path = folder / str(channels)
            config = replace(CONFIG, unet=replace(UNET, in_channels=channels))
            assert config.unet is not None and config.autoencoder is not None
            modules: dict[str, nn.Module] = {
                "unet": UNet(config.unet), "autoencoder": AutoencoderKL(config.autoencoder),
                "text": CLIPTextEncoder(CLIP),
            }  # fmt: skip
            states = {name: random_weights(module).state_dict() for name, module in modules.items()}
            # Its posterior has no width, so that a sample of it, which they take, is its mode.
            states["autoencoder"]["quant_conv.weight"][4:] = 0
            states["autoencoder"]["quant_conv.bias"][4:] = -30
            save_file(path.with_suffix(".safetensors"), config, states, torch.float32)
            convert(open_model(path.with_suffix(".safetensors")).opened, path)
            made[channels] = Pair(
                load(path.with_suffix(".safetensors"), device="cpu"),
                diffusers.UNet2DConditionModel.from_pretrained(path, subfolder="unet"),
                diffusers.AutoencoderKL.from_pretrained(path, subfolder="vae"),
            )
        return made[channels]

    return make


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Start noise that diffusers draws as well."""
    noise = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(5))
    for name in ("img2img", "inpaint", "instruct_pix2pix"):
        module = f"diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_{name}"
        monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: noise)
    return noise


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    """White in whole latents, where every rule of rounding agrees."""
    values = np.zeros((SIDE, SIDE), dtype=np.uint8)
    values[8:22, 10:26] = 255
    return Image.fromarray(values)


def texts(model: StableDiffusion) -> dict[str, Tensor | None]:
    return {
        "prompt_embeds": model.encode_prompt([PROMPT]).context,
        "negative_prompt_embeds": model.encode_prompt([NEGATIVE]).context,
    }


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of latents as a share of the largest of them."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def drawn(model: StableDiffusion, noise: Tensor, **fields: Any) -> Tensor:
    request = Request(
        prompt=PROMPT, negative_prompt=NEGATIVE, sampler="ddim", spacing="leading", steps=6, guidance=4.0,
        start_noise=noise, seed=0, init=picture(3), width=SIDE, height=SIDE, **fields,
    )  # fmt: skip
    return generate(model, request).latents


@pytest.mark.parametrize("strength", [0.3, 0.75])
@torch.no_grad()
def test_image_to_image(pair: Callable[[int], Pair], same_noise: Tensor, strength: float) -> None:
    both = pair(4)
    theirs = both.pipeline("StableDiffusionImg2ImgPipeline")(
        image=picture(3), strength=strength, num_inference_steps=6, guidance_scale=4.0, output_type="latent",
        **texts(both.ours),
    ).images  # fmt: skip
    ours = drawn(both.ours, same_noise, strength=strength)
    assert distance(ours, theirs) < 1e-4
    assert distance(drawn(both.ours, same_noise, strength=strength + 0.1), theirs) > 1e-3


@pytest.mark.parametrize(("channels", "strength"), [(4, 0.6), (9, 0.6), (9, 1.0)])
@torch.no_grad()
def test_inpainting(pair: Callable[[int], Pair], same_noise: Tensor, channels: int, strength: float) -> None:
    both = pair(channels)
    theirs = both.pipeline("StableDiffusionInpaintPipeline")(
        image=picture(3), mask_image=mask(), strength=strength, num_inference_steps=6, guidance_scale=4.0,
        width=SIDE, height=SIDE, output_type="latent", **texts(both.ours),
    ).images  # fmt: skip
    ours = drawn(both.ours, same_noise, strength=strength, mask=mask())
    assert distance(ours, theirs) < 1e-4
    assert distance(drawn(both.ours, same_noise, strength=strength), theirs) > 1e-3


@torch.no_grad()
def test_editing_by_instruction(pair: Callable[[int], Pair], same_noise: Tensor) -> None:
    both = pair(8)
    theirs = both.pipeline("StableDiffusionInstructPix2PixPipeline")(
        image=picture(3), num_inference_steps=6, guidance_scale=4.0, image_guidance_scale=1.7,
        output_type="latent", **texts(both.ours),
    ).images  # fmt: skip
    assert distance(drawn(both.ours, same_noise, image_guidance=1.7), theirs) < 1e-4
    assert distance(drawn(both.ours, same_noise, image_guidance=1.2), theirs) > 1e-3

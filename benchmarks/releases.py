"""What the released Stable Diffusion models look like from outside: tensors by name, and diffusers' configs.

The U-Net's and autoencoder's names come from our modules, which carry LDM's; text towers, which the released
files name in several ways, and diffusers' configs are written out here. Sources: the model cards and files of
CompVis, runwayml and stabilityai. A `tiny` family has the same layers, fewer and narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.unet import UNet
from sfumato.nn.unet_config import UNetConfig
from sfumato.runtime import shapes_only

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tower:
    """A text transformer; `layers` are those of the released file, `used` those that diffusers keeps."""

    width: int
    layers: int
    used: int
    heads: int
    activation: str
    pad: str = "<|endoftext|>"


@dataclass(frozen=True)
class Family:
    """One released model: networks, text towers by their prefix in the file, and what diffusers calls it."""

    name: str
    unet: UNetConfig
    autoencoder: AutoencoderConfig
    towers: dict[str, Tower]
    prediction: str = "epsilon"
    latent_scale: float = 0.18215  # LDM appendix G; the same factor in every SD 1 and 2 release
    dtype: torch.dtype = torch.float32  # of the released single file
    sample_size: int = 64

    @property
    def xl(self) -> bool:
        return self.unet.adm_in_channels is not None


CLIP_L = Tower(768, 12, 12, 12, "quick_gelu")
OPENCLIP_H = Tower(1024, 24, 23, 16, "gelu", pad="!")
OPENCLIP_BIGG = Tower(1280, 32, 32, 20, "gelu", pad="!")
SD1_TEXT = "cond_stage_model.transformer."
SD2_TEXT = "cond_stage_model.model."
SDXL_TEXT, SDXL_TEXT2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

SD1_UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=2,
    attention_resolutions=(4, 2, 1),
    channel_mult=(1, 2, 4, 4),
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=768,
    legacy=False,
)
SD2_UNET = replace(
    SD1_UNET, num_heads=-1, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True
)
SDXL_UNET = replace(
    SD2_UNET,
    channel_mult=(1, 2, 4),
    attention_resolutions=(4, 2),
    transformer_depth=(0, 2, 10),
    context_dim=2048,
    adm_in_channels=2816,
)

FAMILIES = {
    family.name: family
    for family in (
        Family("sd1", SD1_UNET, AutoencoderConfig(), {SD1_TEXT: CLIP_L}),
        Family("sd1-inpaint", replace(SD1_UNET, in_channels=9), AutoencoderConfig(), {SD1_TEXT: CLIP_L}),
        Family(
            "sd2-v", SD2_UNET, AutoencoderConfig(), {SD2_TEXT: OPENCLIP_H}, "v_prediction", sample_size=96
        ),
        Family(
            "sdxl",
            SDXL_UNET,
            AutoencoderConfig(),
            {SDXL_TEXT: CLIP_L, SDXL_TEXT2: OPENCLIP_BIGG},
            latent_scale=0.13025,  # sd_xl_base.yaml
            dtype=torch.float16,
            sample_size=128,
        ),
    )
}


def tiny(family: Family) -> Family:
    """The same family, small enough for a test: widths of 32 and 64, three or four layers of text."""
    width = 32 if family.unet.num_head_channels == -1 else 64
    towers = {
        prefix: replace(
            tower,
            width=64 if "0.transformer" in prefix or not family.xl else 128,
            layers=3 + tower.layers - tower.used,
            used=3,
            heads=1 if "0.transformer" in prefix or not family.xl else 2,
        )
        for prefix, tower in family.towers.items()
    }
    context = sum(tower.width for tower in towers.values())
    depth = (0, 1, 2) if family.xl else 1
    unet = replace(family.unet, model_channels=width, context_dim=context, transformer_depth=depth)
    if family.xl:
        unet = replace(unet, adm_in_channels=list(towers.values())[-1].width + 6 * 256)
    return replace(family, unet=unet, towers=towers, autoencoder=replace(family.autoencoder, ch=32))


def shapes(family: Family) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Every tensor of the released single file: its name, shape and dtype, in a fixed order."""
    with shapes_only():
        unet, autoencoder = UNet(family.unet), AutoencoderKL(family.autoencoder)
    for prefix, module in (("model.diffusion_model.", unet), ("first_stage_model.", autoencoder)):
        for name, tensor in module.state_dict().items():
            yield prefix + name, tuple(tensor.shape), family.dtype
    for prefix, tower in family.towers.items():
        named = hugging_face_tower(tower) if prefix.endswith("transformer.") else open_clip_tower(tower)
        for name, shape in named.items():
            yield prefix + name, shape, family.dtype
        if prefix.endswith("transformer."):
            yield prefix + "text_model.embeddings.position_ids", (1, 77), torch.int64


def hugging_face_tower(tower: Tower) -> Shapes:
    """CLIP as transformers 4 named it, which SD 1 and SDXL's first tower keep."""
    width = tower.width
    found: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        **_affine("text_model.final_layer_norm", width),
    }
    for layer in range(tower.layers):
        prefix = f"text_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _affine(f"{prefix}.self_attn.{name}", width, width)
        found |= _affine(f"{prefix}.layer_norm1", width) | _affine(f"{prefix}.layer_norm2", width)
        found |= _affine(f"{prefix}.mlp.fc1", 4 * width, width)
        found |= _affine(f"{prefix}.mlp.fc2", width, 4 * width)
    return found


def open_clip_tower(tower: Tower) -> Shapes:
    """OpenCLIP's text transformer, whose projections of q, k and v are one matrix."""
    width = tower.width
    found: Shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (49408, width),
        **_affine("ln_final", width),
    }
    for layer in range(tower.layers):
        prefix = f"transformer.resblocks.{layer}"
        found |= {
            f"{prefix}.attn.in_proj_weight": (3 * width, width),
            f"{prefix}.attn.in_proj_bias": (3 * width,),
        }
        found |= _affine(f"{prefix}.attn.out_proj", width, width)
        found |= _affine(f"{prefix}.ln_1", width) | _affine(f"{prefix}.ln_2", width)
        found |= _affine(f"{prefix}.mlp.c_fc", 4 * width, width)
        found |= _affine(f"{prefix}.mlp.c_proj", width, 4 * width)
    return found


def _affine(name: str, out_features: int, *in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, *in_features), f"{name}.bias": (out_features,)}


# diffusers' configs, one function a component; the values are those of the released folders.

Config = dict[str, Any]


def unet_config(family: Family) -> Config:
    unet = family.unet
    levels = len(unet.channel_mult)
    attends = [2**level in unet.attention_resolutions for level in range(levels)]
    blocks = ["CrossAttn" if attend else "" for attend in attends]
    widths = [unet.model_channels * factor for factor in unet.channel_mult]
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8 if unet.num_heads == 8 else [width // 64 for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": [f"{block}DownBlock2D" for block in blocks],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": unet.out_channels,
        "sample_size": family.sample_size,
        "up_block_types": [f"{block}UpBlock2D" for block in reversed(blocks)],
        "use_linear_projection": unet.use_linear_in_transformer,
    }
    if family.xl:
        depth = unet.transformer_depth
        assert isinstance(depth, tuple)
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": unet.adm_in_channels,
            "transformer_layers_per_block": [max(number, 1) for number in depth],
        }
    return config


def vae_config(family: Family) -> Config:
    widths = list(family.autoencoder.widths)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "force_upcast": family.xl,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 8 * family.sample_size,
        "scaling_factor": family.latent_scale,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def text_config(tower: Tower, *, projection: bool) -> Config:
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": tower.activation,
        "hidden_size": tower.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * tower.width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": tower.heads,
        "num_hidden_layers": tower.used,
        "pad_token_id": 1,
        "projection_dim": tower.width,
        "vocab_size": 49408,
    }


def scheduler_config(family: Family) -> Config:
    kind = {"sd1": "PNDMScheduler", "sd1-inpaint": "DDIMScheduler", "sd2-v": "DDIMScheduler"}
    return {
        "_class_name": kind.get(family.name, "EulerDiscreteScheduler"),
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": family.prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def folder_configs(family: Family) -> dict[str, Config]:
    """Every JSON file of the diffusers folder but the tokenizers' own, by its path in the folder."""
    towers = list(family.towers.values())
    second = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]} if family.xl else {}
    second |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]} if family.xl else {}
    rest: Config = {"force_zeros_for_empty_prompt": True}
    if not family.xl:
        rest = {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    index: Config = {
        "_class_name": pipeline_name(family),
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", scheduler_config(family)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **second,
        **rest,
    }
    configs = {
        "model_index.json": index,
        "unet/config.json": unet_config(family),
        "vae/config.json": vae_config(family),
        "text_encoder/config.json": text_config(towers[0], projection=False),
        "scheduler/scheduler_config.json": scheduler_config(family),
    }
    return configs | (
        {"text_encoder_2/config.json": text_config(towers[1], projection=True)} if family.xl else {}
    )


def pipeline_name(family: Family) -> str:
    if family.xl:
        return "StableDiffusionXLPipeline"
    return "StableDiffusionInpaintPipeline" if family.unet.in_channels == 9 else "StableDiffusionPipeline"

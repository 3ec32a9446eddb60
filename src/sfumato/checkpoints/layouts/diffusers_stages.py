"""The `config.json` of a diffusers autoencoder and of a CLIP text encoder as ours, and the way back.

Source of names and default values: diffusers' AutoencoderKL and VQModel, transformers' CLIPTextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sfumato.checkpoints.layouts.diffusers_unet import UP, BlocksRecord, attended_levels, base_width
from sfumato.checkpoints.schema import (
    WRITTEN_FOR,
    Count,
    Record,
    architectures,
    built,
    expressible,
    only,
    parse,
)
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.bert import BERTConfig
from sfumato.nn.clip import CLIPTextConfig


class AutoencoderRecord(BlocksRecord):
    """AutoencoderKL and VQModel."""

    in_channels: Count = 3
    out_channels: Count = 3
    layers_per_block: Count = 1
    latent_channels: Count = 4
    num_vq_embeddings: Count = 256
    vq_embed_dim: Count | None = None
    scaling_factor: Annotated[float, Field(gt=0, le=1e6)] = 0.18215


class TextRecord(Record):
    """CLIPTextModel and CLIPTextModelWithProjection."""

    vocab_size: Count = 49408
    hidden_size: Count = 512
    intermediate_size: Count = 2048
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Count = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    projection_dim: Count = 512
    eos_token_id: Annotated[int, Field(ge=0)] = 49407


ONLY_AUTOENCODER: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
}
ENCODER_BLOCKS = {"AttnDownEncoderBlock2D": True, "DownEncoderBlock2D": False}


def autoencoder_config(values: Mapping[str, Any], place: Path) -> tuple[AutoencoderConfig, float]:
    """AutoencoderKL or VQModel as ours, and what multiplies its latents."""
    only(values, ONLY_AUTOENCODER, place)
    record = parse(AutoencoderRecord, values, place)
    attended = attended_levels(record, ENCODER_BLOCKS, place)
    width, factors = base_width(record.block_out_channels, place)
    quantised = values.get("_class_name") == "VQModel"
    embed_dim = record.vq_embed_dim if quantised and record.vq_embed_dim else record.latent_channels
    resolution = 256
    return built(
        lambda: AutoencoderConfig(
            z_channels=record.latent_channels,
            resolution=resolution,
            in_channels=record.in_channels,
            out_ch=record.out_channels,
            ch=width,
            ch_mult=factors,
            num_res_blocks=record.layers_per_block,
            attn_resolutions=tuple(resolution >> level for level in attended),
            double_z=not quantised,
            embed_dim=embed_dim,
            num_groups=record.norm_num_groups,
            n_embed=record.num_vq_embeddings if quantised else None,
        ),
        place,
    ), record.scaling_factor


def autoencoder_values(config: AutoencoderConfig, latent_scale: float) -> dict[str, Any]:
    """The inverse. `CheckpointError` for a network that diffusers has none of."""
    levels = range(len(config.ch_mult))
    quantised = config.n_embed is not None
    expressible(
        {
            "a first level wider than ch": config.ch_mult[0] != 1,
            "pooling between levels": not config.resamp_with_conv,
            "this kind of attention": config.attn_type != "vanilla",
            "a decoder without its last layer": config.give_pre_end or config.tanh_out,
            "an encoder without variance": not quantised and not config.double_z,
            "latents of fewer channels than the encoder's": not quantised
            and config.z_channels != config.embed_dim,
        }
    )
    resolutions = [config.resolution >> level for level in levels]
    attended = [side in config.attn_resolutions for side in resolutions]
    down = ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attended]
    values: dict[str, Any] = {
        "_class_name": "VQModel" if quantised else "AutoencoderKL",
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": down,
        "in_channels": config.in_channels,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.num_groups,
        "out_channels": config.out_ch,
        "sample_size": config.resolution,
        "scaling_factor": latent_scale,
        "up_block_types": [UP[name] for name in reversed(down)],
    }
    if quantised:
        values |= {"num_vq_embeddings": config.n_embed, "vq_embed_dim": config.embed_dim}
    return values


def text_config(values: Mapping[str, Any], place: Path, pad: int | None) -> CLIPTextConfig:
    """CLIPTextModel or CLIPTextModelWithProjection as ours; `pad` is the id that the tokenizer pads with.

    The end token is the vocabulary's last: the released configs' `eos_token_id` of 2 is a mistake of old.
    """
    record = parse(TextRecord, values, place)
    end = record.eos_token_id if record.eos_token_id != 2 else record.vocab_size - 1
    projected = "CLIPTextModelWithProjection" in architectures(values)
    return built(
        lambda: CLIPTextConfig(
            vocab_size=record.vocab_size,
            hidden_size=record.hidden_size,
            intermediate_size=record.intermediate_size,
            num_hidden_layers=record.num_hidden_layers,
            num_attention_heads=record.num_attention_heads,
            max_position_embeddings=record.max_position_embeddings,
            hidden_act=record.hidden_act,  # type: ignore[arg-type]  # the config itself refuses others
            layer_norm_eps=record.layer_norm_eps,
            eos_token_id=end,
            projection_dim=record.projection_dim if projected else None,
            pad_token_id=pad if pad != end else None,
        ),
        place,
    )


def text_values(config: CLIPTextConfig) -> dict[str, Any]:
    """The inverse."""
    projected = config.projection_dim is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.eos_token_id - 1,
        "eos_token_id": config.eos_token_id,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "clip_text_model",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": config.eos_token_id if config.pad_token_id is None else config.pad_token_id,
        "projection_dim": config.projection_dim or config.hidden_size,
        "vocab_size": config.vocab_size,
    }


class BERTRecord(Record):
    """LDMBertModel, of diffusers' LDMTextToImagePipeline."""

    vocab_size: Count = 30522
    max_position_embeddings: Count = 77
    encoder_layers: Count = 32
    encoder_ffn_dim: Count = 5120
    encoder_attention_heads: Count = 8
    head_dim: Count = 64
    d_model: Count = 1280
    activation_function: str = "gelu"


def bert_config(values: Mapping[str, Any], place: Path) -> BERTConfig:
    """LDMBertModel as ours."""
    only(values, {"activation_function": ("gelu",), "scale_embedding": (False,)}, place)
    record = parse(BERTRecord, values, place)
    only({"encoder_ffn_dim": record.encoder_ffn_dim}, {"encoder_ffn_dim": (4 * record.d_model,)}, place)
    return built(
        lambda: BERTConfig(
            n_embed=record.d_model,
            n_layer=record.encoder_layers,
            vocab_size=record.vocab_size,
            max_seq_len=record.max_position_embeddings,
            heads=record.encoder_attention_heads,
            dim_head=record.head_dim,
        ),
        place,
    )


def bert_values(config: BERTConfig) -> dict[str, Any]:
    """The inverse."""
    return {
        "activation_function": "gelu",
        "architectures": ["LDMBertModel"],
        "d_model": config.n_embed,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": 4 * config.n_embed,
        "encoder_layers": config.n_layer,
        "head_dim": config.dim_head,
        "max_position_embeddings": config.max_seq_len,
        "model_type": "ldmbert",
        "pad_token_id": 0,
        "scale_embedding": False,
        "vocab_size": config.vocab_size,
    }

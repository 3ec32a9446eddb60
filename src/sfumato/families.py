"""The released models as configurations: Stable Diffusion 1, 2 and XL, and the zoo of latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.bert import BERTConfig
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import clip_json

SD_SCALE = 0.18215  # latent std: LDM appendix G
SDXL_SCALE = 0.13025  # sd_xl_base.yaml, scale_factor
X4_SCALE = 0.08333  # x4-upscaling.yaml, scale_factor
ZOO_SCHEDULE = ScheduleConfig(beta_start=0.0015, beta_end=0.0195)  # linear_start, linear_end of its configs

# Autoencoders: models/first_stage_models/*/config.yaml of CompVis/latent-diffusion; SD's is kl-f8.
_VQ_F4 = AutoencoderConfig(z_channels=3, ch_mult=(1, 2, 4), double_z=False, embed_dim=3, n_embed=8192)
_VQ_F8 = replace(
    _VQ_F4, z_channels=4, embed_dim=4, n_embed=16384, ch_mult=(1, 2, 2, 4), attn_resolutions=(32,)
)
_KL_F16 = AutoencoderConfig(z_channels=16, embed_dim=16, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,))
AUTOENCODERS: Mapping[str, AutoencoderConfig] = {
    "kl-f4": AutoencoderConfig(z_channels=3, embed_dim=3, ch_mult=(1, 2, 4)),
    "kl-f4-z4": AutoencoderConfig(ch_mult=(1, 2, 4)),  # Stable Diffusion's x4 upscaler
    "kl-f8": AutoencoderConfig(),
    "kl-f16": _KL_F16,
    "kl-f32": replace(
        _KL_F16, z_channels=64, embed_dim=64, ch_mult=(1, 1, 2, 2, 4, 4), attn_resolutions=(16, 8)
    ),
    "vq-f4": _VQ_F4,
    "vq-f4-noattn": replace(_VQ_F4, attn_type="none"),
    "vq-f8": _VQ_F8,
    "vq-f8-n256": replace(_VQ_F8, n_embed=256),
    "vq-f16": replace(_VQ_F8, z_channels=8, embed_dim=8, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,)),
}

# Text towers: openai/clip-vit-large-patch14, laion/CLIP-ViT-H-14 and CLIP-ViT-bigG-14.
CLIP_L = CLIPTextConfig()
OPENCLIP_H = CLIPTextConfig(  # without the 24th layer, which Stable Diffusion 2 does not read
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
    pad_token_id=0,
)
OPENCLIP_BIGG = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    pad_token_id=0,
)

# U-Nets: v1-inference.yaml, v2-inference.yaml, x4-upscaling.yaml, sd_xl_base.yaml, and the zoo's
# models/ldm/*/config.yaml.
_SD1 = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=2,
    attention_resolutions=(1, 2, 4),
    channel_mult=(1, 2, 4, 4),
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=768,
    legacy=False,
)
_SD2 = replace(_SD1, num_heads=-1, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True)
_X4 = replace(  # sample and small picture; told how noisy that is
    _SD2,
    in_channels=7,
    model_channels=256,
    attention_resolutions=(2, 4, 8),
    channel_mult=(1, 2, 2, 4),
    num_heads=8,
    num_head_channels=-1,
    num_classes=1000,
    disable_self_attentions=(True, True, True, False),
)
_SDXL = replace(
    _SD2,
    channel_mult=(1, 2, 4),
    attention_resolutions=(2, 4),
    transformer_depth=(1, 2, 10),
    num_classes="sequential",
    adm_in_channels=2816,
    context_dim=2048,
)
_PLAIN = UNetConfig(  # celebahq, ffhq and lsun_bedrooms
    in_channels=3,
    out_channels=3,
    model_channels=224,
    num_res_blocks=2,
    attention_resolutions=(2, 4, 8),
    channel_mult=(1, 2, 3, 4),
    num_head_channels=32,
    legacy=False,
)
_CHURCHES = replace(
    _PLAIN,
    in_channels=4,
    out_channels=4,
    model_channels=192,
    attention_resolutions=(1, 2, 4, 8),
    channel_mult=(1, 2, 2, 4, 4),
    num_heads=8,
    num_head_channels=-1,
    use_scale_shift_norm=True,
    resblock_updown=True,
    conv_resample=False,
)
_CIN = replace(  # cin256-v2
    _PLAIN,
    model_channels=192,
    channel_mult=(1, 2, 3, 5),
    num_heads=1,
    num_head_channels=-1,
    use_spatial_transformer=True,
    context_dim=512,
)
_CIN_F8 = replace(
    _CIN,
    in_channels=4,
    out_channels=4,
    model_channels=256,
    attention_resolutions=(1, 2, 4),
    channel_mult=(1, 2, 4),
    num_heads=-1,
    num_head_channels=32,
)

_SD1_MODEL = ModelConfig(
    name="sd1",
    unet=_SD1,
    autoencoder=AUTOENCODERS["kl-f8"],
    text=CLIP_L,
    tokenizer=clip_json(),
    latent_scale=SD_SCALE,
    image_size=(512, 512),
)
_SD2_MODEL = replace(_SD1_MODEL, name="sd2-base", unet=_SD2, text=OPENCLIP_H, tokenizer=clip_json("!"))
_ZOO_MODEL = ModelConfig(
    name="ldm-unconditional",
    unet=_PLAIN,
    autoencoder=AUTOENCODERS["vq-f4"],
    schedule=ZOO_SCHEDULE,
    image_size=(256, 256),
)
_MODELS = (
    _SD1_MODEL,
    replace(_SD1_MODEL, name="sd1-inpaint", unet=replace(_SD1, in_channels=9)),
    replace(_SD1_MODEL, name="instruct-pix2pix", unet=replace(_SD1, in_channels=8)),
    _SD2_MODEL,
    replace(_SD2_MODEL, name="sd2-inpaint", unet=replace(_SD2, in_channels=9)),
    replace(_SD2_MODEL, name="sd2", prediction="v", image_size=(768, 768)),
    replace(
        _SD2_MODEL,
        name="sd-x4-upscaler",
        unet=_X4,
        autoencoder=AUTOENCODERS["kl-f4-z4"],
        schedule=ScheduleConfig(beta_start=0.0001, beta_end=0.02),
        prediction="v",
        latent_scale=X4_SCALE,
        defaults={"guidance": 9.0},  # its model card
    ),
    replace(
        _SD1_MODEL,
        name="sdxl",
        unet=_SDXL,
        text2=OPENCLIP_BIGG,
        latent_scale=SDXL_SCALE,
        image_size=(1024, 1024),
        clip_skip=2,
        text_normed=False,
        zeros_for_empty=True,
    ),
    _ZOO_MODEL,
    replace(
        _ZOO_MODEL,
        name="ldm-churches",
        unet=_CHURCHES,
        autoencoder=AUTOENCODERS["kl-f8"],
        schedule=replace(ZOO_SCHEDULE, beta_end=0.0155),
    ),
    replace(
        _ZOO_MODEL,
        name="ldm-cin256",
        unet=_CIN_F8,
        autoencoder=AUTOENCODERS["vq-f8"],
        classes=ClassEmbedderConfig(n_classes=1000, unconditional=False),
    ),
    replace(_ZOO_MODEL, name="ldm-cin256-v2", unet=_CIN, classes=ClassEmbedderConfig()),
    replace(
        _SD1_MODEL,
        name="ldm-text2img-large",
        unet=replace(_SD1, context_dim=1280),
        text=None,
        tokenizer=None,  # BERT's vocabulary comes from its user
        bert=BERTConfig(),
        image_size=(256, 256),
    ),
)
FAMILIES: Mapping[str, ModelConfig] = {model.name: model for model in _MODELS}

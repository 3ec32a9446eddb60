"""Released models told by the shape of their U-Net, and what a family has beyond what shapes tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sfumato.errors import CheckpointError
from sfumato.families import AUTOENCODERS, FAMILIES
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import PARTS, ModelConfig


def _unet(name: str) -> UNetConfig:
    unet = FAMILIES[name].unet
    assert unet is not None
    return unet


SD1, SD2, SDXL = _unet("sd1"), _unet("sd2"), _unet("sdxl")
PLAIN, CIN = _unet("ldm-unconditional"), _unet("ldm-cin256-v2")
BY_WIDTH = {"num_heads": -1, "num_head_channels": 32}
BY_NUMBER = {"num_heads": 8, "num_head_channels": -1}

UNETS: Mapping[str, UNetConfig] = {
    "sd1": SD1,
    "sd1-inpaint": _unet("sd1-inpaint"),
    "instruct-pix2pix": _unet("instruct-pix2pix"),
    "sd2": SD2,
    "sd2-inpaint": _unet("sd2-inpaint"),
    "sd-x4-upscaler": _unet("sd-x4-upscaler"),
    "sdxl": SDXL,
    "sdxl-inpaint": replace(SDXL, in_channels=9),
    # Distilled by leaving blocks out: BK-SDM (Kim et al. 2023), SSD-1B and Vega (Gupta et al. 2024), KOALA
    # (Lee et al. 2023).
    "bk-sdm-base": replace(SD1, num_res_blocks=1),
    "bk-sdm-small": replace(SD1, num_res_blocks=1, middle="none"),
    "bk-sdm-tiny": replace(SD1, num_res_blocks=1, channel_mult=(1, 2, 4), middle="none"),
    "ssd-1b": replace(
        SDXL,
        transformer_depth=(1, 2, 4),
        middle="residual",
        transformer_depth_output=(4, 4, 10, 2, 1, 1, 0, 0, 0),
    ),
    "segmind-vega": replace(SDXL, transformer_depth=(1, 1, 2), middle="residual"),
    "koala-1b": replace(SDXL, num_res_blocks=1, transformer_depth=(1, 2, 6)),
    "koala-700m": replace(SDXL, num_res_blocks=1, transformer_depth=(1, 2, 5), middle="none"),
    # The model zoo of CompVis/latent-diffusion; numbers from its configs.
    "ldm-unconditional": PLAIN,
    "ldm-churches": _unet("ldm-churches"),
    "ldm-cin256": _unet("ldm-cin256"),
    "ldm-cin256-v2": CIN,
    "ldm-text2img256": replace(CIN, **BY_WIDTH, context_dim=640),
    "ldm-text2img-large": _unet("ldm-text2img-large"),  # the 1.45 B model
    "ldm-layout2img": replace(
        CIN, **BY_WIDTH, model_channels=128, channel_mult=(1, 2, 3, 4), transformer_depth=3
    ),
    "ldm-super-resolution": replace(
        PLAIN, in_channels=6, model_channels=160, attention_resolutions=(8,), channel_mult=(1, 2, 2, 4)
    ),
    "ldm-inpaint": replace(
        PLAIN, **BY_NUMBER, in_channels=7, model_channels=256, resblock_updown=True, conv_resample=False
    ),
    "ldm-semantic": replace(
        PLAIN,
        **BY_NUMBER,
        in_channels=6,
        model_channels=128,
        attention_resolutions=(),
        channel_mult=(1, 4, 8),
    ),
}
# What models descend from, and the released one that stands for it.
X4 = "sd-x4-upscaler"
BASES = {"sd1": "sd1", "sd2": "sd2-base", X4: X4, "sdxl": "sdxl", "ldm": "ldm-unconditional"}
NOISIER = {  # linear_end of those in the zoo that differ and are not in FAMILIES
    "ldm-super-resolution": 0.0155,
    "ldm-layout2img": 0.0205,
    "ldm-inpaint": 0.0205,
    "ldm-semantic": 0.0205,
}


def family_of(unet: UNetConfig) -> str | None:
    """The released model with this U-Net, whatever its heads, which shapes do not tell."""
    given = plain_form(unet)
    for name, known in UNETS.items():
        if replace(given, num_heads=known.num_heads, num_head_channels=known.num_head_channels) == known:
            return name
    return None


def plain_form(unet: UNetConfig) -> UNetConfig:
    """The same network with the options that make no difference to it as they are in UNETS."""
    levels = range(len(unet.channel_mult))
    attended = [level for level in levels if unet.attended(level)]
    depths = tuple(unet.depth(level) if level in attended else 1 for level in levels)
    mirrored = tuple(
        unet.depth(level) if level in attended else 0
        for level in reversed(levels)
        for _ in range(unet.residual_blocks(level) + 1)
    )
    middle, output = unet.transformer_depth_middle, unet.transformer_depth_output
    # The decoder alone may have attention in a level; then its blocks count as well.
    used = attended if output is None else levels
    reads = tuple(level not in used or not unet.self_attends(level) for level in levels)
    return replace(
        unet,
        dropout=0.0,
        legacy=False,
        num_heads_upsample=-1,
        attention_resolutions=tuple(2**level for level in attended),
        transformer_depth=depths[attended[0]] if len({depths[level] for level in attended}) == 1 else depths,
        transformer_depth_middle=None if middle == depths[-1] else middle,
        transformer_depth_output=None if output == mirrored else output,
        conv_resample=unet.conv_resample and not unet.resblock_updown,
        disable_self_attentions=reads if any(reads[level] for level in used) else None,
    )


def base_of(parts: Mapping[str, object], unet: UNetConfig | None) -> str:
    """Which of BASES a model descends from: its text encoders tell, or else its U-Net."""
    if "bert" in parts or "classes" in parts:
        return "ldm"
    if "text2" in parts or (unet is not None and unet.adm_in_channels is not None):
        return "sdxl"
    if unet is not None and isinstance(unet.num_classes, int) and unet.disable_self_attentions:
        return X4
    if "text" in parts:
        return "sd2" if getattr(parts["text"], "pad_token_id", None) == 0 else "sd1"
    if unet is None or unet.context_dim is None:
        return "ldm"
    if unet.use_linear_in_transformer:
        return "sd2"
    return "sd1" if unet.context_dim == SD1.context_dim else "ldm"


def with_heads(
    unet: UNetConfig, family: str | None, base: str, metadata: Mapping[str, str]
) -> tuple[UNetConfig, str]:
    """(the U-Net with its attention heads, what tells them). Raises `CheckpointError` for impossible ones."""
    given = {key: metadata[key] for key in ("num_heads", "num_head_channels") if key in metadata}
    heads = {"num_heads": -1, "num_head_channels": -1}
    if given:
        if not all(
            value.isdecimal() and 0 < int(value) <= unet.model_channels * 64 for value in given.values()
        ):
            raise CheckpointError(
                f"the metadata ask for heads of {given}", "They are positive whole numbers."
            )
        heads |= {key: int(value) for key, value in given.items()}
        why = "the file's metadata"
    elif family is not None:
        known = UNETS[family]
        heads = {"num_heads": known.num_heads, "num_head_channels": known.num_head_channels}
        why = f"those of {family}"
    else:
        known = _unet(BASES[base])
        heads = {"num_heads": known.num_heads, "num_head_channels": known.num_head_channels}
        if base == "ldm" and unet.resblock_updown:
            heads = BY_NUMBER
        why = f"as in {base}; shapes do not tell them"
    return replace(unet, **heads), why


def template(family: str | None, base: str) -> ModelConfig:
    """A model of the family without its networks: schedule, latent scale, size and rules for text."""
    known = BASES[base] if family in (None, "sd2") else family
    stands = FAMILIES.get(known, FAMILIES[BASES[base]])
    model = replace(stands, tokenizer=None, **dict.fromkeys(PARTS))
    if family in NOISIER:
        return replace(model, schedule=replace(model.schedule, beta_end=NOISIER[family]))
    return model


def concat_of(family: str | None, unet: UNetConfig, autoencoder: AutoencoderConfig | None) -> str | None:
    """What a network of latent diffusion that follows nothing is shown, where it is not what numbers say.

    Its inpainting and its super-resolution are told by latents with a codebook, which no later model has.
    """
    if family is None and unet.context_dim is None and autoencoder is not None and autoencoder.n_embed:
        count = unet.in_channels - unet.out_channels
        return {autoencoder.in_channels: "enlarges", 1 + unet.out_channels: "inpaints_black"}.get(count)
    return {"ldm-super-resolution": "enlarges", "ldm-inpaint": "inpaints_black"}.get(family or "")


def autoencoder_family(config: AutoencoderConfig) -> str:
    """The released autoencoder of this shape, or its kind and factor."""
    for name, known in AUTOENCODERS.items():
        if config == known:
            return name
    return f"{'kl' if config.n_embed is None else 'vq'}-f{config.downsampling}"

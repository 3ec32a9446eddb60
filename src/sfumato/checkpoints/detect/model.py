"""From the networks of a file to the model they make: its family, its rules, what it predicts and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.checkpoints.detect.families import (
    autoencoder_family,
    base_of,
    concat_of,
    family_of,
    template,
)
from sfumato.checkpoints.detect.prediction import Evidence, weigh
from sfumato.checkpoints.source import TensorInfo
from sfumato.errors import CheckpointError
from sfumato.families import SD_SCALE, X4_SCALE
from sfumato.presets import ModelConfig

TOWERS = {768: "clip-l", 1024: "openclip-h", 1280: "openclip-bigg"}  # by width
SIZE_FEATURES = 6 * 256  # of SDXL's vector: Fourier features of six sizes, after the pooled text
SD2_V_SIDE = 768


def describe_model(
    configs: Mapping[str, Any],
    metadata: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    prediction: str | None,
) -> tuple[str, ModelConfig, Evidence]:
    """(family, the model's configuration, evidence of its prediction) of networks read from their shapes.

    The family is the name of a released model, or "like " and what it descends from.
    """
    unet = configs.get("unet")
    base = base_of(configs, unet)
    if unet is None:
        family, scale = _alone(configs)
        config = replace(template(None, base), name=family, latent_scale=scale, **configs)
        return family, config, Evidence("eps", "there is no U-Net that predicts")
    known = family_of(unet)
    evidence = weigh(prediction, metadata, infos, base, unet.in_channels, known or base)
    config = replace(template(known, base), name=known or base, prediction=evidence.prediction, **configs)
    config = replace(config, concat=concat_of(known, unet, configs.get("autoencoder")))
    if evidence.zero_terminal_snr:
        config = replace(config, schedule=replace(config.schedule, zero_terminal_snr=True))
    if base == "sd2" and known in (None, "sd2") and evidence.prediction == "v":
        config = replace(config, image_size=(SD2_V_SIDE, SD2_V_SIDE))
    return known or f"like {base}", config, evidence


def describe_own(own: ModelConfig, prediction: str | None) -> tuple[str, ModelConfig, Evidence]:
    """The same for a file that describes itself."""
    configs = {
        part: getattr(own, part) for part in ("text", "text2", "bert", "classes") if getattr(own, part)
    }
    family = own.name
    if own.unet is not None:
        family = family_of(own.unet) or f"like {base_of(configs, own.unet)}"
    if prediction is None:
        return family, own, Evidence(own.prediction, "the file describes itself")
    evidence = weigh(prediction, {}, (), "", 0)
    return family, replace(own, prediction=evidence.prediction), evidence


def _alone(configs: Mapping[str, Any]) -> tuple[str, float]:
    """(family, latent scale) of parts without a U-Net."""
    if "autoencoder" in configs:
        family = autoencoder_family(configs["autoencoder"])
        return family, {"kl-f8": SD_SCALE, "kl-f4-z4": X4_SCALE}.get(family, 1.0)
    for part in ("text", "text2"):
        if part in configs:
            return TOWERS.get(configs[part].hidden_size, "clip"), 1.0
    return next(iter(configs)), 1.0


def check_together(configs: Mapping[str, Any]) -> None:
    """`CheckpointError` where the networks of one file do not fit each other."""
    if "unet" not in configs:
        return
    unet = configs["unet"]
    widths = [configs[part].hidden_size for part in ("text", "text2") if part in configs]
    widths += [configs["bert"].n_embed] if "bert" in configs else []
    widths += [configs["classes"].embed_dim] if "classes" in configs else []
    wrong = []
    if widths and "text2" not in configs and sum(widths) != unet.context_dim:
        wrong.append(f"the U-Net takes a context {unet.context_dim} wide, its encoder gives {sum(widths)}")
    if "text" in configs and "text2" in configs:
        if sum(widths) != unet.context_dim:
            wrong.append(f"the U-Net takes a context {unet.context_dim} wide, its encoders give {widths}")
        pooled = configs["text2"].projection_dim or configs["text2"].hidden_size
        if unet.adm_in_channels != pooled + SIZE_FEATURES:
            wanted = pooled + SIZE_FEATURES
            wrong.append(f"the U-Net (label_emb) takes a vector of {unet.adm_in_channels}, not {wanted}")
    if "autoencoder" in configs and configs["autoencoder"].embed_dim != unet.out_channels:
        latent = configs["autoencoder"].embed_dim
        wrong.append(f"the U-Net gives {unet.out_channels} channels, the autoencoder takes {latent}")
    if wrong:
        raise CheckpointError(
            f"the parts do not go together: {'; '.join(wrong)}",
            "The file was put together of several models, or is damaged.",
        )

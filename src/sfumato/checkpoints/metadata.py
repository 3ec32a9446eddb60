"""The metadata of a written file: our own record, and what other tools read (modelspec 1.0.0)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from sfumato.presets import PARTS, ModelConfig

METADATA_KEY = "sfumato"
ARCHITECTURES = {  # family -> architecture and implementation of https://github.com/Stability-AI/ModelSpec
    "sd1": ("stable-diffusion-v1", "https://github.com/CompVis/stable-diffusion"),
    "sd1-inpaint": ("stable-diffusion-v1-inpainting", "https://github.com/CompVis/stable-diffusion"),
    "sd2": ("stable-diffusion-v2-512", "https://github.com/Stability-AI/stablediffusion"),
    "sd2-v": ("stable-diffusion-v2-768-v", "https://github.com/Stability-AI/stablediffusion"),
    "sdxl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models"),
}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v", "x0": "sample"}


def describe(config: ModelConfig, family: str, parts: Collection[str]) -> dict[str, str]:
    """Metadata of a single file that holds these parts of a model."""
    gone = {part: None for part in PARTS if part not in parts}
    tokenizer = config.tokenizer if {"text", "bert"} & set(parts) else None
    own = dataclasses.replace(config, tokenizer=tokenizer, **gone)
    values = {"format": "pt", METADATA_KEY: own.to_json()}
    if own.unet is None:
        return values
    key = f"{family}-v" if family == "sd2" and config.prediction == "v" else family
    architecture, implementation = ARCHITECTURES.get(key, (f"latent-diffusion/{family}", "sfumato"))
    values |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": config.name,
        "modelspec.prediction_type": PREDICTION_TYPES[config.prediction],
    }
    if len(config.image_size) == 2:
        height, width = config.image_size
        values["modelspec.resolution"] = f"{width}x{height}"
    return values

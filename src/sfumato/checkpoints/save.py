"""From networks to one self-describing safetensors file under Stable Diffusion's own tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.files import converted, write_tensors
from sfumato.checkpoints.layouts.tables import PARTS, generate, prefix, to_foreign
from sfumato.checkpoints.metadata import METADATA_KEY
from sfumato.presets import ModelConfig


def save_file(
    path: Path, config: ModelConfig, parts: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write the state dicts of `parts` ("unet", "autoencoder", ...: those `config` has) and the config.

    Raises `NumericalError` before anything is written if a weight is not finite in `dtype`.
    """
    described = {part for part in PARTS if getattr(config, part) is not None}
    assert described == parts.keys(), f"the config has {described}, the weights are of {set(parts)}"
    tensors = {
        prefix(part, "ldm", config) + name: tensor
        for part, state in parts.items()
        for name, tensor in to_foreign(generate(part, getattr(config, part), "ldm"), state).items()
    }
    write_tensors(path, converted(tensors, dtype), {METADATA_KEY: config.to_json()})

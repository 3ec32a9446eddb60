"""From networks to one self-describing safetensors file under Stable Diffusion's own tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.load import METADATA_KEY, PREFIXES
from sfumato.errors import NumericalError
from sfumato.presets import ModelConfig


def save_file(
    path: Path, config: ModelConfig, parts: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write the state dicts of `parts` ("unet", "autoencoder", "text") with their configuration.

    Raises `NumericalError` before anything is written if a weight is not finite in `dtype`.
    """
    tensors = {
        PREFIXES[part] + name: tensor.to(dtype)
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NumericalError(
                f"{name} is not finite as {dtype}; nothing was written", "Lower the learning rate."
            )
    write_tensors(path, tensors, {METADATA_KEY: config.to_json()})

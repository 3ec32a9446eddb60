"""From a model file to networks: built without memory, then given the file's tensors, every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import read_tensors, sha256
from sfumato.errors import CheckpointError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig

METADATA_KEY = "sfumato"
PREFIXES = {  # Stable Diffusion's own names, so that other tools find the parts
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
_NETWORKS = {"unet": UNet, "autoencoder": AutoencoderKL, "text": CLIPTextEncoder}


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds: its configuration, its networks in evaluation mode, its digest."""

    config: ModelConfig
    modules: Mapping[str, nn.Module]
    digest: str


def load_file(path: Path, dtype: torch.dtype | None = None) -> ModelFile:
    """Read a model that this package wrote. `dtype` None keeps the file's own.

    Raises `CheckpointError` for a damaged file, or naming the first ten keys that do not fit.
    """
    tensors, metadata = read_tensors(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} does not describe its model", "Give a model.safetensors that `sfumato train` wrote."
        )
    config = ModelConfig.from_json(metadata[METADATA_KEY])
    modules: dict[str, nn.Module] = {}
    used: set[str] = set()
    for part, prefix in PREFIXES.items():
        part_config = getattr(config, part)
        if part_config is not None:
            with torch.device("meta"):
                modules[part] = _NETWORKS[part](part_config)
            own = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
            assign(modules[part], {name: tensors[full] for name, full in own.items()}, dtype, str(path))
            used.update(own.values())
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that no part of the model has: {unknown[:10]}", "Get it again."
        )
    return ModelFile(config, modules, sha256(path))


def assign(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str) -> None:
    """Give a module built on the meta device its tensors; names and shapes must match one to one."""
    wanted = module.state_dict()
    wrong = [
        f"{name}: {'missing' if name not in tensors else 'unexpected' if name not in wanted else 'other shape'}"
        for name in sorted(wanted.keys() | tensors.keys())
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}, {len(wrong)} tensors differ: {'; '.join(wrong[:10])}",
            "The file belongs to another architecture, or is damaged.",
        )
    ready = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    module.load_state_dict(ready, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers computed on the meta device: {left}"
    module.requires_grad_(False).eval()

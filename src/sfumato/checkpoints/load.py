"""From a model file to networks: built without memory, then given its tensors, every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sfumato.checkpoints.files import read_tensors, sha256
from sfumato.errors import CheckpointError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig
from sfumato.runtime import shapes_only

METADATA_KEY = "sfumato"
PREFIXES = {  # Stable Diffusion's own names, so that other tools find the parts
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.transformer.",
}
NETWORKS = {"unet": UNet, "autoencoder": AutoencoderKL, "text": CLIPTextEncoder}


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds: its configuration, its networks in evaluation mode, its sha256."""

    config: ModelConfig
    modules: Mapping[str, nn.Module]
    digest: str

    def module(self, part: str) -> nn.Module:
        """One of the networks; `CheckpointError` where the model lacks it."""
        if part not in self.modules:
            raise CheckpointError(
                f"the model {self.config.name!r} has no {part}, only {', '.join(self.modules)}",
                "Give the file of another run.",
            )
        return self.modules[part]


def load_file(path: Path, dtype: torch.dtype | None = None) -> ModelFile:
    """Read a model that this package wrote. `dtype` None keeps the file's own.

    Raises `CheckpointError` for a damaged file, or naming the first ten keys that do not fit.
    """
    tensors, metadata = read_tensors(path)
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} does not describe its model", "Give a model.safetensors that `sfumato train` wrote."
        )
    config = ModelConfig.from_json(metadata[METADATA_KEY], str(path))
    modules: dict[str, nn.Module] = {}
    used: set[str] = set()
    for part, prefix in PREFIXES.items():
        if (part_config := getattr(config, part)) is not None:
            own = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
            modules[part] = build(part, part_config, limit=2 * len(tensors) + 1000)
            assign(modules[part], {name: tensors[full] for name, full in own.items()}, dtype, str(path))
            used.update(own.values())
    unknown = sorted(tensors.keys() - used)
    if unknown:
        raise CheckpointError(
            f"{path} holds tensors that no part of the model has: {', '.join(unknown[:10])}", "Get it again."
        )
    return ModelFile(config, modules, sha256(path))


def build(part: str, config: Any, limit: int) -> nn.Module:
    """A network of shapes without values; `CheckpointError` where the options build none.

    limit: the most parameters it may have. A hostile file could describe enough of them to fill any memory.
    """
    count = 0

    def register(*_: object) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(f"the file describes more {part} layers than it holds", "Get it again.")

    hook = register_module_parameter_registration_hook(register)
    try:
        with shapes_only():
            return NETWORKS[part](config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch makes of a negative width, a zero division, ...
        raise CheckpointError(f"the file's {part} cannot be built: {error}", "Get it again.") from error
    finally:
        hook.remove()


def assign(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, source: str) -> None:
    """Give a module built on the meta device its tensors; names and shapes must match one to one."""
    check_fit(module.state_dict(), tensors, f"{source} does not fit {type(module).__name__}")
    ready = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    module.load_state_dict(ready, strict=True, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers computed on the meta device: {left}"
    module.requires_grad_(False).eval()


def copy_into(module: nn.Module, tensors: Mapping[str, Tensor], failure: str) -> None:
    """Copy tensors into a module that has values; names and shapes must match one to one, as `check_fit`."""
    check_fit(module.state_dict(), tensors, failure)
    module.load_state_dict(tensors, strict=True)


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], failure: str) -> None:
    """`CheckpointError` naming the first ten tensors that are missing, unexpected or of another shape."""
    reasons = {name: _misfit(wanted.get(name), given.get(name)) for name in wanted.keys() | given.keys()}
    wrong = sorted(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if wrong:
        raise CheckpointError(
            f"{failure}, {len(wrong)} tensors differ: {'; '.join(wrong[:10])}",
            "The file belongs to another architecture, or is damaged.",
        )


def _misfit(wanted: Tensor | None, given: Tensor | None) -> str:
    if given is None:
        return "missing"
    if wanted is None:
        return "unexpected"
    if wanted.shape != given.shape:
        return f"shape {tuple(given.shape)} for {tuple(wanted.shape)}"
    return "" if given.is_floating_point() else f"{given.dtype} is not floating-point"

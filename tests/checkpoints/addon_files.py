"""LoRA files in every dialect, written from one set of random factors for named layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.addons.apply import Weighted, apply_addons
from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.load import ModelFile

RANK = 3
# Layers of the small model in conftest.
QUERY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"  # (32, 32)
CONV = "input_blocks.1.0.in_layers.2"  # (32, 32, 3, 3)
NORM = "input_blocks.1.0.in_layers.0"  # (32,)
KOHYA = f"lora_unet_{QUERY.replace('.', '_')}"


@dataclass(frozen=True)
class Factors:
    """Of one layer: down (r, in, *kernel), up (out, r), and alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def change(self) -> Tensor:
        """The change of the weight, by the definition."""
        return torch.einsum("or,r...->o...", self.up, self.down) * (self.alpha / len(self.down))


def layers(module: nn.Module, ending: str = "") -> dict[str, tuple[int, ...]]:
    """Linear layers and convolutions of a network: name -> shape of the weight."""
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(ending)
    }


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 1, alpha: float = 2.0) -> dict[str, Factors]:
    """Factors that change each weight by about as much as it has."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, *rest) in shapes.items():
        down = torch.randn(RANK, *rest, generator=generator) / prod(rest) ** 0.5
        found[name] = Factors(down, torch.randn(out, RANK, generator=generator) * 0.3, alpha)
    return found


def one(
    name: str = QUERY, shape: tuple[int, ...] = (32, 32), *, seed: int = 1, alpha: float = 2.0
) -> dict[str, Factors]:
    """Factors for one layer."""
    return draw({name: shape}, seed, alpha)


def everything(model: ModelFile, path: Path) -> Path:
    """A LoRA of every layer of the U-Net and the text encoder, in kohya's names."""
    unet, text = (draw(layers(model.module(part))) for part in ("unet", "text"))
    return write(path, kohya("lora_unet_", unet), kohya("lora_te_", text))


def kohya(prefix: str, given: Mapping[str, Factors]) -> dict[str, Tensor]:
    """`lora_unet_down_blocks_0_....lora_down.weight`; convolutions keep theirs four-dimensional."""
    tensors = {}
    for name, factors in given.items():
        key = prefix + name.replace(".", "_")
        up = factors.up[..., None, None] if factors.down.ndim == 4 else factors.up
        tensors[f"{key}.lora_down.weight"] = factors.down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(factors.alpha)
    return tensors


def dotted(
    prefix: str, given: Mapping[str, Factors], down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> dict[str, Tensor]:
    """PEFT's and diffusers' names, in which alpha is the rank."""
    tensors = {}
    for name, factors in given.items():
        grown = factors.up * (factors.alpha / len(factors.down))
        tensors[f"{prefix}{name}.{down}"] = factors.down
        tensors[f"{prefix}{name}.{up}"] = grown[..., None, None] if factors.down.ndim == 4 else grown
    return tensors


def write(path: Path, *groups: Mapping[str, Tensor], **metadata: str) -> Path:
    """A safetensors file of all the groups."""
    tensors = {name: tensor for group in groups for name, tensor in group.items()}
    write_tensors(path, tensors, metadata)
    return path


def digest(model: ModelFile) -> str:
    """Of all weights, their shapes and their layout in memory."""
    found = hashlib.sha256()
    for part in ("unet", "text", "autoencoder"):
        for name, tensor in model.module(part).state_dict().items():
            found.update(f"{name} {tensor.shape} {tensor.stride()} {tensor.dtype}".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weight(model: ModelFile, name: str, part: str = "unet") -> Tensor:
    """A tensor of a model as it is now."""
    return model.module(part).get_parameter(name).data


def applied(model: ModelFile, *loras: Weighted) -> None:
    """Put LoRA on a model and take them off again."""
    with apply_addons(model.config, model.modules, loras):
        pass


def hooked(module: nn.Module, given: Mapping[str, Factors]) -> Callable[[], None]:
    """LoRA as PEFT computes it, beside each layer instead of in its weight; returns what takes it off."""
    handles = []
    for name, layer in module.named_modules():
        if name in given:
            handles.append(layer.register_forward_hook(_beside(given[name])))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    assert len(handles) == len(given)
    return remove


def _beside(factors: Factors) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    scale = factors.alpha / len(factors.down)

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            small = nn.functional.conv2d(inputs[0], factors.down, None, layer.stride, layer.padding)
            return output + scale * nn.functional.conv2d(small, factors.up[..., None, None])
        return output + scale * (inputs[0] @ factors.down.T @ factors.up.T)

    return hook

"""LoRA and textual inversions as files for other programs: kohya's and PEFT's names, A1111's, diffusers'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.checkpoints.files import converted, write_tensors
from sfumato.checkpoints.layouts.tables import Pair, pairs
from sfumato.errors import CheckpointError, InputError, nearest
from sfumato.presets import ModelConfig

Dialect = Literal["kohya", "peft"]
Form = Literal["a1111", "diffusers"]
PEFT = {"unet": "unet.", "text": "text_encoder.", "text2": "text_encoder_2."}
TOWERS = {"text": "clip_l", "text2": "clip_g"}
VERSIONS = {
    768: "sd_v1",
    1024: "sd_v2",
    2048: "sdxl_base_v1-0",
}  # of kohya's trainer, by width of the context


@dataclass(frozen=True)
class LowRank:
    """alpha / rank * up @ down, the change of one of our layers.

    part: "unet", "text" or "text2". layer: its name in the network's state dict. down: (rank, inputs,
    *kernel), up: (outputs, rank, 1, ...), of the number of axes of the layer's weight.
    """

    part: str
    layer: str
    down: Tensor
    up: Tensor
    alpha: float


def write_lora(
    path: Path,
    config: ModelConfig,
    layers: Sequence[LowRank],
    dialect: Dialect,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the changes of a model's layers, atomically.

    config: the model's. dialect: "kohya", which A1111, ComfyUI and others read, with alphas; "peft", as
    diffusers saves, where alphas are in the factors, so that a reader that knows none of them is right too.
    Raises `InputError` for a layer that the model lacks, `NumericalError` before anything is written for a
    value that is not finite in `dtype`.
    """
    if dialect not in ("kohya", "peft"):
        raise InputError(f"there is no dialect {dialect!r}", nearest(dialect, ["kohya", "peft"]))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for layer in layers:
        for name, down, up in _foreign(layer, config, dialect):
            rank = len(down)
            if dialect == "kohya":
                key = _kohya_prefix(layer.part, config) + name.replace(".", "_")
                tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
                tensors[f"{key}.alpha"] = torch.tensor(float(layer.alpha))
            else:
                key = PEFT[layer.part] + name
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = (
                    down,
                    up * (layer.alpha / rank),
                )
                ranks.setdefault(PEFT[layer.part].removesuffix("."), {})[name] = rank
    ready = converted(tensors, dtype)
    own = dict(metadata or {})
    own |= _kohya_metadata(config, layers) if dialect == "kohya" else _peft_metadata(ranks)
    write_tensors(path, ready, {"format": "pt", **own})


def write_embedding(
    path: Path, word: str, vectors: Mapping[str, Tensor], form: Form, dtype: torch.dtype = torch.float32
) -> None:
    """Write the vectors (n, width) of a word for each text encoder, "text" and "text2", atomically.

    form: "a1111" goes by the file's name, "diffusers" by the word inside; with two encoders both hold
    `clip_l` and `clip_g`. Raises `NumericalError` for values that are not finite in `dtype`.
    """
    if len(vectors) == 1:
        names = {part: "emb_params" if form == "a1111" else word for part in vectors}
    else:
        names = {part: TOWERS[part] for part in vectors}
    ready = converted({names[part]: tensor for part, tensor in vectors.items()}, dtype)
    write_tensors(path, ready, {"format": "pt"})


def _foreign(layer: LowRank, config: ModelConfig, dialect: Dialect) -> list[tuple[str, Tensor, Tensor]]:
    """(name, down, up) of a layer as the dialect has it: several, where its rows are several layers there."""
    pair = _pair(layer, config, dialect)
    wide = layer.up.reshape(len(layer.up), -1, *[1] * (len(pair.shape) - 2))
    ups = [wide] if pair.transform.name in ("same", "reshaped") else pair.transform.to_foreign(wide)
    found: list[tuple[str, Tensor, Tensor]] = []
    for name, shape, up in zip(pair.foreign, pair.foreign_shapes(), ups, strict=True):
        kernel = [1] * (len(shape) - 2)
        down = layer.down.reshape(len(layer.down), *shape[1:]).clone()  # files hold no tensor twice
        found.append((name.removesuffix(".weight"), down, up.reshape(shape[0], len(down), *kernel)))
    return found


def _pair(layer: LowRank, config: ModelConfig, dialect: Dialect) -> Pair:
    options = getattr(config, layer.part, None) if layer.part in PEFT else None
    # Kohya's trainer names the layers of SDXL's U-Net as the original does, and all others as diffusers.
    original = dialect == "kohya" and layer.part == "unet" and config.text2 is not None
    table = () if options is None else pairs(layer.part, options, "ldm" if original else "diffusers")
    pair = next((each for each in table if each.native == f"{layer.layer}.weight"), None)
    if pair is None:
        raise InputError(f"{config.name!r} has no layer {layer.part} {layer.layer!r}", "Give its own config.")
    given = (len(layer.up), *layer.down.shape[1:])
    if given != tuple(pair.shape):
        raise CheckpointError(f"the change of {layer.layer} is {given}, its weight {tuple(pair.shape)}")
    return pair


def _kohya_prefix(part: str, config: ModelConfig) -> str:
    if part == "unet":
        return "lora_unet_"
    if config.text2 is None:
        return "lora_te_"
    return "lora_te2_" if part == "text2" else "lora_te1_"


def _kohya_metadata(config: ModelConfig, layers: Sequence[LowRank]) -> dict[str, str]:
    ranks, alphas = {len(layer.down) for layer in layers}, {layer.alpha for layer in layers}
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    version = VERSIONS.get((config.unet and config.unet.context_dim) or 0)
    return found | ({"ss_base_model_version": version} if version else {})


def _peft_metadata(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    values: dict[str, Any] = {}
    for network, layers in ranks.items():
        most = max(layers.values())
        values |= {
            f"{network}.peft_type": "LORA",
            f"{network}.r": most,
            f"{network}.lora_alpha": most,
            f"{network}.target_modules": sorted(layers),
            f"{network}.rank_pattern": {name: rank for name, rank in layers.items() if rank != most},
            f"{network}.alpha_pattern": {name: rank for name, rank in layers.items() if rank != most},
        }
    return {"lora_adapter_metadata": json.dumps(values, sort_keys=True)}

"""LoRA files of every dialect as adapters: for each layer that a file names, the tensors that change it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from sfumato.checkpoints.addons.names import WRAPPER
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.load import is_finite
from sfumato.checkpoints.schema import Record, parse, read_json
from sfumato.checkpoints.source import Source
from sfumato.errors import CheckpointError
from sfumato.nn.lora import KINDS, Kind, Size, kind_of

# The last words of a key -> the tensor it is. Factors are followed by "weight" or "bias".
FACTORS = {
    "lora_down": "lora_down", "lora_up": "lora_up", "lora_mid": "lora_mid",  # kohya, LyCORIS
    "lora_A": "lora_down", "lora_B": "lora_up",  # PEFT
    "down": "lora_down", "up": "lora_up",  # diffusers before PEFT, behind "lora" or a processor's name
}  # fmt: skip
WHOLE = {name: name for kind in KINDS for name in kind.slots if not name.startswith("lora_")} | {
    "w_norm": "diff", "diff_b": "bias", "b_norm": "bias", "alpha": "alpha", "dora_scale": "dora_scale",
}  # fmt: skip
MAGNITUDE = "lora_magnitude_vector"  # PEFT's, always of the outputs
BUNDLED = "bundle_emb."  # textual inversions that came with it
RULES = {BUNDLED: "bundled embeddings"}
MAX_CONFIG = 1 << 20  # characters of PEFT's settings in the metadata


@dataclass(frozen=True)
class Adapter:
    """What a file says of one layer, under the file's own name for it.

    tensors: those of `kind`, as they lie in the file; none where only the bias changes. scale: of the change.
    magnitude: DoRA's; of_outputs: it is one number for each output, whatever its shape. bias: to be added to
    the layer's, scaled already. names: the keys of the file that all this came from.
    """

    key: str
    kind: Kind | None
    tensors: Mapping[str, Tensor]
    size: Size | None
    scale: float
    magnitude: Tensor | None
    of_outputs: bool
    bias: Tensor | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Lora:
    """A file of adapters, checked by itself; whether it fits a model, `addons.fit` tells.

    ignored: keys left out, by the name of the rule. unknown: keys that no rule knows.
    """

    path: Path
    adapters: tuple[Adapter, ...]
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def num_keys(self) -> int:
        """Tensors in the file."""
        left = sum(len(names) for names in self.ignored.values()) + len(self.unknown)
        return left + sum(len(adapter.names) for adapter in self.adapters)


class _Settings(Record):
    """PEFT's of one network; a number that is not given is the rank, and so changes nothing."""

    r: Annotated[float, Field(gt=0)] | None = None
    lora_alpha: float | None = None
    alpha: float | None = None  # LoHa and LoKr
    alpha_pattern: dict[Annotated[str, Field(pattern=r"^[\w.]+$")], float] = Field(default_factory=dict)
    use_rslora: bool = False

    def alpha_of(self, layer: str) -> float | None:
        """The alpha of a layer; the patterns are ends of names here, PEFT itself takes expressions."""
        for end, alpha in self.alpha_pattern.items():
            if layer == end or layer.endswith("." + end):
                return alpha
        return self.alpha if self.lora_alpha is None else self.lora_alpha


def read_lora(path: Path, *, mmap: bool = True) -> Lora:
    """The adapters of a LoRA, LoCon, LoHa, LoKr or DoRA file.

    path: in the names of kohya, LyCORIS, OneTrainer, diffusers or PEFT; a .safetensors, or a pickle (.pt,
    .bin, .ckpt), of which nothing is run. mmap: as `open_file`. Raises `CheckpointError` for a file that is
    damaged, holds values that are not finite, or holds no such thing.
    """
    source = open_file(path, mmap=mmap)
    layers: dict[str, dict[str, str]] = {}
    ignored: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in source.infos:
        rule = next((rule for start, rule in RULES.items() if name.startswith(start)), None)
        place = split_key(name)
        if rule is not None:
            ignored.setdefault(rule, []).append(name)
        elif place is None or place[1] in layers.get(place[0], {}):
            unknown.append(name)
        else:
            layers.setdefault(place[0], {})[place[1]] = name
    if not layers:
        raise CheckpointError(f"{path} is no LoRA: {_instead(source)}", "Give a LoRA's file.")
    check_finite(source)
    settings = _read_settings(source)
    adapters = tuple(_adapter(source, key, names, settings) for key, names in layers.items())
    return Lora(
        path,
        adapters,
        {rule: tuple(names) for rule, names in ignored.items()},
        tuple(unknown),
        source.metadata,
    )


def split_key(name: str) -> tuple[str, str] | None:
    """(layer, which of its tensors) of a key of a LoRA file; None for a key that is none of it."""
    words = name.split(".")
    if words[-1] in WHOLE:
        return _layer(words[:-1]), WHOLE[words[-1]]
    if (
        len(words) > 2 and words[-2] in WHOLE and words[-2].startswith(("hada_", "lokr_"))
    ):  # PEFT's adapter name
        return _layer(words[:-2]), WHOLE[words[-2]]
    if MAGNITUDE in words[-3:]:
        return _layer(words[: len(words) - 1 - words[::-1].index(MAGNITUDE)]), MAGNITUDE
    ending = words.pop()
    if ending not in ("weight", "bias") or len(words) < 2:
        return None
    if words[-1] not in FACTORS and words[-2] in ("lora_A", "lora_B"):
        words.pop()  # the name of PEFT's adapter, "default"
    slot = FACTORS.get(words[-1])
    old = words[-1] in ("up", "down")
    if slot is None or (old and "lora" not in words[-2]):
        return None
    if ending == "bias":
        return (_layer(words[:-1]), "up_bias") if slot == "lora_up" else None
    return _layer(words[:-1]), slot


def _layer(words: list[str]) -> str:
    if words and words[-1] in ("lora", "lora_linear_layer"):
        words = words[:-1]
    return ".".join(words)


def _adapter(
    source: Source, key: str, names: Mapping[str, str], settings: Mapping[str, _Settings]
) -> Adapter:
    tensors = {slot: source.tensor(name) for slot, name in names.items()}
    given = settings.get(key.split(".")[0], settings.get("", _Settings()))
    try:
        for slot, tensor in tensors.items():
            if not tensor.is_floating_point() and slot != "alpha":
                raise ValueError(f"its {slot} is {tensor.dtype}")
        alpha, magnitude = tensors.pop("alpha", None), tensors.pop("dora_scale", None)
        of_outputs = MAGNITUDE in tensors
        magnitude = tensors.pop(MAGNITUDE, magnitude)
        bias, up_bias = tensors.pop("bias", None), tensors.pop("up_bias", None)
        kind = kind_of(frozenset(tensors))
        if kind is None and (tensors or bias is None or magnitude is not None):
            raise ValueError(f"{', '.join(sorted(names))} are not one kind of change")
        size = None if kind is None else kind.size(tensors)
        scale = 1.0 if size is None or "diff" in tensors else _scale(key, size, alpha, given)
    except ValueError as error:
        raise CheckpointError(
            f"{source.path}: the layer {key!r} cannot be read: {error}", "Get the file again."
        ) from error
    if up_bias is not None:
        bias = up_bias.float() * scale
    return Adapter(key, kind, tensors, size, scale, magnitude, of_outputs, bias, tuple(names.values()))


def _scale(key: str, size: Size, alpha: Tensor | None, settings: _Settings) -> float:
    """alpha / rank, or alpha / sqrt(rank) where it is stabilised (Kalajdzievski 2023); 1 without an alpha."""
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"its alpha has {alpha.numel()} numbers")
    named = (
        key.partition(".")[2].removeprefix(WRAPPER) if not key.startswith(WRAPPER) else key[len(WRAPPER) :]
    )
    value = settings.alpha_of(named) if alpha is None else float(alpha)
    rank = settings.r if size.rank is None else size.rank
    if rank == 0:
        raise ValueError("its rank is 0")
    if value is None or rank is None:
        return 1.0
    scale = value / (math.sqrt(rank) if settings.use_rslora else rank)
    if not math.isfinite(scale):
        raise ValueError(f"its alpha is {value}")
    return scale


def _read_settings(source: Source) -> dict[str, _Settings]:
    """PEFT's settings by the first word of the keys they are for, "" for all: beside the file or in it."""
    beside = source.path.with_name("adapter_config.json")
    if source.path.stem == "adapter_model" and beside.is_file():
        return {"": parse(_Settings, _plain(read_json(beside)), beside)}
    text = source.metadata.get("lora_adapter_metadata", "")
    if not text:
        return {}
    try:
        values = json.loads(text[: MAX_CONFIG + 1]) if len(text) <= MAX_CONFIG else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{source.path}: its lora_adapter_metadata are not PEFT's settings", "Get the file again."
        )
    networks: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        network, _, name = key.partition(".")
        networks.setdefault(network, {})[name] = value
    return {name: parse(_Settings, _plain(given), source.path) for name, given in networks.items()}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given: PEFT writes null for some that are not."""
    return {name: value for name, value in values.items() if value is not None}


def _instead(source: Source) -> str:
    names = list(source.infos)
    first = names[0]
    if "string_to_param" in first or first in ("emb_params", "clip_l", "clip_g") or len(names) == 1:
        return "it is a textual inversion; embeddings are named in the prompt"
    if sum(math.prod(info.shape) for info in source.infos.values()) > 50_000_000:
        return "it is a model of its own"
    return f"its keys are {', '.join(names[:3])}, ..."


def check_finite(source: Source) -> None:
    """`CheckpointError` naming the first ten tensors that hold an infinity or no number."""
    wrong = [name for name in source.infos if not is_finite(source.tensor(name))]
    if wrong:
        raise CheckpointError(
            f"{source.path} holds values that are not finite in {', '.join(wrong[:10])}",
            "The file is damaged. Get it again.",
        )


def as_float(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in float32 where the weights are."""
    return tensor.to(device=device, dtype=torch.float32)

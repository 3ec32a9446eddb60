"""Where the keys of LoRA files point: every spelling of a layer's name, made from the tables of layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sfumato.checkpoints.layouts.tables import Pair, Shape, pairs
from sfumato.checkpoints.layouts.text import is_open_clip
from sfumato.checkpoints.rules import UNUSED_LAYER
from sfumato.nn.clip import CLIPTextConfig
from sfumato.presets import ModelConfig

# (what a key begins with, the part it may mean, whether "_" stands for "."); the first that fits counts.
PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("lora_unet_", "unet", True),  # kohya, LyCORIS, OneTrainer
    ("lora_te_", "text", True),
    ("lora_te1_", "text", True),
    ("lora_te2_", "text2", True),
    ("lycoris_", "unet", True),  # LyCORIS around a network alone
    ("lora_unet.", "unet", False),  # OneTrainer's own names
    ("lora_te.", "text", False),
    ("lora_te1.", "text", False),
    ("lora_te2.", "text2", False),
    ("unet.", "unet", False),  # diffusers, PEFT
    ("text_encoder.", "text", False),
    ("text_encoder_2.", "text2", False),
    ("clip_l.", "text", False),
    ("clip_g.", "text2", False),
    ("model.diffusion_model.", "unet", False),
    ("diffusion_model.", "unet", False),
    ("", "unet", False),  # the oldest files of diffusers, PEFT's of one network
    ("", "text", False),
)
WRAPPER = "base_model.model."  # PEFT's
# Of diffusers before PEFT: how its attention processors call the layers of the table.
ALIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "unet": {
        ".to_q": (".processor.to_q_lora", ".to_q_lora"),
        ".to_k": (".processor.to_k_lora", ".to_k_lora"),
        ".to_v": (".processor.to_v_lora", ".to_v_lora"),
        ".to_out.0": (".processor.to_out_lora", ".to_out_lora"),
    },
    "text": {
        ".q_proj": (".to_q_lora",),
        ".k_proj": (".to_k_lora",),
        ".v_proj": (".to_v_lora",),
        ".out_proj": (".to_out_lora",),
    },
}
SPELLINGS: Mapping[
    str, tuple[tuple[str, str], ...]
] = {  # (layout, variant); for one name twice the first counts
    "unet": (("diffusers", ""), ("diffusers", "old"), ("ldm", "")),
    "text": (("diffusers", ""), ("diffusers", "bare"), ("ldm", "")),
}
ENDINGS = ((".weight", "weight"), (".bias", "bias"), ("_weight", "weight"), ("_bias", "bias"))


@dataclass(frozen=True)
class Target:
    """A tensor of some layout that a change is written for.

    name, shape: its own, in that layout. pairs: the lines of the table that it takes part in, each a tensor
    of our network: several where it is cut into rows, and each perhaps made of others too.
    """

    part: str
    layout: str
    name: str
    shape: Shape
    pairs: tuple[Pair, ...]


Layer = Mapping[str, Target]  # "weight", "bias" -> the tensor


@dataclass(frozen=True)
class Names:
    """The layers of a part by every name they go by, with dots and with underscores between the words."""

    dotted: Mapping[str, Layer]
    underscored: Mapping[str, Layer]


@lru_cache(maxsize=16)
def names_of(part: str, config: Any) -> Names:
    """The names of all layers of a part."""
    kind = "text" if part == "text2" else part
    layers: dict[str, dict[str, Target]] = {}
    for layout, variant in SPELLINGS[kind]:
        makers: dict[str, list[Pair]] = {}
        shapes: dict[str, Shape] = {}
        for pair in pairs(part, config, layout, variant):
            for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True):
                makers.setdefault(name, []).append(pair)
                shapes[name] = tuple(shape)
        for name, made in makers.items():
            layer, tensor = split_name(name)
            target = Target(part, layout, name, shapes[name], tuple(made))
            layers.setdefault(layer, {}).setdefault(tensor, target)
    underscored = {name.replace(".", "_"): layer for name, layer in layers.items()}
    dotted = dict(layers)
    for name, layer in layers.items():
        for ending, others in ALIASES[kind].items():
            if name.endswith(ending):
                dotted |= {name.removesuffix(ending) + other: layer for other in others}
    return Names(dotted, underscored)


def split_name(name: str) -> tuple[str, str]:
    """(layer, "weight" or "bias") of a tensor's name."""
    for ending, tensor in ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending), tensor
    return name, "weight"


def find_layer(key: str, config: ModelConfig) -> Layer | str | None:
    """The layer that a key of a file means, or the name of the rule that leaves it out, or None."""
    bare = key.removeprefix(WRAPPER)
    for prefix, part, underscored in PREFIXES:
        part_config = getattr(config, part)
        if part_config is None or not bare.startswith(prefix):
            continue
        name = bare.removeprefix(prefix).removeprefix(WRAPPER)
        names = names_of(part, part_config)
        layer = (names.underscored if underscored else names.dotted).get(name)
        if layer is not None:
            return layer
        longer = _with_last_layer(part_config)
        if longer is not None:
            names = names_of(part, longer)
            if name in (names.underscored if underscored else names.dotted):
                return UNUSED_LAYER
    return None


def _with_last_layer(config: Any) -> CLIPTextConfig | None:
    """The tower as it was trained, where ours leaves out its last layer, as Stable Diffusion 2 does."""
    if isinstance(config, CLIPTextConfig) and is_open_clip(config) and config.projection_dim is None:
        return dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
    return None

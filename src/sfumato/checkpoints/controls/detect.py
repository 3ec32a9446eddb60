"""A control network's options out of its tensors' names and shapes, in its authors' layout and diffusers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from sfumato.checkpoints.detect.families import base_of, family_of, with_heads
from sfumato.checkpoints.detect.tree import Tree, inside, numbers, side, tree, vote
from sfumato.checkpoints.layouts.pair import Shape
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.controlnet import ControlNetConfig
from sfumato.nn.unet_config import UNetConfig

Shapes = Mapping[str, Shape]
MAX_HEADS = 1000


@dataclass(frozen=True)
class Level:
    """A level of an encoder: its first residual block by name, how many, transformers after each."""

    block: str
    blocks: int
    attention: str
    depth: int


@dataclass(frozen=True)
class Names:
    """What the layers that tell a control network's options are called in a layout."""

    conv_in: str
    vector: str
    rows: str
    hint: str
    middle: str


LDM = Names(
    "input_blocks.0.0", "label_emb.0.0", "out_layers.3", "input_hint_block",
    "middle_block.1.transformer_blocks",
)  # fmt: skip
DIFFUSERS = Names(
    "conv_in", "add_embedding.linear_1", "conv2", "controlnet_cond_embedding",
    "mid_block.attentions.0.transformer_blocks",
)  # fmt: skip


def read_controlnet(shapes: Shapes, layout: str, metadata: Mapping[str, str]) -> ControlNetConfig:
    """The options of the control network whose tensors have these names and shapes, less a prefix.

    layout: "ldm" or "diffusers". Heads and groups are told by `metadata` (num_heads, num_head_channels,
    num_groups), else by the family. `CheckpointError` for a network that no ControlNetConfig describes.
    """
    modules = tree(shapes)
    names = LDM if layout == "ldm" else DIFFUSERS
    levels = _ldm(modules) if layout == "ldm" else _diffusers(modules)
    if not levels:
        raise CheckpointError("the ControlNet has no residual blocks", "The file is incomplete.")
    try:
        encoder = UNetConfig(**_options(names, levels, modules, shapes))
        encoder, _ = with_heads(encoder, family_of(encoder), base_of({}, encoder), metadata)
        if (groups := metadata.get("num_groups", "")).isdecimal():  # which no shape tells
            encoder = replace(encoder, num_groups=int(groups))
        return ControlNetConfig(encoder, *_hint(names, modules, shapes))
    except InputError as error:
        raise CheckpointError(
            f"the ControlNet has a shape that is not built here: {error.message}"
        ) from error


def with_given(config: ControlNetConfig, values: Mapping[str, Any], place: str) -> ControlNetConfig:
    """The same with what a diffusers `config.json` knows and shapes do not tell: heads, and averaging.

    `CheckpointError` for options that change the network into one that is not built here.
    """
    for key, only in (("controlnet_conditioning_channel_order", "rgb"), ("class_embed_type", None)):
        if values.get(key, only) != only:
            raise CheckpointError(f"{place}: {key} is {values[key]!r}, which is not built here", "")
    config = replace(config, global_average=values.get("global_pool_conditions") is True)
    given = values.get("num_attention_heads") or values.get("attention_head_dim")
    counts = [given] if isinstance(given, int) else given
    if not isinstance(counts, list) or not counts:
        return config
    if not all(isinstance(count, int) and 0 < count <= MAX_HEADS for count in counts):
        raise CheckpointError(f"{place} has attention heads {given}", "They are positive whole numbers.")
    widths = [factor * config.encoder.model_channels for factor in config.encoder.channel_mult]
    sizes = {width // count for width, count in zip(widths, counts, strict=False)}
    if len(set(counts)) > 1 and len(sizes) > 1:
        raise CheckpointError(f"{place} has attention heads {counts}, which are not built here", "")
    heads = (counts[0], -1) if len(set(counts)) == 1 else (-1, sizes.pop())
    encoder = replace(config.encoder, num_heads=heads[0], num_head_channels=heads[1])
    return replace(config, encoder=encoder)


def _ldm(modules: Tree) -> list[Level]:
    inputs = inside(modules, "input_blocks")
    groups: list[list[int]] = [[]]
    for number in numbers(inputs):
        if "op" in inside(inputs, number, 0):
            groups.append([])
        elif number > 0:
            groups[-1].append(number)
    return [
        Level(
            f"input_blocks.{group[0]}.0",
            len(group),
            f"input_blocks.{group[0]}.1",
            _depth(modules, f"input_blocks.{group[0]}.1"),
        )
        for group in groups
        if group
    ]


def _diffusers(modules: Tree) -> list[Level]:
    down = inside(modules, "down_blocks")
    return [
        Level(
            f"down_blocks.{level}.resnets.0",
            len(numbers(inside(down, level, "resnets"))),
            f"down_blocks.{level}.attentions.0",
            _depth(modules, f"down_blocks.{level}.attentions.0"),
        )
        for level in numbers(down)
    ]


def _depth(modules: Tree, attention: str) -> int:
    return len(numbers(inside(modules, *attention.split("."), "transformer_blocks")))


def _options(names: Names, levels: list[Level], modules: Tree, shapes: Shapes) -> dict[str, Any]:
    width = vote([side(shapes, f"{names.conv_in}.{part}") for part in ("weight", "bias")], names.conv_in)
    widths = [
        vote([side(shapes, f"{level.block}.{names.rows}.{part}") for part in ("weight", "bias")], level.block)
        for level in levels
    ]
    depths = [level.depth for level in levels]
    blocks = [level.blocks for level in levels]
    channels = vote([side(shapes, f"{names.conv_in}.weight", 1)], names.conv_in)
    options: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "model_channels": width,
        "num_res_blocks": blocks[0] if len(set(blocks)) == 1 else tuple(blocks),
        "channel_mult": tuple(each // width for each in widths),
        "attention_resolutions": tuple(2**level for level, depth in enumerate(depths) if depth),
        "num_head_channels": 64,
        "legacy": False,
        "num_groups": gcd(width, 32),
    }
    vector = side(shapes, f"{names.vector}.weight", 1)
    if vector is not None:
        options |= {"num_classes": "sequential", "adm_in_channels": vector}
    middle = len(numbers(inside(modules, *names.middle.split("."))))
    if not middle:
        options["middle"] = "residual"
    if middle or any(depths):
        options |= _attention(names, levels, middle, shapes)
    return options


def _attention(names: Names, levels: list[Level], middle: int, shapes: Shapes) -> dict[str, Any]:
    depths = [level.depth for level in levels]
    attended = [level.attention for level in levels if level.depth] or [names.middle.rpartition(".")[0]]
    context = f"{attended[0]}.transformer_blocks.0.attn2"
    known = {depth for depth in depths if depth} or {middle}
    depth = known.pop() if len(known) == 1 else tuple(depth or 1 for depth in depths)
    options: dict[str, Any] = {
        "use_spatial_transformer": True,
        "transformer_depth": depth,
        "context_dim": vote([side(shapes, f"{context}.{k}.weight", 1) for k in ("to_k", "to_v")], context),
        "use_linear_in_transformer": len(shapes.get(f"{attended[0]}.proj_in.weight", ())) == 2,
    }
    if middle and middle != (depth if isinstance(depth, int) else depth[-1]):
        options["transformer_depth_middle"] = middle
    return options


def _hint(names: Names, modules: Tree, shapes: Shapes) -> tuple[int, tuple[int, ...]]:
    """(channels of the pictures, widths of the layers that they go through)."""
    if names is LDM:
        layers = [f"{names.hint}.{number}" for number in numbers(inside(modules, names.hint))[:-1]]
    else:
        blocks = numbers(inside(modules, names.hint, "blocks"))
        layers = [f"{names.hint}.conv_in", *(f"{names.hint}.blocks.{number}" for number in blocks)]
    first = f"{layers[0] if layers else names.hint}.weight"
    widths = [vote([side(shapes, f"{name}.{part}") for part in ("weight", "bias")], name) for name in layers]
    return vote([side(shapes, first, 1)], first), tuple(widths[::2])

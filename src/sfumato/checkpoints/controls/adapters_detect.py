"""The options of adapters and of CLIP's image tower out of the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from sfumato.checkpoints.detect.tree import Tree, inside, numbers, side, tree, vote
from sfumato.checkpoints.layouts.pair import Shape
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.clip_vision import CLIPVisionConfig
from sfumato.nn.ip_adapter import IPAdapterConfig
from sfumato.nn.t2i_adapter import T2IAdapterConfig

Shapes = Mapping[str, Shape]
PICTURES = (1, 3)  # channels
HEAD_WIDTH = 64  # of the resampler: resampler.py of tencent-ailab/IP-Adapter
# Heads of the released towers by their width: ViT-B, L, H and bigG.
HEADS = {768: 12, 1024: 16, 1280: 16, 1664: 16}
QUICK = {768, 1024}  # OpenAI's own towers were trained with the quick approximation of GELU


def read_t2i(shapes: Shapes, layout: str) -> T2IAdapterConfig:
    """The options of a T2I-Adapter; layout "ldm" is its authors'. `CheckpointError` for another network."""
    body = inside(tree(shapes), *(("body",) if layout == "ldm" else ("adapter", "body")))
    root = "" if layout == "ldm" else "adapter."
    if not numbers(body):
        raise CheckpointError("the T2I-Adapter has no blocks", "The file is incomplete.")
    light = any("out_conv" in inside(body, number) for number in numbers(body))
    entry = f"{root}body.0.in_conv.weight" if light else f"{root}conv_in.weight"
    rows = vote([side(shapes, entry, 1)], entry)
    unshuffle = next((size for size in (8, 16) if rows in [size**2 * count for count in PICTURES]), None)
    if unshuffle is None:
        raise CheckpointError(
            f"the T2I-Adapter takes {rows} channels, which are neither 8 x 8 nor 16 x 16 pixels of a picture",
            "A network of this shape is not built here.",
        )
    if light:
        inner = "body" if layout == "ldm" else "resnets"
        places = [f"{root}body.{number}.out_conv" for number in numbers(body)]
        blocks = len(numbers(inside(body, 0, inner)))
    elif layout == "ldm":
        blocks = _blocks_by_width(body, shapes)
        places = [f"body.{number}.block1" for number in numbers(body)[::blocks]]
    else:
        blocks = len(numbers(inside(body, 0, "resnets")))
        places = [f"{root}body.{number}.resnets.0.block1" for number in numbers(body)]
    channels = tuple(
        vote([side(shapes, f"{place}.{part}") for part in ("weight", "bias")], place) for place in places
    )
    kind = "light" if light else "full-xl" if unshuffle == 16 else "full"
    return T2IAdapterConfig(rows // unshuffle**2, channels, max(blocks, 1), kind, unshuffle)


def _blocks_by_width(body: Tree, shapes: Shapes) -> int:
    """Blocks in a level of an adapter whose blocks are numbered through: the second level begins a width."""
    found = [number for number in numbers(body) if f"body.{number}.in_conv.weight" in shapes]
    return max(found[0] if found else len(numbers(body)), 1)


def read_ip(shapes: Shapes) -> IPAdapterConfig:
    """The options of an IP-Adapter. `CheckpointError` for one of a kind that is not built here."""
    modules = tree(shapes)
    layers = [number for number in numbers(inside(modules, "ip_adapter")) if number % 2]
    names = [f"ip_adapter.{number}" for number in layers]
    strange = next((name for name in shapes if "_lora." in name or "perceiver_resampler" in name), None)
    if strange is not None:
        raise CheckpointError(
            f"the IP-Adapter holds {strange}: it reads faces by another program's recognition",
            "Plain, plus and full adapters load here.",
        )
    parts = ("to_k_ip", "to_v_ip")
    widths = tuple(vote([side(shapes, f"{name}.{part}.weight") for part in parts], name) for name in names)
    context = vote(
        [side(shapes, f"{name}.{part}.weight", 1) for name in names for part in parts],
        "the width of the context",
    )
    return IPAdapterConfig(widths, context, **_projection(shapes, modules, context))


def _projection(shapes: Shapes, modules: Tree, context: int) -> dict[str, Any]:
    root = "image_proj"
    if f"{root}.latents" in shapes:
        tokens, width = (vote([side(shapes, f"{root}.latents", axis)], "latents") for axis in (1, 2))
        heads = [
            rows // HEAD_WIDTH
            for layer in numbers(inside(modules, root, "layers"))
            if (rows := side(shapes, f"{root}.layers.{layer}.0.to_q.weight")) is not None
        ]
        return {
            "kind": "plus",
            "image_dim": vote([side(shapes, f"{root}.proj_in.weight", 1)], f"{root}.proj_in"),
            "num_tokens": tokens,
            "resampler_dim": width,
            "num_heads": vote(heads, "the resampler's heads"),
            "depth": len(numbers(inside(modules, root, "layers"))),
        }
    if f"{root}.proj.3.weight" in shapes:
        image = vote([side(shapes, f"{root}.proj.0.weight", 1)], f"{root}.proj.0")
        return {"kind": "full", "image_dim": image}
    rows = vote([side(shapes, f"{root}.proj.{part}") for part in ("weight", "bias")], f"{root}.proj")
    image = vote([side(shapes, f"{root}.proj.weight", 1)], f"{root}.proj")
    return {"kind": "plain", "image_dim": image, "num_tokens": max(rows // context, 1)}


def read_vision(shapes: Shapes, values: Mapping[str, Any]) -> CLIPVisionConfig:
    """The options of an image tower. values: of its `config.json`, for what shapes do not tell; may be empty.

    Without, heads and activation are those of the released tower of that width.
    """
    modules, root = tree(shapes), "vision_model"
    patch = f"{root}.embeddings.patch_embedding.weight"
    places = f"{root}.embeddings.position_embedding.weight"
    width, size = vote([side(shapes, patch)], patch), vote([side(shapes, patch, 3)], patch)
    layers = numbers(inside(modules, root, "encoder", "layers"))
    inner = [side(shapes, f"{root}.encoder.layers.{layer}.mlp.fc1.weight") for layer in layers]
    heads = values.get("num_attention_heads", HEADS.get(width, max(width // 64, 1)))
    try:
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=vote(inner, "the width inside the layers"),
            num_hidden_layers=len(layers),
            num_attention_heads=heads if isinstance(heads, int) else 0,
            image_size=size * isqrt(max(vote([side(shapes, places)], places) - 1, 1)),
            patch_size=size,
            hidden_act=values.get("hidden_act", "quick_gelu" if width in QUICK else "gelu"),
            projection_dim=side(shapes, "visual_projection.weight"),
        )
    except InputError as error:
        raise CheckpointError(f"the image tower is not built here: {error.message}", error.hint) from error

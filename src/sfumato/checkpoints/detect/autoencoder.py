"""An autoencoder's options out of the names and shapes of its tensors, in both layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any

from sfumato.checkpoints.detect.tree import Tree, inside, numbers, shown, side, tree, vote
from sfumato.checkpoints.layouts.pair import Shape
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderConfig

RESOLUTION = 256  # of the released models; attention is counted from it, and any other size runs as well
Shapes = Mapping[str, Shape]


def read_autoencoder(shapes: Shapes, layout: str) -> AutoencoderConfig:
    """The options of the autoencoder whose tensors have these names and shapes.

    `CheckpointError` for a network that no AutoencoderConfig describes. As in `read_unet`, a few damaged
    shapes are outvoted.
    """
    modules = tree(shapes)
    native = layout == "ldm"
    down, blocks, attention = (
        ("down", "block", "attn") if native else ("down_blocks", "resnets", "attentions")
    )
    encoder, decoder = inside(modules, "encoder"), inside(modules, "decoder")
    levels = [
        [f"encoder.{down}.{level}.{blocks}.{i}" for i in numbers(inside(encoder, down, level, blocks))]
        for level in numbers(inside(encoder, down))
    ]
    if not levels or not all(levels) or len({len(level) for level in levels}) != 1:
        raise CheckpointError(
            f"the autoencoder's levels have {shown([len(level) for level in levels])} residual blocks",
            "They must be equal in number: this network is not built here, or the file is incomplete.",
        )
    attended = _attended(encoder, decoder, len(levels), native)
    resolution = max(RESOLUTION, 1 << (len(levels) - 1))
    halvings = [inside(encoder, down, level) for level in numbers(inside(encoder, down))]
    middle = inside(encoder, "mid", "attn_1") if native else inside(encoder, "mid_block", attention, 0)
    kind = "none" if not middle else "linear" if "to_qkv" in middle else "vanilla"
    try:
        return AutoencoderConfig(
            resolution=resolution,
            num_res_blocks=len(levels[0]),
            attn_resolutions=tuple(resolution >> level for level in attended),
            resamp_with_conv=len(levels) == 1
            or any(level.keys() & {"downsample", "downsamplers"} for level in halvings),
            attn_type=kind,
            **_widths(levels, shapes),
            **_latents(shapes),
        )
    except InputError as error:
        raise CheckpointError(
            f"the autoencoder has a shape that is not built here: {error.message}"
        ) from error


def _attended(encoder: Tree, decoder: Tree, count: int, native: bool) -> list[int]:
    """The levels that have attention after their residual blocks."""
    found = []
    for level in range(count):
        if native:
            here = inside(encoder, "down", level, "attn"), inside(decoder, "up", level, "attn")
        else:
            mirrored = count - 1 - level
            here = (
                inside(encoder, "down_blocks", level, "attentions"),
                inside(decoder, "up_blocks", mirrored, "attentions"),
            )
        if any(here):
            found.append(level)
    return found


def _widths(levels: Sequence[Sequence[str]], shapes: Shapes) -> dict[str, Any]:
    width = vote(_rows(shapes, ["encoder.conv_in"]), "the autoencoder's base width")
    # Of a block, what gives its output channels.
    widths = [
        vote(_rows(shapes, [f"{block}.{name}" for block in level for name in ("norm2", "conv2")]), "a width")
        for level in levels
    ]
    if any(each % width for each in widths):
        raise CheckpointError(
            f"the autoencoder's levels have {shown(widths)} channels; each must be a multiple of {width}",
            "A network of this shape is not built here.",
        )
    return {"ch": width, "ch_mult": tuple(each // width for each in widths), "num_groups": gcd(width, 32)}


def _latents(shapes: Shapes) -> dict[str, Any]:
    in_channels, out_channels = "encoder.conv_in.weight", "decoder.conv_out"
    z_channels = vote(
        [*_rows(shapes, ["post_quant_conv"]), side(shapes, "decoder.conv_in.weight", 1)],
        "the latent's channels",
    )
    codes = "quantize.embedding.weight"
    n_embed = side(shapes, codes)
    rows = vote(_rows(shapes, ["encoder.conv_out", "quant_conv"]), "the encoder's output")
    double = n_embed is None and rows != z_channels
    moments = [each and each // (2 if double else 1) for each in _rows(shapes, ["quant_conv"])]
    columns = [side(shapes, "post_quant_conv.weight", 1), side(shapes, codes, 1)]
    return {
        "in_channels": vote([side(shapes, in_channels, 1)], in_channels),
        "out_ch": vote(_rows(shapes, [out_channels]), out_channels),
        "z_channels": z_channels,
        "embed_dim": vote([*moments, *columns], "the latent's width"),
        "double_z": double,
        "n_embed": n_embed,
    }


def _rows(shapes: Shapes, layers: Iterable[str]) -> Iterator[int | None]:
    return (side(shapes, f"{layer}.{kind}") for layer in layers for kind in ("weight", "bias"))

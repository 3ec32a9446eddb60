"""The `config.json` of a diffusers U-Net as a configuration of ours, and the way back.

Only options that change what is computed are read; what our network cannot do is refused. Source of names and
default values: diffusers' UNet2DConditionModel and UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sfumato.checkpoints.schema import (
    WRITTEN_FOR,
    Count,
    Counts,
    Names,
    Record,
    built,
    expressible,
    only,
    parse,
)
from sfumato.errors import CheckpointError
from sfumato.nn.unet import UNetConfig


class BlocksRecord(Record):
    """What every convolutional network of diffusers is described by: its levels."""

    down_block_types: Names = ("DownEncoderBlock2D",)
    up_block_types: Names = ("UpDecoderBlock2D",)
    block_out_channels: Counts = (64,)
    norm_num_groups: Count = 32


Depth = Annotated[int, Field(ge=0, le=1000)]
Depths = Annotated[
    tuple[Depth | Annotated[tuple[Depth, ...], Field(min_length=1, max_length=64)], ...],
    Field(min_length=1, max_length=16),
]


class UNetRecord(BlocksRecord):
    """UNet2DConditionModel and UNet2DModel."""

    in_channels: Count = 4
    out_channels: Count = 4
    sample_size: Count | tuple[Count, Count] | None = None
    layers_per_block: Count | Counts = 2
    cross_attention_dim: Count | None = None
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    transformer_layers_per_block: Count | Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    attention_head_dim: Count | Counts | None = 8
    num_attention_heads: Count | Counts | None = None
    use_linear_projection: bool = False
    num_class_embeds: Count | None = None
    addition_embed_type: str | None = None
    projection_class_embeddings_input_dim: Count | None = None
    resnet_time_scale_shift: str = "default"
    only_cross_attention: bool | Annotated[tuple[bool, ...], Field(min_length=1, max_length=16)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


ONLY_UNET: dict[str, tuple[Any, ...]] = {  # what our U-Net does, where diffusers knows other ways
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "norm_eps": (1e-5, 1e-6),  # LDM's is 1e-5; the unconditional folders were converted with 1e-6 in error
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, 256),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "mid_block_type": (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "add_attention": (True,),
    "attn_norm_num_groups": (None,),
}
TRANSFORMER_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
PLAIN_BLOCKS = {"AttnDownBlock2D": True, "DownBlock2D": False}
UP = {  # the decoder's block at the level of each encoder block
    "CrossAttnDownBlock2D": "CrossAttnUpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "DownBlock2D": "UpBlock2D",
    "AttnDownEncoderBlock2D": "AttnUpDecoderBlock2D",
    "DownEncoderBlock2D": "UpDecoderBlock2D",
}


def unet_config(values: Mapping[str, Any], place: Path) -> UNetConfig:
    """UNet2DConditionModel (with transformers) or UNet2DModel (plain attention) as ours."""
    only(values, ONLY_UNET, place)
    plain = values.get("_class_name") == "UNet2DModel"
    record = parse(UNetRecord, values, place)
    attended = attended_levels(record, PLAIN_BLOCKS if plain else TRANSFORMER_BLOCKS, place)
    width, factors = base_width(record.block_out_channels, place)
    heads, head_channels = _heads(record, plain, place)
    depth, depth_output = _depths(record, place)
    middles = {None: "none", "UNetMidBlock2DCrossAttn": "attention"}
    middle = (
        "attention" if plain and record.mid_block_type else middles.get(record.mid_block_type, "residual")
    )
    return built(
        lambda: UNetConfig(
            in_channels=record.in_channels,
            out_channels=record.out_channels,
            model_channels=width,
            num_res_blocks=record.layers_per_block,
            attention_resolutions=tuple(2**level for level in attended),
            dropout=record.dropout,
            channel_mult=factors,
            num_classes=record.num_class_embeds,
            adm_in_channels=record.projection_class_embeddings_input_dim,
            num_heads=heads,
            num_head_channels=head_channels,
            use_scale_shift_norm=record.resnet_time_scale_shift == "scale_shift",
            use_spatial_transformer=not plain,
            transformer_depth=depth,
            context_dim=None if plain else record.cross_attention_dim or 1280,
            use_linear_in_transformer=record.use_linear_projection,
            legacy=False,
            num_groups=record.norm_num_groups,
            middle=middle,  # type: ignore[arg-type]  # the config itself refuses others
            transformer_depth_output=depth_output,
            disable_self_attentions=_disabled(record),
        ),
        place,
    )


def unet_values(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """The inverse: what diffusers builds the same network from. `CheckpointError` where it has none."""
    levels = range(len(config.channel_mult))
    plain = not config.use_spatial_transformer
    table = PLAIN_BLOCKS if plain else TRANSFORMER_BLOCKS
    with_attention, without = table
    down = [with_attention if 2**i in config.attention_resolutions else without for i in levels]
    last = config.depth(levels[-1])
    middle = config.transformer_depth_middle
    expressible(
        {
            "a U-Net of other than two dimensions": config.dims != 2,
            "a first level wider than model_channels": config.channel_mult[0] != 1,
            "residual blocks in the middle without attention": plain and config.middle != "attention",
            "residual blocks that resample": config.resblock_updown or not config.conv_resample,
            "a middle block deeper than the last level": not plain and middle not in (None, last),
            "continuous labels": config.num_classes == "continuous",
            "this order of attention channels": plain and config.use_new_attention_order,
            "self-attention in place of cross-attention": not plain and config.context_dim is None,
        }
    )
    widths = [config.model_channels * factor for factor in config.channel_mult]
    heads = [config.heads(channels) for channels in widths]
    # Plain attention has heads of one width there: that of the levels that have any, and of the middle.
    plain_heads = {heads[level][1] for level in levels if config.attended(level) or level == levels[-1]}
    expressible({"attention heads of unequal width": plain and len(plain_heads) > 1})
    values: dict[str, Any] = {
        "_class_name": "UNet2DModel" if plain else "UNet2DConditionModel",
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "attention_head_dim": heads[-1][1] if plain else _same([count for count, _ in heads]),
        "block_out_channels": widths,
        "center_input_sample": False,
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": _same([config.residual_blocks(level) for level in levels]),
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": config.num_groups,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": "scale_shift" if config.use_scale_shift_norm else "default",
        "sample_size": sample_size,
        "up_block_types": [UP[name] for name in reversed(down)],
    }
    if isinstance(config.num_classes, int):
        values["num_class_embeds"] = config.num_classes
    if plain:
        return values
    if config.num_classes == "sequential":
        values["addition_embed_type"] = "text_time"
        values["addition_time_embed_dim"] = 256
        values["projection_class_embeddings_input_dim"] = config.adm_in_channels
    middles = {"none": None, "attention": "UNetMidBlock2DCrossAttn", "residual": "UNetMidBlock2D"}
    values["mid_block_type"] = middles[config.middle]
    values["cross_attention_dim"] = config.context_dim
    values["transformer_layers_per_block"] = _same([max(1, config.depth(level)) for level in levels])
    values["use_linear_projection"] = config.use_linear_in_transformer
    if config.disable_self_attentions is not None:
        values["only_cross_attention"] = list(config.disable_self_attentions)
    if config.transformer_depth_output is not None:
        blocks, backwards = iter(config.transformer_depth_output), []
        for level in reversed(levels):
            depths = [next(blocks) for _ in range(config.residual_blocks(level) + 1)]
            expressible({"attention in a part of a level": 0 in depths and any(depths)})
            attended = any(depths)
            values["up_block_types"][len(backwards)] = UP[with_attention if attended else without]
            backwards.append([max(1, depth) for depth in depths])
        values["reverse_transformer_layers_per_block"] = backwards
    return values


def attended_levels(record: BlocksRecord, table: Mapping[str, bool], place: Path) -> tuple[int, ...]:
    """The levels that have attention; `CheckpointError` where the halves of the network disagree."""
    down, up = record.down_block_types, record.up_block_types
    for name in down:
        if name not in table:
            raise CheckpointError(
                f"{place}: there is no block {name[:80]!r} here", f"Allowed: {', '.join(table)}."
            )
    if up != tuple(UP[name] for name in reversed(down)) or len(record.block_out_channels) != len(down):
        raise CheckpointError(
            f"{place}: the blocks of encoder and decoder do not mirror each other", "It does not load here."
        )
    return tuple(level for level, name in enumerate(down) if table[name])


def _depths(record: UNetRecord, place: Path) -> tuple[int | tuple[int, ...], tuple[int, ...] | None]:
    """Transformer blocks of each level, and of each block of the decoder where that is another number."""
    given, backwards = record.transformer_layers_per_block, record.reverse_transformer_layers_per_block
    if isinstance(given, int):
        return given, None
    levels = tuple(depth if isinstance(depth, int) else depth[0] for depth in given)
    uneven = any(isinstance(depth, tuple) and len(set(depth)) > 1 for depth in given)
    counts = record.layers_per_block
    if uneven or len(levels) != len(record.down_block_types) or (backwards and not isinstance(counts, int)):
        raise CheckpointError(
            f"{place}: transformer_layers_per_block is {given}; it must be one number for each level",
            "This network is of a kind that does not load here.",
        )
    if backwards is None:
        return levels, None
    assert isinstance(counts, int)
    output: list[int] = []
    for depth, name in zip(backwards, record.up_block_types, strict=False):
        depths = (depth,) * (counts + 1) if isinstance(depth, int) else depth
        output += depths if "Attn" in name else (0,) * (counts + 1)
    return levels, tuple(output)


def base_width(channels: Sequence[int], place: Path) -> tuple[int, tuple[int, ...]]:
    """The base width and each level's multiple of it."""
    width = channels[0]
    if any(count % width for count in channels):
        raise CheckpointError(
            f"{place}: block_out_channels is {list(channels)}; all must be multiples of the first",
            "This network is of a kind that does not load here.",
        )
    return width, tuple(count // width for count in channels)


def _heads(record: UNetRecord, plain: bool, place: Path) -> tuple[int, int]:
    """(num_heads, num_head_channels), one of them -1. In UNet2DConditionModel the option called
    `attention_head_dim` is the number of heads, by an old mistake that its files depend on."""
    given = record.attention_head_dim
    if plain:
        if isinstance(given, tuple):
            raise CheckpointError(f"{place}: attention_head_dim must be one number", "It does not load here.")
        return (1, -1) if given is None else (-1, given)
    count = record.num_attention_heads or given or 8
    if isinstance(count, int):
        return count, -1
    widths = {channels // number for channels, number in zip(record.block_out_channels, count, strict=False)}
    if len(count) == len(record.block_out_channels) and len(set(count)) == 1:
        return count[0], -1
    if len(count) != len(record.block_out_channels) or len(widths) != 1:
        raise CheckpointError(
            f"{place}: attention_head_dim is {list(count)}; heads must be equal in number or in width",
            "This network is of a kind that does not load here.",
        )
    return -1, widths.pop()


def _disabled(record: UNetRecord) -> tuple[bool, ...] | None:
    """For each level whether its first attention is to the context; None for nowhere."""
    given = record.only_cross_attention
    if isinstance(given, tuple):
        return given
    return (True,) * len(record.down_block_types) if given else None


def _same(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values

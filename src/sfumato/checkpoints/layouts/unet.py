"""The names of a U-Net's tensors here (latent diffusion's own) and in diffusers, made from its options."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.checkpoints.layouts.pair import (
    Pair,
    affine,
    convolution,
    linear_of_convolution,
    same,
    split_heads,
)
from sfumato.nn.unet import UNetConfig

# diffusers' names for (query, key, value, out) of plain attention: since 0.17, and before.
ATTENTION = {"": ("to_q", "to_k", "to_v", "to_out.0"), "old": ("query", "key", "value", "proj_attn")}


def unet_pairs(config: UNetConfig, attention: str = "") -> Iterator[Pair]:
    """Every tensor of `UNet(config)` with its name in diffusers, in the order of the network.

    attention: which of diffusers' names plain attention blocks go by, a key of ATTENTION.
    """
    width, kernel = config.model_channels, (3,) * config.dims
    yield from convolution("input_blocks.0.0", "conv_in", config.in_channels, width, kernel)
    yield from affine("time_embed.0", "time_embedding.linear_1", (4 * width, width))
    yield from affine("time_embed.2", "time_embedding.linear_2", (4 * width, 4 * width))
    yield from _labels(config)
    yield from _encoder(config, attention)
    yield from _middle(config, attention)
    yield from _decoder(config, attention)
    last = config.channel_mult[0] * width
    yield from affine("out.0", "conv_norm_out", (last,))
    yield from convolution("out.2", "conv_out", last, config.out_channels, kernel)


def _labels(config: UNetConfig) -> Iterator[Pair]:
    width = 4 * config.model_channels
    if isinstance(config.num_classes, int):
        yield same("label_emb.weight", "class_embedding.weight", (config.num_classes, width))
    elif config.num_classes == "sequential" and config.adm_in_channels is not None:
        yield from affine("label_emb.0.0", "add_embedding.linear_1", (width, config.adm_in_channels))
        yield from affine("label_emb.0.2", "add_embedding.linear_2", (width, width))
    elif config.num_classes == "continuous":
        yield from affine("label_emb", "class_embedding", (width, 1))


def _encoder(config: UNetConfig, attention: str) -> Iterator[Pair]:
    channels, index = config.model_channels, 1
    for level, factor in enumerate(config.channel_mult):
        theirs = f"down_blocks.{level}"
        for block in range(config.residual_blocks(level)):
            own, width = f"input_blocks.{index}", factor * config.model_channels
            yield from _residual(config, f"{own}.0", f"{theirs}.resnets.{block}", channels, width)
            channels, index = width, index + 1
            if config.attended(level):
                place = (f"{own}.1", f"{theirs}.attentions.{block}")
                yield from _attention(config, place, channels, config.depth(level), attention, level)
        if level < len(config.channel_mult) - 1:
            own, place = f"input_blocks.{index}.0", f"{theirs}.downsamplers.0"
            if config.resblock_updown:
                yield from _residual(config, own, place, channels, channels)
            elif config.conv_resample:
                yield from convolution(f"{own}.op", f"{place}.conv", channels, channels, (3,) * config.dims)
            index += 1


def _middle(config: UNetConfig, attention: str) -> Iterator[Pair]:
    channels = config.channel_mult[-1] * config.model_channels
    if config.middle == "none":
        return
    yield from _residual(config, "middle_block.0", "mid_block.resnets.0", channels, channels)
    if config.middle == "attention":
        depth = config.transformer_depth_middle
        depth = config.depth(len(config.channel_mult) - 1) if depth is None else depth
        place = ("middle_block.1", "mid_block.attentions.0")
        yield from _attention(config, place, channels, depth, attention)
        yield from _residual(config, "middle_block.2", "mid_block.resnets.1", channels, channels)


def _decoder(config: UNetConfig, attention: str) -> Iterator[Pair]:
    levels = len(config.channel_mult)
    skips = [config.model_channels]
    for level, factor in enumerate(config.channel_mult):
        resampled = level < levels - 1
        skips += [factor * config.model_channels] * (config.residual_blocks(level) + resampled)
    channels, index = config.channel_mult[-1] * config.model_channels, 0
    for level in reversed(range(levels)):
        theirs, width = f"up_blocks.{levels - 1 - level}", config.channel_mult[level] * config.model_channels
        blocks = config.residual_blocks(level) + 1
        for block in range(blocks):
            own = f"output_blocks.{index}"
            inputs = channels + skips.pop()
            yield from _residual(config, f"{own}.0", f"{theirs}.resnets.{block}", inputs, width)
            channels, layers = width, 1
            if config.attended_output(level, index):
                place = (f"{own}.1", f"{theirs}.attentions.{block}")
                depth = config.depth_output(level, index)
                yield from _attention(config, place, channels, depth, attention, level, decoder=True)
                layers = 2
            if level > 0 and block == blocks - 1:
                own, place = f"{own}.{layers}", f"{theirs}.upsamplers.0"
                if config.resblock_updown:
                    yield from _residual(config, own, place, channels, channels)
                elif config.conv_resample:
                    kernel = (3,) * config.dims
                    yield from convolution(f"{own}.conv", f"{place}.conv", channels, channels, kernel)
            index += 1


def _residual(config: UNetConfig, own: str, theirs: str, inputs: int, outputs: int) -> Iterator[Pair]:
    kernel = (3,) * config.dims
    yield from affine(f"{own}.in_layers.0", f"{theirs}.norm1", (inputs,))
    yield from convolution(f"{own}.in_layers.2", f"{theirs}.conv1", inputs, outputs, kernel)
    width = 2 * outputs if config.use_scale_shift_norm else outputs
    yield from affine(f"{own}.emb_layers.1", f"{theirs}.time_emb_proj", (width, 4 * config.model_channels))
    yield from affine(f"{own}.out_layers.0", f"{theirs}.norm2", (outputs,))
    yield from convolution(f"{own}.out_layers.3", f"{theirs}.conv2", outputs, outputs, kernel)
    if inputs != outputs:
        kernel = (1,) * config.dims
        yield from convolution(f"{own}.skip_connection", f"{theirs}.conv_shortcut", inputs, outputs, kernel)


def _attention(
    config: UNetConfig,
    place: tuple[str, str],
    channels: int,
    depth: int,
    attention: str,
    level: int | None = None,
    *,
    decoder: bool = False,
) -> Iterator[Pair]:
    """level: None in the middle."""
    own, theirs = place
    heads, dim_head = config.heads(channels, decoder=decoder)
    if config.use_spatial_transformer:
        own_keys = level is None or config.self_attends(level)
        yield from _transformer(config, place, channels, heads * dim_head, depth, own_keys=own_keys)
        return
    query, key, value, out = ATTENTION[attention]
    split = split_heads(heads, by_head=not config.use_new_attention_order)
    yield from affine(f"{own}.norm", f"{theirs}.group_norm", (channels,))
    for kind, shape in (("weight", (3 * channels, channels, 1)), ("bias", (3 * channels,))):
        names = tuple(f"{theirs}.{name}.{kind}" for name in (query, key, value))
        yield Pair(f"{own}.qkv.{kind}", names, split, shape)
    yield from linear_of_convolution(f"{own}.proj_out", f"{theirs}.{out}", channels, 1)


def _transformer(
    config: UNetConfig, place: tuple[str, str], channels: int, inner: int, depth: int, *, own_keys: bool
) -> Iterator[Pair]:
    own, theirs = place
    kernel = () if config.use_linear_in_transformer else (1,) * config.dims
    yield from affine(f"{own}.norm", f"{theirs}.norm", (channels,))
    yield from affine(f"{own}.proj_in", f"{theirs}.proj_in", (inner, channels, *kernel))
    for block in range(depth):
        names = f"{own}.transformer_blocks.{block}", f"{theirs}.transformer_blocks.{block}"
        yield from _transformer_block(*names, inner, config.context_dim, own_keys=own_keys)
    yield from affine(f"{own}.proj_out", f"{theirs}.proj_out", (channels, inner, *kernel))


def _transformer_block(
    own: str, theirs: str, width: int, context: int | None, *, own_keys: bool
) -> Iterator[Pair]:
    read = width if context is None else context
    for name, keys in (("attn1", width if own_keys else read), ("attn2", read)):
        yield same(f"{own}.{name}.to_q.weight", f"{theirs}.{name}.to_q.weight", (width, width))
        yield same(f"{own}.{name}.to_k.weight", f"{theirs}.{name}.to_k.weight", (width, keys))
        yield same(f"{own}.{name}.to_v.weight", f"{theirs}.{name}.to_v.weight", (width, keys))
        yield from affine(f"{own}.{name}.to_out.0", f"{theirs}.{name}.to_out.0", (width, width))
    yield from affine(f"{own}.ff.net.0.proj", f"{theirs}.ff.net.0.proj", (8 * width, width))
    yield from affine(f"{own}.ff.net.2", f"{theirs}.ff.net.2", (width, 4 * width))
    for norm in ("norm1", "norm2", "norm3"):
        yield from affine(f"{own}.{norm}", f"{theirs}.{norm}", (width,))

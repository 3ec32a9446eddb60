"""The names of an autoencoder's tensors here (LDM's own) and in diffusers, made from its options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from sfumato.checkpoints.layouts.pair import Pair, affine, convolution, linear_of_convolution, same
from sfumato.checkpoints.layouts.unet import ATTENTION
from sfumato.nn.autoencoder import AutoencoderConfig


def autoencoder_pairs(config: AutoencoderConfig, attention: str = "") -> Iterator[Pair]:
    """Every tensor of `AutoencoderKL(config)` or `VQModel(config)` with its name in diffusers.

    attention: which of diffusers' names attention goes by, a key of `layouts_unet.ATTENTION`.
    """
    names = ATTENTION[attention]
    widths, latent, moments = config.widths, config.embed_dim, config.z_channels
    if config.double_z:
        latent, moments = 2 * latent, 2 * moments
    yield from convolution("encoder.conv_in", "encoder.conv_in", config.in_channels, config.ch)
    resolution = config.resolution
    for level, (inputs, width) in enumerate(pairwise((config.ch, *widths))):
        own, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        attended = resolution in config.attn_resolutions
        yield from _level(
            config, (own, theirs), (inputs, width), config.num_res_blocks, names if attended else ()
        )
        if level < len(widths) - 1 and config.resamp_with_conv:
            place = f"{theirs}.downsamplers.0.conv"
            yield from convolution(f"{own}.downsample.conv", place, width, width)
        resolution //= 2
    yield from _middle(config, "encoder", names)
    yield from affine("encoder.norm_out", "encoder.conv_norm_out", widths[-1:])
    yield from convolution("encoder.conv_out", "encoder.conv_out", widths[-1], moments)
    yield from _decoder(config, names)
    if config.n_embed is not None:
        weight = "quantize.embedding.weight"
        yield same(weight, weight, (config.n_embed, config.embed_dim))
    yield from convolution("quant_conv", "quant_conv", moments, latent, (1, 1))
    yield from convolution("post_quant_conv", "post_quant_conv", config.embed_dim, config.z_channels, (1, 1))


def _decoder(config: AutoencoderConfig, names: Sequence[str]) -> Iterator[Pair]:
    widths = config.widths
    yield from convolution("decoder.conv_in", "decoder.conv_in", config.z_channels, widths[-1])
    yield from _middle(config, "decoder", names)
    inputs, resolution = widths[-1], config.resolution // config.downsampling
    for level, width in reversed(list(enumerate(widths))):
        own, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{len(widths) - 1 - level}"
        attended = resolution in config.attn_resolutions
        blocks = config.num_res_blocks + 1
        yield from _level(config, (own, theirs), (inputs, width), blocks, names if attended else ())
        if level > 0 and config.resamp_with_conv:
            yield from convolution(f"{own}.upsample.conv", f"{theirs}.upsamplers.0.conv", width, width)
        inputs, resolution = width, resolution * 2
    yield from affine("decoder.norm_out", "decoder.conv_norm_out", widths[:1])
    yield from convolution("decoder.conv_out", "decoder.conv_out", widths[0], config.out_ch)


def _level(
    config: AutoencoderConfig,
    place: tuple[str, str],
    channels: tuple[int, int],
    blocks: int,
    attention: Sequence[str],
) -> Iterator[Pair]:
    """Residual blocks, each with attention unless no names are given for it."""
    own, theirs = place
    inputs, outputs = channels
    for block in range(blocks):
        yield from _residual(f"{own}.block.{block}", f"{theirs}.resnets.{block}", inputs, outputs)
        if attention:
            names = f"{own}.attn.{block}", f"{theirs}.attentions.{block}"
            yield from _attention(config, *names, outputs, attention)
        inputs = outputs


def _middle(config: AutoencoderConfig, side: str, names: Sequence[str]) -> Iterator[Pair]:
    own, theirs, width = f"{side}.mid", f"{side}.mid_block", config.widths[-1]
    yield from _residual(f"{own}.block_1", f"{theirs}.resnets.0", width, width)
    yield from _attention(config, f"{own}.attn_1", f"{theirs}.attentions.0", width, names)
    yield from _residual(f"{own}.block_2", f"{theirs}.resnets.1", width, width)


def _residual(own: str, theirs: str, inputs: int, outputs: int) -> Iterator[Pair]:
    yield from affine(f"{own}.norm1", f"{theirs}.norm1", (inputs,))
    yield from convolution(f"{own}.conv1", f"{theirs}.conv1", inputs, outputs)
    yield from affine(f"{own}.norm2", f"{theirs}.norm2", (outputs,))
    yield from convolution(f"{own}.conv2", f"{theirs}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from convolution(f"{own}.nin_shortcut", f"{theirs}.conv_shortcut", inputs, outputs, (1, 1))


def _attention(
    config: AutoencoderConfig, own: str, theirs: str, channels: int, names: Sequence[str]
) -> Iterator[Pair]:
    if config.attn_type == "none":
        return
    query, key, value, out = names
    if config.attn_type == "linear":  # diffusers has no such layer; its names are ours
        yield same(f"{own}.to_qkv.weight", f"{theirs}.to_qkv.weight", (3 * channels, channels, 1, 1))
        yield from convolution(f"{own}.to_out", f"{theirs}.to_out", channels, channels, (1, 1))
        return
    yield from affine(f"{own}.norm", f"{theirs}.group_norm", (channels,))
    for layer, name in (("q", query), ("k", key), ("v", value), ("proj_out", out)):
        yield from linear_of_convolution(f"{own}.{layer}", f"{theirs}.{name}", channels, 2)

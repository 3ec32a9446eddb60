"""The names of the tensors of control networks here and elsewhere, made from their options."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sfumato.checkpoints.layouts.pair import Pair, convolution
from sfumato.checkpoints.layouts.unet import unet_pairs
from sfumato.nn.controlnet import ControlNetConfig

DECODER = ("output_blocks.", "out.")


def control_pairs(config: ControlNetConfig) -> Iterator[Pair]:
    """Every tensor of `ControlNet(config)`, whose names are its authors', with its name in diffusers."""
    encoder = config.encoder
    yield from (pair for pair in unet_pairs(encoder) if not pair.native.startswith(DECODER))
    widths = [encoder.model_channels]
    for level, factor in enumerate(encoder.channel_mult):
        halved = level < len(encoder.channel_mult) - 1
        widths += [factor * encoder.model_channels] * (encoder.residual_blocks(level) + halved)
    kernel = (1,) * encoder.dims
    for i, width in enumerate(widths):
        yield from convolution(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}", width, width, kernel)
    yield from convolution("middle_block_out.0", "controlnet_mid_block", widths[-1], widths[-1], kernel)
    yield from _hint_block(config)


def _hint_block(config: ControlNetConfig) -> Iterator[Pair]:
    """Convolutions stand at the even numbers here, activations between them."""
    own, theirs = "input_hint_block", "controlnet_cond_embedding"
    kernel, widths = (3,) * config.encoder.dims, config.hint_widths
    yield from convolution(f"{own}.0", f"{theirs}.conv_in", config.hint_channels, widths[0], kernel)
    sides = [side for pair in itertools.pairwise(widths) for side in (pair[:1] * 2, pair)]
    for i, (narrow, wide) in enumerate(sides):
        yield from convolution(f"{own}.{2 * i + 2}", f"{theirs}.blocks.{i}", narrow, wide, kernel)
    last = 2 * len(sides) + 2
    yield from convolution(
        f"{own}.{last}", f"{theirs}.conv_out", widths[-1], config.encoder.model_channels, kernel
    )

"""The original's layers under their constructors (`ldm.modules.attention`, `openaimodel`), around ours."""

from __future__ import annotations

import math

from torch import nn

from sfumato.errors import InputError
from sfumato.nn import attention, layers

NUM_GROUPS = 32  # of every normalisation in the original


class CrossAttention(attention.CrossAttention):
    """`ldm.modules.attention.CrossAttention`: x (b, n, query_dim) attends to context (b, m, context_dim).

    Where no context is given queries, keys and values are all made from x.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(query_dim, context_dim, heads, dim_head)
        self.to_out.append(nn.Dropout(dropout))


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """`ldm.modules.attention.BasicTransformerBlock`: self-attention, cross-attention, feed-forward.

    gated_ff and checkpoint are taken because the original has them: the feed-forward is always gated, and
    activations are recomputed for whole U-Net blocks (`UNet.gradient_checkpointing`). `InputError` for
    gated_ff = False and for a dropout.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
    ) -> None:
        _without_dropout(dropout)
        if not gated_ff:
            raise InputError("gated_ff is False; the feed-forward of every released model is gated")
        super().__init__(dim, context_dim, n_heads, d_head)


class SpatialTransformer(attention.SpatialTransformer):
    """`ldm.modules.attention.SpatialTransformer`: transformer blocks over the positions of (b, c, h, w).

    context_dim None leaves a self-attention. `InputError` for a dropout.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
    ) -> None:
        _without_dropout(dropout)
        config = attention.SpatialTransformerConfig(
            heads=n_heads,
            dim_head=d_head,
            depth=depth,
            context_dim=context_dim,
            use_linear=False,
            dims=2,
            num_groups=_groups(in_channels),
        )
        super().__init__(in_channels, config)


class Upsample(layers.Upsample):
    """`openaimodel.Upsample`: (b, channels, *s) -> twice as large; `InputError` for other out_channels."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        _same(channels, out_channels)
        super().__init__(channels, use_conv=use_conv, dims=dims)


class Downsample(layers.Downsample):
    """`openaimodel.Downsample`: (b, channels, *s) -> half as large; `InputError` for other out_channels."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        _same(channels, out_channels)
        super().__init__(channels, use_conv=use_conv, dims=dims)


class TimestepBlock(nn.Module):
    """A module whose forward takes the timestep's embedding (b, emb_channels) as its second argument."""


class ResBlock(layers.ResBlock, TimestepBlock):
    """`openaimodel.ResBlock`: (b, channels, *s) and an embedding (b, emb_channels) -> (b, out_channels, *s).

    up, down: double or halve s. `InputError` for use_conv, a 3-wide shortcut that no released model has.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        up: bool = False,
        down: bool = False,
    ) -> None:
        if use_conv:
            raise InputError("use_conv is True; the shortcut is a 1-wide convolution here", "Leave it unset.")
        config = layers.ResBlockConfig(
            emb_channels=emb_channels,
            dropout=dropout,
            dims=dims,
            use_scale_shift_norm=use_scale_shift_norm,
            num_groups=_groups(channels, out_channels or channels),
        )
        resample: nn.Module | None = None
        if up or down:
            kind = layers.Upsample if up else layers.Downsample
            resample = kind(channels, use_conv=False, dims=dims)
        super().__init__(config, channels, out_channels or channels, resample)


def _groups(*channels: int) -> int:
    """The original's 32 groups; fewer, which it lacks, for widths that 32 does not divide."""
    return math.gcd(NUM_GROUPS, *channels)


def _without_dropout(dropout: float) -> None:
    if dropout:
        raise InputError(
            f"dropout is {dropout}; transformer blocks have none here, as in every released model",
            "Leave it 0; the residual blocks have one.",
        )


def _same(channels: int, out_channels: int | None) -> None:
    if out_channels not in (None, channels):
        raise InputError(f"out_channels is {out_channels} for {channels} channels", "Make them equal.")

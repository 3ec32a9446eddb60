"""Autoencoders on large pictures: exactly, in bands of rows, or fast, in overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.errors import InputError, nearest
from sfumato.nn.autoencoder import (
    Attention,
    AutoencoderKL,
    Decoder,
    DiagonalGaussian,
    DownLevel,
    Downsample,
    Encoder,
    Level,
    LinearAttention,
    Middle,
    ResnetBlock,
    UpLevel,
    Upsample,
)
from sfumato.nn.rows import Rows, added, convolved, doubled, normed, pooled, store, stored, strided
from sfumato.nn.tiles import Tiling, in_tiles
from sfumato.nn.vq import Latents, VQModel

Mode = Literal["exact", "fast"]
MODES = ("exact", "fast")
Wrap = tuple[bool, bool]
FLAT: Wrap = (False, False)
TILE, OVERLAP = 64, 8  # in latents: 512 and 64 pixels of Stable Diffusion's


@torch.no_grad()
def decode_tiled(
    model: AutoencoderKL | VQModel,
    latents: Tensor,
    mode: Mode = "exact",
    *,
    wrap: Wrap = FLAT,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> Tensor:
    """`model.decode(latents)`, (b, embed_dim, h, w) -> (b, out_ch, f * h, f * w), in less memory.

    exact: normalisations take their statistics over the whole picture, convolutions run in bands of rows, so
    that the result is the whole decoder's up to rounding; about twice its time, and in memory little beyond
    one map at the picture's size. fast: tiles of `tile` latents a side that see `overlap` more and fade into
    each other, in memory that does not grow with the picture; tones may differ, as each has statistics of its
    own.
    wrap: whether (y, x) are circles, for `nn.seamless`; in exact mode only, in fast mode tiles have edges.
    Raises `InputError` for another mode.
    """
    latents = model.quantize(latents) if isinstance(model, VQModel) else latents

    def whole(z: Tensor) -> Tensor:
        z = model.post_quant_conv(z)
        return _decoded(model.decoder, z, wrap) if mode == "exact" else model.decoder(z)

    if _checked(mode) == "exact":
        return whole(latents)
    return _each(latents, lambda z: in_tiles(whole, z, _tiling(z, tile, overlap), up=model.downsampling))


@torch.no_grad()
def encode_tiled(
    model: AutoencoderKL | VQModel,
    pictures: Tensor,
    mode: Mode = "exact",
    *,
    wrap: Wrap = FLAT,
    tile: int = TILE,
    overlap: int = OVERLAP,
) -> DiagonalGaussian | Latents:
    """`model.encode(pictures)`, (b, in_channels, H, W) -> its latents, in less memory; see `decode_tiled`.

    tile, overlap: in latents too. H and W are multiples of the model's downsampling.
    """
    factor = model.downsampling
    if pictures.shape[-1] % factor or pictures.shape[-2] % factor:
        size = f"{pictures.shape[-1]}x{pictures.shape[-2]}"
        raise InputError(f"the picture is {size}; sides must be multiples of {factor}", "Resize it.")

    def whole(x: Tensor) -> Tensor:
        return model.quant_conv(_encoded(model.encoder, x, wrap) if mode == "exact" else model.encoder(x))

    if _checked(mode) == "exact":
        made = whole(pictures)
    else:
        tiling = _tiling(pictures, tile * factor, overlap * factor, factor)
        made = _each(pictures, lambda x: in_tiles(whole, x, tiling, down=factor))
    return Latents(made) if isinstance(model, VQModel) else DiagonalGaussian.from_moments(made)


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"there is no way {mode!r} to tile", nearest(mode, MODES))
    return mode


def _tiling(picture: Tensor, tile: int, overlap: int, multiple: int = 1) -> Tiling:
    """Tiles no larger than the picture."""
    side = min(tile, max(picture.shape[-2:]))
    return Tiling(side, min(overlap, side), multiple)


def _each(samples: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([function(sample) for sample in samples.split(1)])


def _decoded(decoder: Decoder, z: Tensor, wrap: Wrap) -> Tensor:
    """The decoder's forward, map by map, one sample after the other."""

    def one(z: Tensor) -> Tensor:
        h = store(convolved(stored(z), decoder.conv_in, wrap))
        for step in (*_middle(decoder.mid, wrap), *_levels(reversed(decoder.up), wrap)):
            h = step(h)
        if decoder.give_pre_end:
            return _whole(h)
        out = convolved(normed(h, decoder.norm_out), decoder.conv_out, wrap)
        return decoder.activation(_whole(store(out)))

    return _each(z, one)


def _encoded(encoder: Encoder, x: Tensor, wrap: Wrap) -> Tensor:
    """The encoder's forward, map by map, one sample after the other."""

    def one(x: Tensor) -> Tensor:
        h = convolved(stored(x), encoder.conv_in, wrap)
        for step in (*_levels(encoder.down, wrap), *_middle(encoder.mid, wrap)):
            h = step(h)
        return _whole(store(convolved(normed(h, encoder.norm_out), encoder.conv_out, wrap)))

    return _each(x, one)


Step = Callable[[Rows], Rows]
"""A map to the next one. Whoever holds the first lets go of it, which calls inside calls would not."""


def _levels(levels: Iterable[nn.Module], wrap: Wrap) -> Iterator[Step]:
    """Each level's blocks and attention, and what resamples its end, uncomputed where that is larger."""
    for level in levels:
        assert isinstance(level, Level)
        for block, attention in zip(level.block, level.attn, strict=True):
            yield partial(_block, block, wrap)
            yield partial(_attended, attention)
        if isinstance(level, DownLevel):
            yield partial(_smaller, level.downsample, wrap)
        if isinstance(level, UpLevel):
            yield partial(_larger, level.upsample, wrap)


def _middle(middle: Middle, wrap: Wrap) -> Iterator[Step]:
    yield partial(_block, middle.block_1, wrap)
    yield partial(_attended, middle.attn_1)
    yield partial(_block, middle.block_2, wrap)


def _block(block: nn.Module, wrap: Wrap, x: Rows) -> Rows:
    """A residual block, in place where that is possible; the first convolution is then computed twice."""
    assert isinstance(block, ResnetBlock)
    h = convolved(normed(x, block.norm1), block.conv1, wrap)
    # On a circle the last rows read the first, which must not have been written over.
    in_place = x.stored is not None and isinstance(block.nin_shortcut, nn.Identity) and not wrap[0]
    if not in_place:
        h = store(h)
    target = None if wrap[0] else x.stored if in_place else h.stored
    h = convolved(normed(h, block.norm2), block.conv2, wrap)
    shortcut = block.nin_shortcut
    beside = convolved(x, shortcut) if isinstance(shortcut, nn.Conv2d) else x
    return store(added(beside, h), target)


def _attended(attention: nn.Module, h: Rows) -> Rows:
    if isinstance(attention, nn.Identity):
        return h
    assert isinstance(attention, Attention | LinearAttention)
    return stored(attention(_whole(h)))


def _smaller(downsample: nn.Module, wrap: Wrap, h: Rows) -> Rows:
    if not isinstance(downsample, Downsample):
        return h
    conv = downsample.conv
    return store(strided(h, conv, wrap) if isinstance(conv, nn.Conv2d) else pooled(h))


def _larger(upsample: nn.Module, wrap: Wrap, h: Rows) -> Rows:
    if not isinstance(upsample, Upsample):
        return h
    conv = upsample.conv
    return convolved(doubled(h), conv, wrap) if isinstance(conv, nn.Conv2d) else doubled(h)


def _whole(rows: Rows) -> Tensor:
    values = rows.stored if rows.stored is not None else store(rows).stored
    assert values is not None
    return values

"""Deep shrink: a U-Net on a smaller map for a while, so that large pictures hold together (Kohya 2023)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import InputError
from sfumato.nn.unet import Patch
from sfumato.nn.unet_config import UNetConfig

Method = Literal["bicubic", "bilinear", "nearest-exact", "area"]


def deep_shrink(config: UNetConfig, block: int = 3, factor: float = 2.0, method: Method = "bicubic") -> Patch:
    """A patch that makes what leaves `input_blocks.block` `factor` times smaller, until the decoder.

    It is meant for the first steps, while the composition is found, in pictures larger than those of the
    training: give it to the noise levels above that of step 35 % (ComfyUI's default), and none to the rest.
    block: from 1; 3 is the first half-size block of Stable Diffusion 1. factor: 1 changes nothing. The
    decoder enlarges where its map meets a skip connection of another size. Raises InputError for a block that
    the network does not have, and for a factor below 1.
    """
    count = sum(config.residual_blocks(level) + 1 for level in range(len(config.channel_mult)))
    if not 1 <= block < count:
        raise InputError(f"there is no block {block} to shrink after.", f"It can be 1 to {count - 1}.")
    if not factor >= 1:
        raise InputError(f"the factor is {factor}; it must be at least 1.")

    def encoder(i: int, h: Tensor) -> Tensor:
        if i != block or factor == 1:
            return h
        size = tuple(max(1, round(side / factor)) for side in h.shape[2:])
        return _resized(h, size, method)

    def skip(i: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        size = tuple(skip.shape[2:])
        return (h if tuple(h.shape[2:]) == size else _resized(h, size, method)), skip

    return Patch(encoder=encoder, skip=skip)


def _resized(h: Tensor, size: tuple[int, ...], method: Method) -> Tensor:
    smooth = method in ("bicubic", "bilinear")
    return F.interpolate(h, size=size, mode=method, align_corners=False if smooth else None)

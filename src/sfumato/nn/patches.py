"""Patches for the block seam of the U-Net: disturbed and kept self-attention, and FreeU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.nn.attention import Attend, AttentionBlock, BasicTransformerBlock, CrossAttention, attend
from sfumato.nn.unet import Patch, UNet
from sfumato.nn.unet_config import UNetConfig

Change = Callable[[str, Tensor, Tensor, Tensor, Attend], Tensor]
"""change(name, q, k, v, otherwise) -> like q: what is done in place of `otherwise(name, q, k, v)`."""

MIDDLE = ("middle_block",)


@dataclass(frozen=True)
class AttentionIn:
    """An `Attend` that is changed in some layers and left to `otherwise` in all others."""

    layers: frozenset[str]
    change: Change
    otherwise: Attend = attend

    def __call__(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name in self.layers:
            return self.change(name, q, k, v, self.otherwise)
        return self.otherwise(name, q, k, v)


def combine_patches(first: Patch, second: Patch) -> Patch:
    """Both patches at once, `first` around `second`.

    What leaves or enters a block goes through `first`, then through `second`. Attention that `first` changes
    in some layers is `second`'s in the others, and is what `first` changes. `InputError` where `first`
    replaces attention in every layer and `second` has one of its own.
    """

    def encoder(i: int, h: Tensor) -> Tensor:
        return second.encoder(i, first.encoder(i, h))

    def skip(i: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return second.skip(i, *first.skip(i, h, skip))

    return Patch(_chain(first.attention, second.attention), encoder, skip)


def _chain(first: Attend, second: Attend) -> Attend:
    if first is attend:
        return second
    if isinstance(first, AttentionIn):
        return replace(first, otherwise=_chain(first.otherwise, second))
    if second is attend:
        return first
    raise InputError(
        "the first patch replaces attention in every layer, so that nothing is left to the second",
        "Give the patch of some layers first.",
    )


def self_attention_layers(network: UNet) -> list[str]:
    """The state-dict names of the modules whose queries and keys are both of the picture, in its order."""
    reading = {
        f"{name}.attn1"
        for name, module in network.named_modules()
        if isinstance(module, BasicTransformerBlock) and module.disable_self_attention
    }
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, AttentionBlock)
        or (
            isinstance(module, CrossAttention)
            and (name.endswith(".attn1") or network.config.context_dim is None)
            and name not in reading
        )
    ]


def choose_layers(network: UNet, prefixes: Sequence[str]) -> list[str]:
    """The self-attention layers that lie in the named modules, in the network's order.

    prefixes: state-dict names, of the layers themselves or of what they lie in ("middle_block",
    "output_blocks.5"). `InputError` for one without any such layer, which lists those that there are.
    """
    layers = self_attention_layers(network)

    def inside(name: str, prefix: str) -> bool:
        return name == prefix or name.startswith(f"{prefix}.")

    for prefix in prefixes:
        if not any(inside(name, prefix) for name in layers):
            there = ", ".join(layers) or "none"
            raise InputError(f"there is no self-attention in {prefix!r}", f"This network has: {there}.")
    return [name for name in layers if any(inside(name, prefix) for prefix in prefixes)]


def perturbed_attention(network: UNet, layers: Sequence[str] = MIDDLE) -> Patch:
    """Self-attention where each position sees itself alone: the values as they are (Ahn et al. 2024).

    layers: as in `choose_layers`, by default the middle block's.
    """
    return _in_layers(choose_layers(network, layers), lambda name, q, k, v, otherwise: v)


def smoothed_attention(network: UNet, layers: Sequence[str] = MIDDLE) -> Patch:
    """Self-attention whose queries are blurred without end: every position asks with the mean (Hong 2024).

    layers: as in `choose_layers`.
    """

    def change(name: str, q: Tensor, k: Tensor, v: Tensor, otherwise: Attend) -> Tensor:
        return otherwise(name, q.mean(dim=2, keepdim=True).expand_as(q), k, v)

    return _in_layers(choose_layers(network, layers), change)


def kept_attention(network: UNet, layer: str = MIDDLE[0]) -> tuple[Patch, Callable[[], Tensor]]:
    """A patch that keeps where one self-attention layer looks, and the function that takes it after a pass.

    layer: as in `choose_layers`, the first where there are several. What is taken, (b, tokens) in float32, is
    the attention that each position receives from all others, the mean over the heads; its mean is 1. It is
    kept until it is taken. The outputs of the network are unchanged.
    """
    kept: list[Tensor] = []

    def change(name: str, q: Tensor, k: Tensor, v: Tensor, otherwise: Attend) -> Tensor:
        scores = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        kept[:] = [scores.softmax(dim=-1).mean(dim=1).sum(dim=1)]  # (b, queries, keys) -> (b, keys)
        return otherwise(name, q, k, v)

    return _in_layers(choose_layers(network, [layer])[:1], change), kept.pop


def freeu(
    config: UNetConfig,
    b1: float = 1.5,
    b2: float = 1.6,
    s1: float = 0.9,
    s2: float = 0.2,
    *,
    version: Literal[1, 2] = 1,
) -> Patch:
    """FreeU: stronger backbone features, weaker low frequencies of the skip connections (Si et al. 2023).

    b1, s1: factors in the deepest level of the decoder; b2, s2: in the one above. The defaults are those that
    diffusers' documentation gives for Stable Diffusion 1.5. b multiplies half of the channels: by b
    everywhere (version 1), or by 1 where their mean is lowest to b where it is highest (version 2,
    "structure-related").
    """
    levels = range(len(config.channel_mult))
    ends, stages = 0, dict[int, tuple[float, float]]()
    for level, factors in zip(reversed(levels), ((b1, s1), (b2, s2)), strict=False):
        blocks = config.residual_blocks(level) + 1
        stages |= dict.fromkeys(range(ends, ends + blocks), factors)
        ends += blocks
    strengthen = _strengthened if version == 1 else _strengthened_by_structure

    def skip(i: int, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        if i not in stages:
            return h, skip
        backbone, share = stages[i]
        half = h.shape[1] // 2
        return torch.cat([strengthen(h, backbone)[:, :half], h[:, half:]], dim=1), low_scaled(skip, share)

    return Patch(skip=skip)


def low_scaled(values: Tensor, scale: float) -> Tensor:
    """values (b, c, *s) with the lowest frequencies, 0 and -1 on each axis, multiplied by `scale`.

    Computed in float32 at least: half precision has no transform for sides that are no powers of 2.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    axes = tuple(range(2, values.ndim))
    spectrum = torch.fft.fftshift(torch.fft.fftn(wide, dim=axes), dim=axes)
    low = tuple(slice(max(side // 2 - 1, 0), side // 2 + 1) for side in values.shape[2:])
    spectrum[(..., *low)] *= scale
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=axes), dim=axes).real.to(values.dtype)


def _strengthened(h: Tensor, factor: float) -> Tensor:
    return h * factor


def _strengthened_by_structure(h: Tensor, factor: float) -> Tensor:
    mean = h.mean(dim=1, keepdim=True)
    axes = tuple(range(1, h.ndim))
    lowest, highest = mean.amin(dim=axes, keepdim=True), mean.amax(dim=axes, keepdim=True)
    span = (highest - lowest).clamp_min(torch.finfo(h.dtype).tiny)
    return h * ((factor - 1) * (mean - lowest) / span + 1)


def _in_layers(layers: Sequence[str], change: Change) -> Patch:
    return Patch(attention=AttentionIn(frozenset(layers), change))

"""A classifier of noised samples: the U-Net's encoder, and a pool (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.errors import InputError, nearest
from sfumato.nn.attention import attend
from sfumato.nn.layers import conv_nd, perceptron, resampling_factors, timestep_embedding, zero_
from sfumato.nn.unet import build_input_blocks, build_middle_block, check_inputs, name_attention
from sfumato.nn.unet_config import UNetConfig

POOLS = ("mean", "attention")


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of a classifier of noised samples.

    encoder: the options of a U-Net without context and classes, of which those of its decoder are not read;
        `out_channels` is the number of classes.
    pool: how the last feature map becomes one vector. "mean" averages it, for samples of any size;
        "attention" lets its mean attend to it, for samples of one size.
    size: sides of the samples that attention pools; read with that pool alone.

    Raises InputError for options that contradict each other.
    """

    encoder: UNetConfig
    pool: Literal["mean", "attention"] = "mean"
    size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))  # JSON and TOML give a list
        encoder = self.encoder
        if encoder.context_dim is not None or encoder.num_classes is not None:
            raise InputError(
                f"a classifier's encoder has context_dim={encoder.context_dim} and "
                f"num_classes={encoder.num_classes}",
                "Leave both out; out_channels is the number of its classes.",
            )
        if self.pool not in POOLS:
            raise InputError(f"there is no pool {self.pool!r}", nearest(self.pool, POOLS))
        if self.pool == "attention" and (self.size is None or len(self.size) != encoder.dims):
            raise InputError(
                f"pool='attention' needs the size of the samples, {encoder.dims} sides; size is {self.size}",
                "Give it, or use the pool 'mean', which takes any size.",
            )

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.encoder.out_channels


class Classifier(nn.Module):
    """Logits of the classes of a noised sample, told its timestep; see `forward`.

    State-dict names are those of the original code (EncoderUNetModel): `time_embed`, `input_blocks` and
    `middle_block` as in the U-Net; `out.0` the normalisation; then `out.3` the layer that gives the logits,
    or `out.2` with `positional_embedding`, `qkv_proj` and `c_proj` where attention pools.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        width, channels = encoder.model_channels, encoder.channel_mult[-1] * encoder.model_channels
        self.time_embed = perceptron(width, 4 * width)
        self.input_blocks, _ = build_input_blocks(encoder)
        self.middle_block = build_middle_block(encoder)
        norm = nn.GroupNorm(encoder.num_groups, channels)
        self.out = nn.Sequential(norm, nn.SiLU(), *_pool(config, channels))
        name_attention(self)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (b, classes), in the dtype of x, of samples x: (b, in_channels, *s).

        x is in variance-preserving coordinates, as the U-Net takes it; timesteps: (b,), integers or
        fractions. Raises InputError for a shape that does not fit.
        """
        config, size = self.config, tuple(x.shape[2:])
        check_inputs(config.encoder, x, None, None)
        if config.pool == "attention" and size != config.size:
            raise InputError(f"This classifier takes samples of size {config.size}; got {size}.")
        emb = self.time_embed(timestep_embedding(timesteps, config.encoder.model_channels).to(x.dtype))
        h = x
        for stage in (*self.input_blocks, self.middle_block):
            h = stage(h, emb, None, attend)
        return self.out(h).to(x.dtype)


class MeanPool(nn.Module):
    """(b, c, *s) -> (b, c, 1, ...), as many axes: the mean over all positions."""

    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(2).mean(dim=2).reshape(*h.shape[:2], *[1] * (h.ndim - 2))


class AttentionPool(nn.Module):
    """The mean of a feature map attends to all positions: (b, c, *s) -> (b, out_channels).

    Source: Radford et al. 2021, section 2.3, in the form of Dhariwal and Nichol 2021. tokens: how many
    positions a map has; heads: a divisor of the channels.
    """

    def __init__(self, channels: int, tokens: int, heads: int, out_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens + 1) / channels**0.5)
        self.qkv_proj = conv_nd(1, channels, 3 * channels, 1)
        self.c_proj = conv_nd(1, channels, out_channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        h = h.flatten(2)  # (b, c, n)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2) + self.positional_embedding.to(h.dtype)
        q, k, v = (
            part.unflatten(1, (self.heads, -1)).transpose(2, 3) for part in self.qkv_proj(h).chunk(3, dim=1)
        )
        pooled = nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)  # (b, heads, 1, c / heads)
        return self.c_proj(pooled.transpose(2, 3).flatten(1, 2)).squeeze(2)


def _pool(config: ClassifierConfig, channels: int) -> list[nn.Module]:
    """From the last feature map to the logits."""
    encoder = config.encoder
    if config.pool == "mean":
        last = conv_nd(encoder.dims, channels, config.classes, 1)
        zero_(last)
        return [MeanPool(), last, nn.Flatten()]
    assert config.size is not None
    steps = [encoder.downsampling if factor == 2 else 1 for factor in resampling_factors(encoder.dims)]
    tokens = prod(side // step for side, step in zip(config.size, steps, strict=True))
    return [AttentionPool(channels, tokens, encoder.heads(channels)[0], config.classes)]

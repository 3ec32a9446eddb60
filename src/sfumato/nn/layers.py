"""Residual and resampling layers of the denoising U-Net (Dhariwal and Nichol 2021; Rombach et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the timesteps, cosines first (Vaswani et al. 2017, section 3.5).

    timesteps: (b,), integers or fractions. Returns (b, width) in float32 whatever the dtype given, since half
    precision cannot tell neighbouring timesteps apart; an odd width ends in a column of zeros.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


def zero_(module: nn.Module) -> None:
    """Set every parameter of `module` to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def conv_nd(
    dims: int, in_channels: int, out_channels: int, kernel_size: int, stride: int | tuple[int, ...] = 1
) -> Convolution:
    """A convolution over 1, 2 or 3 axes that keeps the size at stride 1 (`kernel_size` is odd)."""
    return CONVOLUTIONS[dims](in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)


def perceptron(in_features: int, out_features: int) -> nn.Sequential:
    """Two linear layers around a SiLU, (b, in_features) -> (b, out_features), for timesteps and vectors."""
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )


def pointwise(layer: nn.Linear | Convolution, tokens: Tensor) -> Tensor:
    """A linear layer, or a convolution of width 1 as the matrix product it is, on tokens (b, n, c)."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def to_tokens(x: Tensor) -> Tensor:
    """The positions of (b, c, *s) in a row, (b, n, c): a contiguous view where x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def to_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (b, n, c) back at their places, a view of shape (b, c, *s) with the sides of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def resampling_factors(dims: int) -> tuple[int, ...]:
    """By how much one level resamples each axis: all by 2, save the depth of volumes, which is left alone."""
    return (1, 2, 2) if dims == 3 else (2,) * dims


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3-wide convolution where `use_conv`; (b, c, *s) -> (b, c, *2s)."""

    def __init__(self, channels: int, *, use_conv: bool, dims: int) -> None:
        super().__init__()
        self.factors = resampling_factors(dims)
        self.conv = conv_nd(dims, channels, channels, 3) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        size = [length * factor for length, factor in zip(x.shape[2:], self.factors, strict=True)]
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Downsample(nn.Module):
    """Halving by a strided convolution where `use_conv`, else by averaging; (b, c, *s) -> (b, c, *s/2)."""

    def __init__(self, channels: int, *, use_conv: bool, dims: int) -> None:
        super().__init__()
        factors = resampling_factors(dims)
        self.op = conv_nd(dims, channels, channels, 3, factors) if use_conv else AVERAGE_POOLS[dims](factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@dataclass(frozen=True)
class ResBlockConfig:
    """What all residual blocks of one U-Net share; `emb_channels` is the width of the timestep embedding."""

    emb_channels: int
    dropout: float
    dims: int
    use_scale_shift_norm: bool
    num_groups: int


class ResBlock(nn.Module):
    """Two convolutions around the timestep embedding, plus a skip connection.

    x: (b, in_channels, *s); emb: (b, emb_channels). Returns (b, out_channels, *s), with s doubled or halved
    where `resample` is a parameterless Upsample or Downsample, which acts on both branches.
    Source: Dhariwal and Nichol 2021, appendix A; adaptive group normalisation ("scale shift") section 3.
    """

    def __init__(
        self, config: ResBlockConfig, in_channels: int, out_channels: int, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        dims, groups = config.dims, config.num_groups
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels), nn.SiLU(), conv_nd(dims, in_channels, out_channels, 3)
        )
        self.resample = nn.Identity() if resample is None else resample
        parts = 2 if config.use_scale_shift_norm else 1
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.emb_channels, parts * out_channels))
        self.modulate: Callable[[nn.Module, Tensor, Tensor], Tensor] = (
            _scale_and_shift if config.use_scale_shift_norm else _shift
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            conv_nd(dims, out_channels, out_channels, 3),
        )
        zero_(self.out_layers[3])
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else conv_nd(dims, in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_in, activate, convolve_in = self.in_layers
        norm_out, _, drop, convolve_out = self.out_layers
        h = convolve_in(self.resample(activate(norm_in(x))))
        emb = self.emb_layers(emb).to(h.dtype).reshape(emb.shape[0], -1, *[1] * (h.ndim - 2))
        h = convolve_out(drop(activate(self.modulate(norm_out, h, emb))))
        return self.skip_connection(self.resample(x)) + h


def _shift(norm: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    return norm(h + emb)


def _scale_and_shift(norm: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    scale, shift = emb.chunk(2, dim=1)
    return norm(h) * (1 + scale) + shift

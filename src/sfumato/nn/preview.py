"""A tiny decoder that shows latents while they are denoised, in the manner of TAESD (Bohan 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError

MAX_WIDTH, MAX_LEVELS = 256, 6


@dataclass(frozen=True)
class PreviewConfig:
    """Shape of a preview decoder: channels of latents and pictures, width, and doublings of the side.

    Raises InputError for values out of range.
    """

    z_channels: int = 4
    out_channels: int = 3
    width: int = 32
    levels: int = 3

    def __post_init__(self) -> None:
        if min(self.z_channels, self.out_channels, self.width) < 1 or self.width > MAX_WIDTH:
            raise InputError(
                f"a preview decoder of {self.z_channels} to {self.out_channels} channels, width {self.width}",
                f"Widths are 1 to {MAX_WIDTH}.",
            )
        if not 0 <= self.levels <= MAX_LEVELS:
            raise InputError(f"a preview decoder doubles the side {self.levels} times, at most {MAX_LEVELS}")


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, without norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, h, w) -> the same."""
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class PreviewDecoder(nn.Module):
    """Scaled latents to pictures: a block at each level but the pictures', which has one convolution."""

    def __init__(self, config: PreviewConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_in = nn.Conv2d(config.z_channels, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(max(1, config.levels)))
        self.ups = nn.ModuleList(
            nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(config.levels)
        )
        self.conv_out = nn.Conv2d(config.width, config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(b, z_channels, h, w), as the U-Net sees them -> (b, out_channels, 2^levels h, 2^levels w)."""
        # Latents of an unfinished picture lie far out; three deviations hold what a picture needs.
        h = F.relu(self.conv_in(3 * torch.tanh(latents / 3)))
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index < len(self.ups):
                h = F.relu(self.ups[index](F.interpolate(h, scale_factor=2.0, mode="nearest")))
        return self.conv_out(h)

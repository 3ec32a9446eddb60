"""LPIPS: distance of two pictures in the features of VGG-16 (Zhang et al. 2018), in the released names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Channels of VGG-16's convolutions (Simonyan and Zisserman 2015, configuration D); 0 halves the sides.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
# Of the pictures VGG was trained on, as LPIPS has them for pictures in -1..1.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LEAST = 1e-10  # added to norms, as LPIPS does


class LPIPS(nn.Module):
    """Weighted squared differences of unit features, averaged over places and summed over five layers.

    `features.N` are torchvision's names of VGG-16, `linN.model.1.weight` those of LPIPS' linear layers.
    widths: `VGG16`, or fewer channels for a test.
    """

    def __init__(self, widths: Sequence[int] = VGG16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        blocks: list[list[int]] = [[]]  # of layers up to each tap
        channels, taps = 3, []
        for width in widths:
            if width == 0:
                taps.append(channels)
                blocks.append([len(layers)])
                layers.append(nn.MaxPool2d(2))
                continue
            blocks[-1] += [len(layers), len(layers) + 1]
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(channels)
        self.blocks = blocks
        self.features = nn.ModuleList(layers)
        for index, width in enumerate(taps):
            self.add_module(f"lin{index}", LinearHead(width))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(b, 3, h, w) in -1..1, twice, sides of 16 or more -> distances (b,), 0 for equal pictures."""
        shift, scale = (torch.tensor(each).to(first).view(3, 1, 1) for each in (SHIFT, SCALE))
        both = (torch.cat([first, second]) - shift) / scale
        distance = torch.zeros(len(first), device=first.device)
        for index, block in enumerate(self.blocks):
            for layer in block:
                both = self.features[layer](both)
            difference = unit(both).float().chunk(2)
            square = (difference[0] - difference[1]).square()  # (b, c, h, w)
            distance = distance + self.get_submodule(f"lin{index}")(square).mean(dim=(1, 2, 3))
        return distance


class LinearHead(nn.Module):
    """A 1x1 convolution to one channel without bias; released behind a dropout, hence its name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 1, h, w)."""
        return self.model(x)


def unit(features: Tensor) -> Tensor:
    """Features (b, c, ...) with the vector at each place of length one."""
    squares = features.square().sum(dim=1, keepdim=True) + LEAST**2  # whose root has a gradient at zero too
    return features / (squares.sqrt() + LEAST)


def feature_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """LPIPS without learned weights, for any network: lists of features (b, c, ...) -> (b,) mean over layers.

    Each layer's is half the mean squared distance of the unit vectors, that is one less their cosine.
    """
    layers = [
        0.5 * (unit(one.float()) - unit(other.float())).square().sum(dim=1).flatten(1).mean(dim=1)
        for one, other in zip(first, second, strict=True)
    ]
    return torch.stack(layers).mean(dim=0)

"""PatchGAN: a convolutional network that judges every patch of a picture (Isola et al. 2017, section 3.2.2).

Shapes and names are those of taming-transformers and LDM, so that their weights load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError

Norm = Literal["batch", "group"]
GanLoss = Literal["hinge", "vanilla"]
MOST = 8  # multiples of the first width that a layer may have, as in pix2pix
GROUPS = 8
STRIDED, PLAIN = 4, 4  # kernel sides


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Shape of a discriminator, in pix2pix's option names; the defaults are LDM's.

    input_nc: channels of the pictures. ndf: channels of the first layer. n_layers: layers that halve the
    sides, the first of which has no norm; patches of 70 pixels for 3, of 34 for 2. norm: "batch" as released,
    whose verdict on one picture hangs on the others in its batch, or "group", whose does not.
    Raises InputError for fewer than one channel or layer, or widths that groups do not divide.
    """

    input_nc: int = 3
    ndf: int = 64
    n_layers: int = 3
    norm: Norm = "batch"

    def __post_init__(self) -> None:
        if min(self.input_nc, self.ndf, self.n_layers) < 1:
            raise InputError(
                f"a discriminator of {self.input_nc} channels, ndf {self.ndf} and {self.n_layers} layers",
                "All are 1 or more.",
            )
        if self.norm == "group" and self.ndf % GROUPS:
            raise InputError(f"ndf is {self.ndf}; group norms need a multiple of {GROUPS}", "")

    @property
    def smallest(self) -> int:
        """The smallest side in pixels that gives one patch."""
        side = 1 + 2 * (PLAIN - 3)  # two layers that take one pixel off
        for _ in range(self.n_layers):
            side = 2 * side
        return side

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each layer but the last."""
        return tuple(self.ndf * min(2**layer, MOST) for layer in range(self.n_layers + 1))


class NLayerDiscriminator(nn.Module):
    """Strided convolutions to a map of logits, positive for what is taken for real; weights of N(0, 0.02)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        layers: list[nn.Module] = [
            nn.Conv2d(config.input_nc, widths[0], STRIDED, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for layer, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            stride = 2 if layer < config.n_layers else 1
            biased = config.norm != "batch"  # a batch norm takes a bias away again
            layers += [
                nn.Conv2d(inputs, outputs, STRIDED, stride=stride, padding=1, bias=biased),
                _norm(outputs, config.norm),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, PLAIN, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(b, input_nc, h, w) in -1..1 -> logits (b, 1, h', w'), h' = h / 2^n_layers - 2."""
        return self.main(x)


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """What the discriminator minimises, a scalar, given its logits for pictures and for reconstructions.

    "hinge": mean of max(0, 1 - real) and max(0, 1 + fake) (Lim and Ye 2017); "vanilla": cross-entropy
    (Goodfellow et al. 2014).
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises, a scalar: the logits of its reconstructions, their mean negated."""
    return -fake.mean()


def gradients(losses: Sequence[Tensor], layer: Tensor) -> Tensor:
    """(n, *layer.shape): the gradient of each of n losses at one layer; their graphs are kept."""
    return torch.stack([torch.autograd.grad(loss, layer, retain_graph=True)[0].detach() for loss in losses])


def adaptive_weight(nll_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|grad nll| / (|grad adversarial| + 1e-4) at the decoder's last layer, clamped to 0..1e4, a scalar.

    Esser et al. 2021, eq. 7; with it both losses move that layer equally far.
    """
    return (nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0.0, 1e4)


def _norm(channels: int, kind: Norm) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(GROUPS, channels)
    norm = nn.BatchNorm2d(channels)
    norm.register_buffer("num_batches_tracked", None)  # a count nothing reads; states hold floats alone
    return norm

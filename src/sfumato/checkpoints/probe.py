"""What an unlabelled Stable Diffusion 2 predicts, asked of the network itself."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from sfumato.nn.unet import UNet

LAST = 999  # the timestep with the least signal in its input
SIDE = 8  # of the latent: the smallest that three halvings leave whole
LEVEL = 0.5  # of every value in the input


@torch.no_grad()
def probe_prediction(module: nn.Module) -> tuple[str, str]:
    """("eps" or "v", the evidence in words) of a U-Net with cross-attention; costs one small evaluation.

    At the last timestep the input is almost noise alone. A network that predicts noise gives its input back;
    one that predicts v = alpha noise - sigma x0, alpha being almost 0, gives about minus the picture it
    expects, which is far from a constant input of 0.5.
    """
    unet = cast(UNet, module)
    weight = unet.out[2].weight
    assert isinstance(weight, torch.Tensor)
    config = unet.config
    x = torch.full((1, config.in_channels, SIDE, SIDE), LEVEL, dtype=weight.dtype, device=weight.device)
    context = None
    if config.context_dim is not None:
        context = torch.full((1, 77, config.context_dim), LEVEL, dtype=x.dtype, device=x.device)
    timesteps = torch.full((1,), LAST, device=x.device)
    out = unet(x, timesteps, context=context)
    difference = float((out - x[:, : config.out_channels]).float().mean())
    found = "v" if difference < THRESHOLD else "eps"
    return found, f"a probe of the U-Net at timestep {LAST} (mean of output - input {difference:.2f})"


THRESHOLD = -1.0  # eps gives about 0

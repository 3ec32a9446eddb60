"""How kernels lie in memory: channels last, which convolutions run fastest on."""

from __future__ import annotations

import torch
from torch import nn


def channels_last(module: nn.Module) -> None:
    """Lay out every kernel (out, in, h, w) of a module with its channels last, in place."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)

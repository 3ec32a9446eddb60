"""ControlNets as files under the names of the released ones (lllyasviel/ControlNet)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sfumato.checkpoints.controls.load import CONTROL
from sfumato.checkpoints.files import converted, write_tensors
from sfumato.nn.controlnet import ControlNet


def write_controlnet(
    path: Path, network: ControlNet, dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a ControlNet atomically, as `checkpoints.controls.load_control` and other programs read it.

    What shapes do not tell, its heads and groups, is in the metadata. Raises `NumericalError` before
    anything is written for a value that is not finite in `dtype`.
    """
    ready = converted({CONTROL + name: tensor for name, tensor in network.state_dict().items()}, dtype)
    encoder = network.config.encoder
    options = {"num_heads": encoder.num_heads, "num_head_channels": encoder.num_head_channels}
    own = {key: str(value) for key, value in options.items() if value > 0}
    own["num_groups"] = str(encoder.num_groups)
    write_tensors(path, ready, {"format": "pt", **own, **dict(metadata or {})})

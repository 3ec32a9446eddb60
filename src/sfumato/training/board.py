"""Metrics for TensorBoard, which the extra `[tensorboard]` installs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sfumato.errors import InputError


class Board:
    """Writes the lines of metrics as scalars into the folder `tensorboard` of a run."""

    def __init__(self, out: Path, seen: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "loop.tensorboard needs a package that is not there",
                "Run: pip install 'sfumato[tensorboard]'",
            ) from error
        # What was written beyond the image that a run goes on from is left out by TensorBoard.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=seen)

    def write(self, values: Mapping[str, float]) -> None:
        """One line of metrics; it is on the disk when this returns."""
        seen = int(values["seen"])
        for name, value in values.items():
            if name != "seen":
                self._writer.add_scalar(name, value, seen)
        self._writer.flush()

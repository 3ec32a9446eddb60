"""The `[reproduction]` table of a recipe: what the study notes' small DDPM needs beside its network."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from sfumato.training.objective import ObjectiveConfig


class ReproductionTaskConfig(ObjectiveConfig):
    """Algorithm 1 of Ho et al. 2020 on whatever unet.dims says: rows, pictures or volumes, maybe in classes.

    The sample's size is data.size, (1, length) for rows; its channels are unet.in_channels.
    """

    depth: PositiveInt | None = Field(default=None, description="slices of a volume; none = as files have")
    samples: PositiveInt = Field(default=16, description="samples on each sheet")
    preview_steps: PositiveInt = Field(
        default=10,
        description="for the sheets of all epochs but the last, which is drawn with all of DDPM's",
    )

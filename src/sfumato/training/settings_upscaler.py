"""The `[upscaler]` table of a recipe: a super-resolution network and what its small pictures went through."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sfumato.nn.esrgan import CompactConfig, RRDBConfig
from sfumato.presets import known_keys
from sfumato.training.section import Section

CompactTable = Annotated[CompactConfig, known_keys(CompactConfig)]
RRDBTable = Annotated[RRDBConfig, known_keys(RRDBConfig)]
Chance = Annotated[float, Field(ge=0, le=1)]


class UpscalerTaskConfig(Section):
    """L1 and an edge term between enlarged and large pictures (Wang et al. 2021, the first stage)."""

    compact: CompactTable | None = Field(
        default=None, description="options of the compact network; its defaults without any"
    )
    rrdb: RRDBTable | None = Field(default=None, description="options of ESRGAN's network, in its place")
    edge_weight: float = Field(default=0.0, ge=0, description="of the same loss of finite differences")
    smooth_images: int = Field(
        default=10_000, ge=0, description="images over which the loss narrows from near L2 to L1"
    )
    crop: int = Field(default=0, ge=0, description="side of what is seen of a small picture; 0 = all of it")
    autoencoder: Path | Literal["embedded"] | None = Field(
        default=None, description="model.safetensors whose round trips small pictures go through; none = none"
    )
    decoded: Chance = Field(default=0.5, description="share of pictures that go through the autoencoder")
    latent_noise: float = Field(
        default=0.0, ge=0, le=1, description="most noise on a latent, in deviations: what sampling leaves"
    )
    blurred: Chance = Field(default=0.15, description="share of the other pictures that are softened")
    packed: Chance = Field(default=0.15, description="share of the other pictures that were JPEG files")

    @property
    def network(self) -> CompactConfig | RRDBConfig:
        """The options of the network to train."""
        return self.rrdb or self.compact or CompactConfig()

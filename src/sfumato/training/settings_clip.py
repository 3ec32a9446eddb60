"""The `[clip]` table of a recipe: the image tower, and how the two towers are taught to agree."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from sfumato.nn.clip_layers import Activation
from sfumato.training.section import Section


class VisionTableConfig(Section):
    """The image tower; its pictures have the side data.size."""

    hidden_size: PositiveInt = 256
    intermediate_size: PositiveInt = 1024
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    patch_size: PositiveInt = 8
    hidden_act: Activation = "gelu"


class CLIPTaskConfig(Section):
    """Symmetric cross-entropy between pictures and captions (Radford et al. 2021, figure 3)."""

    vision: VisionTableConfig = VisionTableConfig()
    embed_dim: PositiveInt = Field(default=256, description="width of the vectors that are compared")
    vocabulary: int | Literal["clip"] = Field(
        default=2048, description="tokens learned from the captions, or CLIP's own"
    )
    temperature: float = Field(
        default=0.07, ge=0.01, le=10, description="to begin with; it is learned, and never under 0.01"
    )
    crop: float = Field(
        default=0.8, gt=0, le=1, description="least share of a picture's side that a random square crop keeps"
    )
    flip: bool = Field(
        default=False, description="mirror every second picture; not where captions say left and right"
    )

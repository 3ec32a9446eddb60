"""CLIP's image transformer (Radford et al. 2021, section 2.4) in Hugging Face's state-dict names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.clip_layers import Activation, EncoderLayers, check_layers

# Of the pictures CLIP was trained on, by channel: clip.py of openai/CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of an image transformer, in Hugging Face's names; the defaults are OpenCLIP ViT-H/14's.

    image_size, patch_size: sides in pixels. projection_dim: width of the picture's vector, None for a tower
    without a projection. Raises InputError for values that do not fit together.
    """

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Activation = "gelu"
    projection_dim: int | None = 1024
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_layers(self)
        if not 1 <= self.patch_size <= self.image_size:
            raise InputError(f"patch_size = {self.patch_size} in pictures of {self.image_size}.")

    @property
    def num_tokens(self) -> int:
        """The picture's patches and the token of the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class CLIPVisionOutput:
    """What the transformer makes of b pictures.

    hidden_states: num_hidden_layers + 1 tensors (b, num_tokens, hidden_size), the last not normed. embeds:
    (b, projection_dim), or (b, hidden_size) without a projection.
    """

    hidden_states: tuple[Tensor, ...]
    embeds: Tensor


class PatchEmbeddings(nn.Module):
    """Patches as tokens after one that stands for the whole picture, each with its place."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_tokens, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, size, size) -> (b, tokens, width)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(pixels.shape[0], 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, layers and norms; what Hugging Face calls `vision_model`."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )  # spelt so in the files
        self.encoder = EncoderLayers(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(b, 3, size, size) -> num_hidden_layers + 1 states (b, tokens, width)."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)))


class CLIPVisionEncoder(nn.Module):
    """CLIP's image transformer with its projection."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = (
            nn.Identity()
            if config.projection_dim is None
            else nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        )

    def forward(self, pixels: Tensor) -> CLIPVisionOutput:
        """Pictures (b, 3, size, size), normalised by MEAN and DEVIATION; InputError for another size."""
        side = self.config.image_size
        if pixels.shape[1:] != (3, side, side):
            raise InputError(
                f"The pictures have shape {tuple(pixels.shape)}; this encoder takes (b, 3, {side}, {side})."
            )
        states = self.vision_model(pixels)
        embeds = self.visual_projection(self.vision_model.post_layernorm(states[-1][:, 0]))
        return CLIPVisionOutput(states, embeds)

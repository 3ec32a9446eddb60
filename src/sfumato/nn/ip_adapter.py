"""IP-Adapter: pictures as prompts, by attention of their own beside the text's (Ye et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import InputError, nearest
from sfumato.nn.attention import Attend, CrossAttention, attend
from sfumato.nn.patches import AttentionIn
from sfumato.nn.unet import Patch, UNet

Kind = Literal["plain", "plus", "full"]
KINDS = ("plain", "plus", "full")
SIDES = ("input_blocks", "output_blocks", "middle_block")  # in the order of diffusers' processors


@dataclass(frozen=True)
class IPAdapterConfig:
    """Architecture of an adapter.

    widths: of the U-Net's attention layers to the context, in the order of `image_layers`. context_dim: of
    the tokens they attend to. image_dim: of what CLIP says of a picture. kind: how that becomes tokens:
    "plain" from its one vector, "plus" by `depth` layers of `num_heads` heads that read its tokens,
    `resampler_dim` wide, "full" each of its tokens by itself. num_tokens: made of one picture by the first
    two.
    Raises InputError for an unknown kind.
    """

    widths: tuple[int, ...]
    context_dim: int
    image_dim: int
    kind: Kind = "plain"
    num_tokens: int = 4
    resampler_dim: int = 768
    num_heads: int = 12
    depth: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.kind not in KINDS:
            raise InputError(f"there is no kind of adapter {self.kind!r}", nearest(self.kind, KINDS))


class PlainProjection(nn.Module):
    """A picture's vector (b, image_dim) as tokens (b, num_tokens, context_dim)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        self.proj = nn.Linear(config.image_dim, config.num_tokens * config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.norm(self.proj(embeds).unflatten(-1, (self.num_tokens, -1)))


class FullProjection(nn.Module):
    """Each of a picture's tokens (b, n, image_dim) by itself: (b, n, context_dim)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(config.image_dim, config.image_dim),
            nn.GELU(),
            nn.Linear(config.image_dim, config.context_dim),
            nn.LayerNorm(config.context_dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(tokens)


class PerceiverAttention(nn.Module):
    """Attention of the latents to the picture's tokens and to themselves (Jaegle et al. 2021)."""

    def __init__(self, width: int, heads: int, dim_head: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, width, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """latents (b, q, width) and tokens (b, n, width) -> (b, q, width)."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(tokens), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (self.to_q(latents), k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResamplerLayer(nn.ModuleList):
    """Attention and a perceptron, each added to the latents (b, q, width)."""

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        attention, perceptron = self
        latents = latents + attention(latents, tokens)
        return latents + perceptron(latents)


class Resampler(nn.Module):
    """A few tokens out of the many of a picture, read by learned latents: the "plus" adapters'."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width = config.resampler_dim
        self.latents = nn.Parameter(torch.randn(1, config.num_tokens, width) / width**0.5)
        self.proj_in = nn.Linear(config.image_dim, width)
        self.proj_out = nn.Linear(width, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)
        self.layers = nn.ModuleList(
            ResamplerLayer([PerceiverAttention(width, config.num_heads), _perceptron(width)])
            for _ in range(config.depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, image_dim) -> (b, num_tokens, context_dim)."""
        tokens = self.proj_in(tokens)
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, tokens)
        return self.norm_out(self.proj_out(latents))


class ImageKeysValues(nn.Module):
    """Keys and values of picture tokens (b, n, context_dim), for one attention layer of the U-Net."""

    def __init__(self, context_dim: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, width, bias=False)
        self.to_v_ip = nn.Linear(context_dim, width, bias=False)


PROJECTIONS = {"plain": PlainProjection, "plus": Resampler, "full": FullProjection}


class IPAdapter(nn.Module):
    """Tokens of pictures, and what a U-Net's attention layers make of them.

    `ip_adapter` holds the layers in the order of `image_layers`; released files number them 1, 3, 5, ...
    """

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = PROJECTIONS[config.kind](config)
        self.ip_adapter = nn.ModuleList(ImageKeysValues(config.context_dim, width) for width in config.widths)

    def forward(self, seen: Tensor) -> Tensor:
        """Tokens (b, n, context_dim) of what CLIP sees.

        seen: (b, image_dim), the picture's vector, for the plain kind; (b, tokens, image_dim), its last
        hidden state but one, for the others. Raises InputError for another shape.
        """
        rank = 2 if self.config.kind == "plain" else 3
        if seen.ndim != rank or seen.shape[-1] != self.config.image_dim:
            wanted = ("b", "tokens")[: rank - 1]
            raise InputError(
                f"What is seen has shape {tuple(seen.shape)}; a {self.config.kind} adapter takes "
                f"({', '.join(wanted)}, {self.config.image_dim}).",
                "Give the image encoder that the adapter was trained with.",
            )
        return self.image_proj(seen)


def image_layers(network: UNet) -> list[str]:
    """The attention layers to the context, as files count them: encoder's, decoder's, middle's."""
    if network.config.context_dim is None:
        return []
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, CrossAttention) and name.endswith(".attn2")
    ]
    return sorted(found, key=lambda name: SIDES.index(name.split(".")[0]))


def image_prompt_patch(
    network: UNet, adapters: Sequence[IPAdapter], tokens: Sequence[Tensor], scales: Sequence[float]
) -> Patch:
    """The patch with which a U-Net sees pictures: decoupled cross-attention (Ye et al. 2023, eq. 5).

    tokens: of each adapter, (b, n, context_dim), a row for each sample. scales: how much each adds. Keys and
    values are made once, when the patch is. Raises InputError for an adapter of another U-Net.
    """
    layers = image_layers(network)
    added: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in layers}
    for adapter, seen, scale in zip(adapters, tokens, scales, strict=True):
        _check_adapter(network, adapter, layers)
        for name, layer in zip(layers, adapter.ip_adapter.children(), strict=True):
            heads = _attention(network, name).heads
            k, v = (split_heads(part(seen), heads) for part in layer.children())
            added[name].append((k, v, scale))

    def change(name: str, q: Tensor, k: Tensor, v: Tensor, otherwise: Attend) -> Tensor:
        out = otherwise(name, q, k, v)
        for image_k, image_v, scale in added[name]:
            out = out + scale * attend(name, q, image_k, image_v)
        return out

    return Patch(attention=AttentionIn(frozenset(layers), change))


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(b, n, heads * width) -> (b, heads, n, width)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(network: UNet, name: str) -> CrossAttention:
    module = network.get_submodule(name)
    assert isinstance(module, CrossAttention)
    return module


def _check_adapter(network: UNet, adapter: IPAdapter, layers: Sequence[str]) -> None:
    widths = tuple(_attention(network, name).to_q.out_features for name in layers)
    own = adapter.config
    if own.widths != widths or own.context_dim != network.config.context_dim:
        raise InputError(
            f"The adapter is for {len(own.widths)} attention layers to contexts of {own.context_dim}; this "
            f"U-Net has {len(widths)} to {network.config.context_dim}, or they have other widths.",
            "Give an adapter of the same family.",
        )


def _perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )

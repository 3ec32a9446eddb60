"""Attention over pictures: the spatial transformer (Rombach et al. 2022, section 3.3) and the plain one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nn.layers import Convolution, conv_nd, pointwise, to_picture, to_tokens, zero_

Attend = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""`attend(name, q, k, v) -> (b, heads, queries, width)`; `name` is the calling module's in the state dict."""


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention; q: (b, heads, queries, width), k and v: (b, heads, keys, width)."""
    return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens x: (b, n, query_dim) to context: (b, m, context_dim); None attends to x.

    `name` is what the block seam calls this module; the network that owns it sets its state-dict name.
    """

    def __init__(self, query_dim: int, context_dim: int | None, heads: int, dim_head: int) -> None:
        super().__init__()
        self.name = ""
        self.heads = heads
        inner_dim = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim))

    def forward(self, x: Tensor, context: Tensor | None = None, attend: Attend = attend) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, n, dim_head)
            for tokens in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(self.name, q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear layer gated by a GELU of its other half (Shazeer 2020); (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated two-layer perceptron, four times as wide inside; (..., width) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The Identity stands where LDM has a dropout of rate 0, and keeps its index in the state dict.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward, each normalised first; x: (b, n, width).

    Where `context_dim` is None the second attention is a self-attention too. disable_self_attention: the
    first attends to the context as well.
    """

    def __init__(
        self,
        width: int,
        context_dim: int | None,
        heads: int,
        dim_head: int,
        *,
        disable_self_attention: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attention = disable_self_attention
        self.attn1 = CrossAttention(width, context_dim if disable_self_attention else None, heads, dim_head)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_dim, heads, dim_head)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None = None, attend: Attend = attend) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attention else None, attend)
        x = x + self.attn2(self.norm2(x), context, attend)
        return x + self.ff(self.norm3(x))


@dataclass(frozen=True)
class SpatialTransformerConfig:
    """Shape of a spatial transformer: `depth` blocks of `heads` heads, `dim_head` channels each.

    disable_self_attention: see `BasicTransformerBlock`.
    """

    heads: int
    dim_head: int
    depth: int
    context_dim: int | None
    use_linear: bool
    dims: int
    num_groups: int
    disable_self_attention: bool = False


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of x: (b, channels, *s), of any rank, plus x itself.

    The projections in and out are 1-wide convolutions, or linear layers where `use_linear` (SD 2, SDXL).
    """

    def __init__(self, channels: int, config: SpatialTransformerConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.norm = nn.GroupNorm(config.num_groups, channels, eps=1e-6)
        self.proj_in = _projection(channels, inner, config)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                config.context_dim,
                config.heads,
                config.dim_head,
                disable_self_attention=config.disable_self_attention,
            )
            for _ in range(config.depth)
        )
        self.proj_out = _projection(inner, channels, config)
        zero_(self.proj_out)

    def forward(self, x: Tensor, context: Tensor | None = None, attend: Attend = attend) -> Tensor:
        tokens = pointwise(self.proj_in, to_tokens(self.norm(x)))  # (b, n, inner)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, attend)
        return x + to_picture(pointwise(self.proj_out, tokens), x)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of x: (b, channels, *s), without a transformer around it.

    The channels of `qkv` are grouped by head and then by q, k, v; `use_new_attention_order` groups them by
    q, k, v and then by head. `heads` divides `channels`. Source: Ho et al. 2020, appendix B, with heads.
    """

    def __init__(self, channels: int, heads: int, *, use_new_attention_order: bool, num_groups: int) -> None:
        super().__init__()
        self.name = ""
        self.grouping = (3, heads, -1) if use_new_attention_order else (heads, 3, -1)
        self.qkv_axis = 2 if use_new_attention_order else 3
        self.norm = nn.GroupNorm(num_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        zero_(self.proj_out)

    def forward(self, x: Tensor, attend: Attend = attend) -> Tensor:
        tokens = pointwise(self.qkv, to_tokens(self.norm(x)))  # (b, n, 3 * channels)
        q, k, v = (part.transpose(1, 2) for part in tokens.unflatten(-1, self.grouping).unbind(self.qkv_axis))
        tokens = attend(self.name, q, k, v).transpose(1, 2).flatten(2)
        return x + to_picture(pointwise(self.proj_out, tokens), x)


def _projection(
    in_channels: int, out_channels: int, config: SpatialTransformerConfig
) -> nn.Linear | Convolution:
    if config.use_linear:
        return nn.Linear(in_channels, out_channels)
    return conv_nd(config.dims, in_channels, out_channels, 1)

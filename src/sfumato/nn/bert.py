"""The text transformer of LDM's 1.45 B text-to-image model (Rombach et al. 2022, section 4.3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import InputError


@dataclass(frozen=True)
class BERTConfig:
    """Shape of the transformer, in the option names of LDM's `BERTEmbedder`; by default the released model's.

    n_embed: width of tokens. n_layer: attention and feed-forward pairs. heads, dim_head: of every attention,
    in all 512 wide whatever n_embed is. Raises InputError for a number below 1.
    """

    n_embed: int = 1280
    n_layer: int = 32
    vocab_size: int = 30522
    max_seq_len: int = 77
    heads: int = 8
    dim_head: int = 64

    def __post_init__(self) -> None:
        for name in ("n_embed", "n_layer", "vocab_size", "max_seq_len", "heads", "dim_head"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")


class SelfAttention(nn.Module):
    """Attention of every token to all others; paddings are tokens like any other, as LDM was trained."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.to_q = nn.Linear(config.n_embed, inner, bias=False)
        self.to_k = nn.Linear(config.n_embed, inner, bias=False)
        self.to_v = nn.Linear(config.n_embed, inner, bias=False)
        self.to_out = nn.Linear(inner, config.n_embed)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, n_embed) -> (b, n, n_embed)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, n, dim_head)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The inner Sequential and the Identity (a dropout of rate 0) keep x-transformers' indices.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) -> (b, n, width)."""
        return self.net(x)


class Residual(nn.ModuleList):
    """A norm and a branch, added to their input; named `layers.i.0` and `layers.i.1`."""

    def __init__(self, width: int, branch: nn.Module) -> None:
        super().__init__([nn.LayerNorm(width), branch])

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) -> (b, n, width)."""
        norm, branch = self
        return x + branch(norm(x))


class Layers(nn.Module):
    """Attention and feed-forward in turn; layer i of the model is `layers.2i` and `layers.2i+1`."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(config.n_layer):
            self.layers.append(Residual(config.n_embed, SelfAttention(config)))
            self.layers.append(Residual(config.n_embed, FeedForward(config.n_embed)))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, n_embed) -> (b, n, n_embed)."""
        for layer in self.layers:
            x = layer(x)
        return x


class PositionEmbedding(nn.Module):
    """A learned vector for every place; exists so that its name reads `pos_emb.emb`."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.emb = nn.Embedding(config.max_seq_len, config.n_embed)

    def forward(self, length: int) -> Tensor:
        """(length, n_embed)."""
        return self.emb.weight[:length]


class Transformer(nn.Module):
    """Token and place vectors, layers, the final norm; x-transformers' `TransformerWrapper`."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(config.vocab_size, config.n_embed)
        self.pos_emb = PositionEmbedding(config)
        self.attn_layers = Layers(config)
        self.norm = nn.LayerNorm(config.n_embed)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n) long -> (b, n, n_embed)."""
        return self.norm(self.attn_layers(self.token_emb(tokens) + self.pos_emb(tokens.shape[1])))


class BERTEmbedder(nn.Module):
    """Token-wise text features from BERT's WordPiece ids; no weight of BERT is in it but its vocabulary.

    State-dict names are LDM's (`transformer.attn_layers.layers.0.1.to_q.weight`, ...). Released files also
    hold `transformer.to_logits`, a layer over the vocabulary that the features never pass: it is not built.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n) long, n up to max_seq_len -> a context (b, n, n_embed); InputError for longer rows."""
        length, limit = tokens.shape[1], self.config.max_seq_len
        if length > limit:
            raise InputError(f"A row has {length} tokens; this text encoder takes {limit}.", "Cut the text.")
        return self.transformer(tokens)

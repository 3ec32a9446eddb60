"""The transformer layers of CLIP's two towers (Radford et al. 2021, section 2.4) in Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError, nearest

Activation = Literal["quick_gelu", "gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with; any shape."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class LayerConfig(Protocol):
    """What the configs of both towers say of their layers."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> Activation: ...
    @property
    def layer_norm_eps(self) -> float: ...


def check_layers(config: LayerConfig) -> None:
    """`InputError` for an unknown activation, and for heads that do not divide the width."""
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"hidden_act is {config.hidden_act!r}.", nearest(config.hidden_act, ACTIVATIONS))
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden_size = {config.hidden_size} is not a multiple of "
            f"num_attention_heads = {config.num_attention_heads}.",
            "Choose a width that the heads divide.",
        )


class SelfAttention(nn.Module):
    """Multi-head attention among all tokens; causal: a token sees itself and what stands before it alone."""

    def __init__(self, config: LayerConfig, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) -> (b, n, width)."""
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (b, heads, n, width / heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) -> (b, n, width)."""
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: LayerConfig, causal: bool) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, width) -> (b, n, width)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class EncoderLayers(nn.Module):
    """The stack of layers; exists so that their names read `encoder.layers.i`."""

    def __init__(self, config: LayerConfig, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, n, width) -> itself and the output of every layer, each (b, n, width)."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)

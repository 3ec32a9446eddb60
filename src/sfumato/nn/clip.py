"""CLIP's causal text transformer (Radford et al. 2021, section 2.4) in Hugging Face's state-dict names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.clip_layers import Activation, EncoderLayers, check_layers


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a text transformer, in Hugging Face's names; the defaults are ViT-L/14's (Stable Diffusion 1).

    max_position_embeddings: the context length in tokens. eos_token_id: the token whose first place in a row
    gives the pooled vector. projection_dim: width of the pooled vector's projection, None for a model without
    one. pad_token_id: what fills a row after its end, eos_token_id where None; OpenCLIP's towers pad with 0.
    Raises InputError for values that do not fit together.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_layers(self)
        for name, token in (("eos_token_id", self.eos_token_id), ("pad_token_id", self.pad_id)):
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"{name} = {token} is not in the vocabulary of {self.vocab_size} tokens.",
                    "Take both from the tokenizer that the encoder is used with.",
                )

    @property
    def pooled_size(self) -> int:
        """Width of the pooled vector."""
        return self.hidden_size if self.projection_dim is None else self.projection_dim

    @property
    def pad_id(self) -> int:
        """The token that fills a row after its end."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id


@dataclass(frozen=True)
class CLIPTextOutput:
    """What the text transformer makes of a batch of b rows of n tokens.

    hidden_states: num_hidden_layers + 1 tensors (b, n, hidden_size): the embeddings, then each layer's
    output, none of them through the final norm. last_hidden_state: the last of them through it. pooled: (b,
    projection_dim), or (b, hidden_size) without a projection.
    """

    hidden_states: tuple[Tensor, ...]
    last_hidden_state: Tensor
    pooled: Tensor


class Embeddings(nn.Module):
    """Token and position vectors, added."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n) long -> (b, n, hidden_size)."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class TextTransformer(nn.Module):
    """Embeddings, layers and the final norm; what Hugging Face calls `text_model`."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = EncoderLayers(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """(b, n) long -> num_hidden_layers + 1 states (b, n, width), before the final norm."""
        return self.encoder(self.embeddings(tokens))


class CLIPTextEncoder(nn.Module):
    """CLIP's text transformer, with its optional projection of the pooled vector."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        self.text_projection = (
            nn.Identity()
            if config.projection_dim is None
            else nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        )
        initialize(self)

    def forward(self, tokens: Tensor) -> CLIPTextOutput:
        """(b, n) long, n up to the context length -> every hidden state, the last one normed, and pooled.

        Raises InputError where n exceeds the context length.
        """
        length, limit = tokens.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise InputError(
                f"A row has {length} tokens; the text encoder takes at most {limit}.", "Cut the text."
            )
        states = self.text_model(tokens)
        last = self.text_model.final_layer_norm(states[-1])
        pooled = last[torch.arange(len(tokens), device=tokens.device), self.pooled_at(tokens)]
        return CLIPTextOutput(states, last, self.text_projection(pooled))

    def pooled_at(self, tokens: Tensor) -> Tensor:
        """The place, (b,) long, of each row's first end-of-text token; the last place in a row without one.

        Not the largest id, which OpenAI's code looks for: tokens learned later have larger ones.
        """
        ends = tokens == self.config.eos_token_id
        return torch.where(ends.any(dim=1), ends.int().argmax(dim=1), tokens.shape[1] - 1)

    def hidden_state(self, output: CLIPTextOutput, index: int, normed: bool) -> Tensor:
        """One of `output.hidden_states`, (b, n, hidden_size), by index: -1 the last layer, -2 the one before.

        normed: through the final layer norm, as Stable Diffusion 1 and 2 condition on every layer; SDXL does
        not. Raises InputError for an index out of range.
        """
        count = len(output.hidden_states)
        if not -count <= index < count:
            raise InputError(f"There is no hidden state {index}; allowed are {-count} to {count - 1}.")
        if normed and index in (-1, count - 1):
            return output.last_hidden_state
        state = output.hidden_states[index]
        return self.text_model.final_layer_norm(state) if normed else state


def initialize(encoder: CLIPTextEncoder) -> None:
    """Draw the start weights by the rule of OpenAI's CLIP (its `initialize_parameters`), biases at zero."""
    config = encoder.config
    width = config.hidden_size**-0.5
    residual = width * (2 * max(config.num_hidden_layers, 1)) ** -0.5
    deviations = {"fc1": width * 2**-0.5, "fc2": residual, "out_proj": residual, "token_embedding": 0.02}
    deviations["position_embedding"] = 0.01
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviations.get(name.rpartition(".")[2], width))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

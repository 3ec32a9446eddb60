"""Prompts to the conditioning that a denoising network reads: tokenizer, then text transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedPrompts:
    """A conditioning with a (b, tokens, width) context, and what was cut from each prompt ("" = nothing)."""

    conditioning: Conditioning
    cut: tuple[str, ...]


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    encoder: CLIPTextEncoder,
    clip_skip: int = 1,
    normed: bool = True,
) -> EncodedPrompts:
    """Encode each prompt to its hidden states, on the encoder's device and in its dtype.

    clip_skip: which layer from the end, 1 the last one (AUTOMATIC1111's numbering; diffusers counts from 0).
    normed: through the final layer norm whatever the layer, as in Stable Diffusion 1 and 2; SDXL takes False.
    Rows are as long as the encoder's context. Raises InputError for a clip_skip that the encoder has no layer
    for.
    """
    layers = encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise InputError(
            f"clip_skip is {clip_skip}; this text encoder allows 1 (the last layer) to {layers}."
        )
    tokens, cut = tokenizer.batch(prompts, encoder.config.max_position_embeddings)
    output = encoder(tokens.to(encoder.text_model.final_layer_norm.weight.device))
    return EncodedPrompts(Conditioning(context=encoder.hidden_state(output, -clip_skip, normed)), tuple(cut))

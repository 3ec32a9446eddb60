"""Prompts to the conditioning that a denoising network reads: tokenizer, then text transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.nn.bert import BERTEmbedder
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.layers import timestep_embedding
from sfumato.text.chunks import Chunk, chunked, empty_chunk
from sfumato.text.emphasis import Dialect, segments
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.weighting import weighted
from sfumato.text.wordpiece import KIND as WORDPIECE
from sfumato.text.wordpiece import WordPiece

SIZE_WIDTH = 256  # sinusoids of each size number (Podell et al. 2023, section 2.2)
SIZES_WIDTH = 6 * SIZE_WIDTH


@dataclass(frozen=True)
class EncodedPrompts:
    """A conditioning with a (b, tokens, width) context, and what was cut from each prompt ("" = nothing)."""

    conditioning: Conditioning
    cut: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What SDXL is told of a picture in pixels (Podell et al. 2023, section 2.2).

    target: its (height, width). original: that of the picture it was made from, the same where None; small
    ones draw what was blurred by enlarging. crop: what was cut off at (top, left), (0, 0) for a whole object.
    """

    target: tuple[int, int]
    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)

    def vector(self) -> Tensor:
        """(1, 6 * 256) float32: original height and width, crop top and left, target height and width."""
        numbers = torch.tensor([*(self.original or self.target), *self.crop, *self.target])
        return timestep_embedding(numbers, SIZE_WIDTH).flatten()[None]


def read_tokenizer(text: str) -> Tokenizer | WordPiece:
    """The tokenizer of a model file's metadata, of either kind; CheckpointError where the text is neither."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None  # which the tokenizers refuse with their own words
    if isinstance(record, dict) and record.get("kind") == WORDPIECE:
        return WordPiece.from_json(text)
    return Tokenizer.from_json(text)


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
    context, _, cut = _tower(prompts, tokenizer, encoder, clip_skip, normed)
    return EncodedPrompts(Conditioning(context=context), cut)


def encode_two_towers(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    encoders: tuple[CLIPTextEncoder, CLIPTextEncoder],
    sizes: Sizes,
    clip_skip: int = 2,
    normed: bool = False,
) -> EncodedPrompts:
    """Encode each prompt as SDXL does: both towers' states side by side, and a vector (Podell et al. 2023).

    The context is (b, tokens, width of both), of the layer that `encode_prompts` describes; the vector is the
    second tower's pooled one, of its last layer, and the six sizes.
    """
    first, second = encoders
    context, _, cut = _tower(prompts, tokenizer, first, clip_skip, normed)
    context2, pooled, _ = _tower(prompts, tokenizer, second, clip_skip, normed)
    vector = _with_sizes(pooled, sizes)
    return EncodedPrompts(Conditioning(torch.cat([context, context2], dim=2), vector), cut)


def encode_wordpieces(prompts: Sequence[str], tokenizer: WordPiece, encoder: BERTEmbedder) -> EncodedPrompts:
    """Encode each prompt as LDM's 1.45 B model does, on the encoder's device and in its dtype."""
    tokens, cut = tokenizer.batch(prompts, encoder.config.max_seq_len)
    context = encoder(tokens.to(encoder.transformer.norm.weight.device))
    return EncodedPrompts(Conditioning(context=context), tuple(cut))


def encode_weighted(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    encoders: Sequence[CLIPTextEncoder],
    clip_skip: int,
    normed: bool,
    sizes: Sizes | None = None,
    dialect: Dialect = "a1111",
    vectors: Mapping[str, Sequence[Tensor]] | None = None,
) -> Conditioning:
    """Encode texts of any length with weights: those of `sfumato.text.prompt_schedule`, one step's each.

    A text is encoded in rows as long as the encoder's context, which stand one after the other in the
    conditioning's (b, rows * tokens, width); short texts of a batch end in rows of the empty prompt. Texts
    of one row and without weights give what `encode_prompts` and `encode_two_towers` give, bit by bit. With
    two encoders there are `sizes`, and the pooled vector is that of the first row. vectors: for every
    textual-inversion name its (n, hidden_size) for each encoder. Raises InputError as those two do, and for
    an embedding longer than a row.
    """
    known = vectors or {}
    lengths = {name: len(each[0]) for name, each in known.items()}
    spans = [segments(text, dialect) for text in texts]
    contexts, pooled = [], None
    for index, encoder in enumerate(encoders):
        config = encoder.config
        length, pad = config.max_position_embeddings, config.pad_id
        rows = [chunked(each, tokenizer, length, pad, lengths) for each in spans]
        most = max(map(len, rows))
        empty = empty_chunk(tokenizer, length, pad)
        chunks = [chunk for each in rows for chunk in (*each, *[empty] * (most - len(each)))]
        own = {name: each[index] for name, each in known.items()}
        states, pooled = _chunk_states(chunks, encoder, clip_skip, normed, own)
        blank = None
        if dialect == "comfyui" and any(weight != 1 for chunk in chunks for weight in chunk.weights):
            blank = _chunk_states([empty], encoder, clip_skip, normed, {})[0][0]
        weights = torch.tensor([chunk.weights for chunk in chunks], dtype=torch.float32)
        states = weighted(states, weights.to(states.device), blank, dialect)
        contexts.append(states.unflatten(0, (len(texts), most)).flatten(1, 2))
        pooled = pooled[::most]
    if sizes is None:
        return Conditioning(context=contexts[0])
    assert pooled is not None
    return Conditioning(torch.cat(contexts, dim=2), _with_sizes(pooled, sizes))


def _with_sizes(pooled: Tensor, sizes: Sizes) -> Tensor:
    """SDXL's vector: the pooled one (b, width) and the six sizes."""
    numbers = sizes.vector().to(pooled.device).expand(len(pooled), -1)
    # The sizes stay float32 beside a pooled vector in half precision: the network seam casts both.
    return torch.cat([pooled.to(numbers.dtype), numbers], dim=1)


def _chunk_states(
    chunks: Sequence[Chunk],
    encoder: CLIPTextEncoder,
    clip_skip: int,
    normed: bool,
    vectors: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """A layer's states (rows, tokens, width) and the pooled vectors, with learned vectors in their places."""
    tokens = torch.tensor([chunk.tokens for chunk in chunks])
    with _placed(chunks, encoder, vectors):
        return _states(tokens, encoder, clip_skip, normed)


@contextmanager
def _placed(
    chunks: Sequence[Chunk], encoder: CLIPTextEncoder, vectors: Mapping[str, Tensor]
) -> Iterator[None]:
    """While it lasts, the encoder looks up learned vectors where the chunks place them."""

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        for row, chunk in zip(output, chunks, strict=True):
            for each in chunk.placed:
                row[each.start : each.start + each.length] = vectors[each.name].to(row)
        return output

    if not any(chunk.placed for chunk in chunks):
        yield
        return
    handle = encoder.text_model.embeddings.token_embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _tower(
    prompts: Sequence[str], tokenizer: Tokenizer, encoder: CLIPTextEncoder, clip_skip: int, normed: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The states of a layer (b, tokens, width), the pooled vector (b, width) and what was cut."""
    config = encoder.config
    tokens, cut = tokenizer.batch(prompts, config.max_position_embeddings, config.pad_id)
    return *_states(tokens, encoder, clip_skip, normed), tuple(cut)


def _states(tokens: Tensor, encoder: CLIPTextEncoder, clip_skip: int, normed: bool) -> tuple[Tensor, Tensor]:
    """The states of a layer (b, tokens, width) and the pooled vector (b, width); checks `clip_skip`."""
    layers = encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise InputError(
            f"clip_skip is {clip_skip}; this text encoder allows 1 (the last layer) to {layers}."
        )
    output = encoder(tokens.to(encoder.text_model.final_layer_norm.weight.device))
    return encoder.hidden_state(output, -clip_skip, normed), output.pooled

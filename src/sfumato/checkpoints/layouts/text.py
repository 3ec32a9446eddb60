"""The names of the text encoders' tensors: Hugging Face's, OpenCLIP's, and those of diffusers' LDMBert."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.checkpoints.layouts.pair import TRANSPOSED, Pair, affine, row_slice, same
from sfumato.nn.bert import BERTConfig
from sfumato.nn.clip import CLIPTextConfig


def is_open_clip(config: CLIPTextConfig) -> bool:
    """Whether the encoder is one of OpenCLIP's, which single files hold under OpenCLIP's own names."""
    return config.pad_token_id == 0


def hugging_face_pairs(config: CLIPTextConfig, level: str = "text_model.") -> Iterator[Pair]:
    """Every tensor of `CLIPTextEncoder(config)`, whose names are Hugging Face's but for their first level."""
    for pair in open_clip_pairs(config):
        if pair.native.startswith("text_model."):
            yield same(pair.native, level + pair.native.removeprefix("text_model."), pair.shape)
        else:
            yield same(pair.native, pair.native, pair.shape)


def open_clip_pairs(config: CLIPTextConfig) -> Iterator[Pair]:
    """Every tensor of `CLIPTextEncoder(config)` with its name in OpenCLIP."""
    width, root = config.hidden_size, "text_model"
    tokens, places = f"{root}.embeddings.token_embedding", f"{root}.embeddings.position_embedding"
    yield same(f"{tokens}.weight", "token_embedding.weight", (config.vocab_size, width))
    yield same(f"{places}.weight", "positional_embedding", (config.max_position_embeddings, width))
    for layer in range(config.num_hidden_layers):
        own, theirs = f"{root}.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows, native = row_slice(index, 3), f"{own}.self_attn.{name}"
            yield Pair(f"{native}.weight", (f"{theirs}.attn.in_proj_weight",), rows, (width, width))
            yield Pair(f"{native}.bias", (f"{theirs}.attn.in_proj_bias",), rows, (width,))
        yield from affine(f"{own}.self_attn.out_proj", f"{theirs}.attn.out_proj", (width, width))
        yield from affine(f"{own}.layer_norm1", f"{theirs}.ln_1", (width,))
        yield from affine(f"{own}.mlp.fc1", f"{theirs}.mlp.c_fc", (config.intermediate_size, width))
        yield from affine(f"{own}.mlp.fc2", f"{theirs}.mlp.c_proj", (width, config.intermediate_size))
        yield from affine(f"{own}.layer_norm2", f"{theirs}.ln_2", (width,))
    yield from affine(f"{root}.final_layer_norm", "ln_final", (width,))
    if config.projection_dim is not None:
        shape = (config.projection_dim, width)
        yield Pair("text_projection.weight", ("text_projection",), TRANSPOSED, shape)


def bert_pairs(config: BERTConfig) -> Iterator[Pair]:
    """Every tensor of `BERTEmbedder(config)`, whose names are LDM's, with its name in diffusers' LDMBert."""
    width, inner = config.n_embed, config.heads * config.dim_head
    root = "transformer"
    yield same(f"{root}.token_emb.weight", "model.embed_tokens.weight", (config.vocab_size, width))
    yield same(f"{root}.pos_emb.emb.weight", "model.embed_positions.weight", (config.max_seq_len, width))
    for layer in range(config.n_layer):
        theirs = f"model.layers.{layer}"
        own = f"{root}.attn_layers.layers.{2 * layer}"
        yield from affine(f"{own}.0", f"{theirs}.self_attn_layer_norm", (width,))
        for name in ("q", "k", "v"):
            native, foreign = f"{own}.1.to_{name}.weight", f"{theirs}.self_attn.{name}_proj.weight"
            yield same(native, foreign, (inner, width))
        yield from affine(f"{own}.1.to_out", f"{theirs}.self_attn.out_proj", (width, inner))
        own = f"{root}.attn_layers.layers.{2 * layer + 1}"
        yield from affine(f"{own}.0", f"{theirs}.final_layer_norm", (width,))
        yield from affine(f"{own}.1.net.0.0", f"{theirs}.fc1", (4 * width, width))
        yield from affine(f"{own}.1.net.2", f"{theirs}.fc2", (width, 4 * width))
    yield from affine(f"{root}.norm", "model.layer_norm", (width,))

"""The options of text encoders and class embedders out of the names and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sfumato.checkpoints.detect.tree import inside, numbers, side, tree, vote
from sfumato.checkpoints.layouts.pair import Shape
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.bert import BERTConfig
from sfumato.nn.classes import ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig

HEAD_WIDTH = 64  # of every CLIP that was released
OPENAI_WIDTH = 768  # ViT-L/14's; the other towers in Stable Diffusion are OpenCLIP's
OPENCLIP_H = (1024, 24)  # width and layers
IMAGENET = 1000  # classes; a table of as many rows has none for "no class"
Shapes = Mapping[str, Shape]


def read_hugging_face(shapes: Shapes, level: str, *, embedded: bool) -> CLIPTextConfig:
    """The options of a CLIP text transformer in Hugging Face's names, all of which begin with `level`.

    embedded: inside a Stable Diffusion 1 or 2 model, which takes tokens and no pooled vector.
    """
    layer = f"{level}encoder.layers"
    layers = numbers(inside(tree(shapes), *layer.split(".")))
    places = [f"{layer}.{number}" for number in layers]
    norms = (f"{place}.{name}" for place in places for name in ("layer_norm1", "layer_norm2"))
    width = vote(_rows(shapes, norms), "the text encoder's width")
    return _clip(
        width=width,
        inner=vote(_rows(shapes, (f"{place}.mlp.fc1" for place in places)), "the text encoder's inner width"),
        layers=len(layers) - ((width, len(layers)) == OPENCLIP_H),
        tokens=side(shapes, f"{level}embeddings.token_embedding.weight"),
        places=side(shapes, f"{level}embeddings.position_embedding.weight"),
        projection=None if embedded or width == OPENCLIP_H[0] else side(shapes, "text_projection.weight"),
        open_clip=width > OPENAI_WIDTH,
    )


def read_open_clip(shapes: Shapes, *, second: bool) -> CLIPTextConfig:
    """The options of an OpenCLIP text transformer in its own names.

    second: SDXL's, of which every layer and the projection are used. The only one of a model is Stable
    Diffusion 2's, which leaves both the last layer and the projection alone; files that were converted from
    diffusers have neither.
    """
    layers = numbers(inside(tree(shapes), "transformer", "resblocks"))
    places = [f"transformer.resblocks.{number}" for number in layers]
    width = vote(
        _rows(shapes, (f"{place}.{name}" for place in places for name in ("ln_1", "ln_2"))),
        "the text's width",
    )
    projection = side(shapes, "text_projection", 1)
    whole = (width, len(layers)) == OPENCLIP_H or (width != OPENCLIP_H[0] and projection is not None)
    return _clip(
        width=width,
        inner=vote(
            _rows(shapes, (f"{place}.mlp.c_fc" for place in places)), "the text encoder's inner width"
        ),
        layers=len(layers) - (not second and whole),
        tokens=side(shapes, "token_embedding.weight"),
        places=side(shapes, "positional_embedding"),
        projection=projection if second else None,
        open_clip=True,
    )


def _clip(
    *,
    width: int,
    inner: int,
    layers: int,
    tokens: int | None,
    places: int | None,
    projection: int | None,
    open_clip: bool,
) -> CLIPTextConfig:
    vocabulary = tokens or CLIPTextConfig.vocab_size
    try:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // HEAD_WIDTH),
            max_position_embeddings=places or CLIPTextConfig.max_position_embeddings,
            hidden_act="gelu" if open_clip else "quick_gelu",
            eos_token_id=vocabulary - 1,
            projection_dim=projection,
            pad_token_id=0 if open_clip else None,
        )
    except InputError as error:
        raise CheckpointError(
            f"the text encoder is of no CLIP that is known here: {error.message}"
        ) from error


def read_bert(shapes: Shapes, layout: str) -> BERTConfig:
    """The options of LDM's text transformer, in LDM's names or in diffusers'."""
    native = layout == "ldm"
    root = ("transformer", "attn_layers", "layers") if native else ("model", "layers")
    layers = numbers(inside(tree(shapes), *root))
    tokens, places = (
        ("transformer.token_emb.weight", "transformer.pos_emb.emb.weight")
        if native
        else ("model.embed_tokens.weight", "model.embed_positions.weight")
    )
    query = "1.to_q.weight" if native else "self_attn.q_proj.weight"
    queries = [f"{'.'.join(root)}.{number}.{query}" for number in layers]
    norms = ("transformer.norm",) if native else ("model.layer_norm",)
    inner = vote([side(shapes, name) for name in queries], "the width of BERT's attention")
    defaults = BERTConfig()
    try:
        return BERTConfig(
            n_embed=vote(
                [*(side(shapes, name, 1) for name in (tokens, places, *queries)), *_rows(shapes, norms)],
                "BERT's width",
            ),
            n_layer=(len(layers) + 1) // 2 if native else len(layers),
            vocab_size=side(shapes, tokens) or defaults.vocab_size,
            max_seq_len=side(shapes, places) or defaults.max_seq_len,
            heads=max(1, inner // defaults.dim_head),
            dim_head=min(inner, defaults.dim_head),
        )
    except InputError as error:
        raise CheckpointError(f"the text encoder is not LDM's: {error.message}") from error


def read_classes(shapes: Shapes) -> ClassEmbedderConfig:
    """The options of a class embedder."""
    rows, width = shapes.get("embedding.weight", (0, 0))[:2]
    try:
        return ClassEmbedderConfig(rows, width, unconditional=rows != IMAGENET)
    except InputError as error:
        raise CheckpointError(f"the table of classes is empty: {error.message}") from error


def _rows(shapes: Shapes, layers: Iterable[str]) -> Iterator[int | None]:
    return (side(shapes, f"{layer}.{kind}") for layer in layers for kind in ("weight", "bias"))

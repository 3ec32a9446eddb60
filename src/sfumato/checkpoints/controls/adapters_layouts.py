"""The names of adapters' and the CLIP image tower's tensors here and in released files, by their options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sfumato.checkpoints.layouts.pair import Pair, affine, convolution, same
from sfumato.nn.clip_vision import CLIPVisionConfig
from sfumato.nn.ip_adapter import IPAdapterConfig
from sfumato.nn.t2i_adapter import T2IAdapterConfig


def own_names(table: Iterable[Pair]) -> Iterator[Pair]:
    """The same tensors under our names, which are those of a network's authors."""
    return (same(pair.native, pair.native, pair.shape) for pair in table)


def t2i_pairs(config: T2IAdapterConfig) -> Iterator[Pair]:
    """Every tensor of `T2IAdapter(config)`, whose names are its authors', with its name in diffusers."""
    return _light_pairs(config) if config.kind == "light" else _full_pairs(config)


def _full_pairs(config: T2IAdapterConfig) -> Iterator[Pair]:
    entry, channels = config.in_channels * config.unshuffle**2, config.channels[0]
    yield from convolution("conv_in", "adapter.conv_in", entry, channels)
    for level, width in enumerate(config.channels):
        for block in range(config.num_res_blocks):
            own, theirs = f"body.{level * config.num_res_blocks + block}", f"adapter.body.{level}"
            if channels != width:
                yield from convolution(f"{own}.in_conv", f"{theirs}.in_conv", channels, width, (1, 1))
                channels = width
            yield from _block(own, f"{theirs}.resnets.{block}", width, (1, 1))


def _light_pairs(config: T2IAdapterConfig) -> Iterator[Pair]:
    channels = config.in_channels * config.unshuffle**2
    for level, width in enumerate(config.channels):
        own, theirs, inner = f"body.{level}", f"adapter.body.{level}", width // 4
        yield from convolution(f"{own}.in_conv", f"{theirs}.in_conv", channels, inner, (1, 1))
        for block in range(config.num_res_blocks):
            yield from _block(f"{own}.body.{block}", f"{theirs}.resnets.{block}", inner, (3, 3))
        yield from convolution(f"{own}.out_conv", f"{theirs}.out_conv", inner, width, (1, 1))
        channels = width


def _block(own: str, theirs: str, width: int, kernel: tuple[int, int]) -> Iterator[Pair]:
    yield from convolution(f"{own}.block1", f"{theirs}.block1", width, width)
    yield from convolution(f"{own}.block2", f"{theirs}.block2", width, width, kernel)


def ip_pairs(config: IPAdapterConfig) -> Iterator[Pair]:
    """Every tensor of `IPAdapter(config)` with its name in its authors' files.

    Those number the attention layers, of which every second attends to the context.
    """
    root = "image_proj"
    tables = {"plain": _plain_projection, "full": _full_projection, "plus": _resampler}
    yield from (
        same(f"{root}.{pair.native}", f"{root}.{pair.native}", pair.shape)
        for pair in tables[config.kind](config)
    )
    for i, width in enumerate(config.widths):
        for name in ("to_k_ip", "to_v_ip"):
            foreign = f"ip_adapter.{2 * i + 1}.{name}.weight"
            yield same(f"ip_adapter.{i}.{name}.weight", foreign, (width, config.context_dim))


def _plain_projection(config: IPAdapterConfig) -> Iterator[Pair]:
    yield from affine("proj", "proj", (config.num_tokens * config.context_dim, config.image_dim))
    yield from affine("norm", "norm", (config.context_dim,))


def _full_projection(config: IPAdapterConfig) -> Iterator[Pair]:
    yield from affine("proj.0", "proj.0", (config.image_dim, config.image_dim))
    yield from affine("proj.2", "proj.2", (config.context_dim, config.image_dim))
    yield from affine("proj.3", "proj.3", (config.context_dim,))


def _resampler(config: IPAdapterConfig) -> Iterator[Pair]:
    width, inner = config.resampler_dim, 64 * config.num_heads
    yield same("latents", "latents", (1, config.num_tokens, width))
    yield from affine("proj_in", "proj_in", (width, config.image_dim))
    yield from affine("proj_out", "proj_out", (config.context_dim, width))
    yield from affine("norm_out", "norm_out", (config.context_dim,))
    for layer in range(config.depth):
        attention, perceptron = f"layers.{layer}.0", f"layers.{layer}.1"
        for norm in (f"{attention}.norm1", f"{attention}.norm2", f"{perceptron}.0"):
            yield from affine(norm, norm, (width,))
        matrices = {
            f"{attention}.to_q": (inner, width),
            f"{attention}.to_kv": (2 * inner, width),
            f"{attention}.to_out": (width, inner),
            f"{perceptron}.1": (4 * width, width),
            f"{perceptron}.3": (width, 4 * width),
        }
        yield from (same(f"{name}.weight", f"{name}.weight", shape) for name, shape in matrices.items())


def vision_pairs(config: CLIPVisionConfig) -> Iterator[Pair]:
    """Every tensor of `CLIPVisionEncoder(config)`, whose names are Hugging Face's."""
    return own_names(_vision(config))


def _vision(config: CLIPVisionConfig) -> Iterator[Pair]:
    width, root = config.hidden_size, "vision_model"
    shapes = {
        "class_embedding": (width,),
        "patch_embedding.weight": (width, 3, config.patch_size, config.patch_size),
        "position_embedding.weight": (config.num_tokens, width),
    }
    yield from (same(f"{root}.embeddings.{name}", "", shape) for name, shape in shapes.items())
    yield from affine(f"{root}.pre_layrnorm", "", (width,))
    for layer in range(config.num_hidden_layers):
        own = f"{root}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{own}.self_attn.{name}", "", (width, width))
        yield from affine(f"{own}.layer_norm1", "", (width,))
        yield from affine(f"{own}.mlp.fc1", "", (config.intermediate_size, width))
        yield from affine(f"{own}.mlp.fc2", "", (width, config.intermediate_size))
        yield from affine(f"{own}.layer_norm2", "", (width,))
    yield from affine(f"{root}.post_layernorm", "", (width,))
    if config.projection_dim is not None:
        yield same("visual_projection.weight", "", (config.projection_dim, width))

"""A U-Net's options out of the names and shapes of its tensors, in LDM's layout and in diffusers'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

from sfumato.checkpoints.detect.tree import Tree, inside, numbers, shown, side, tree, vote
from sfumato.checkpoints.layouts.pair import Shape
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.unet import UNetConfig

Resampling = Literal["convolution", "residual", "none"]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Dialect:
    """What the layers that tell a U-Net's options are called in a layout.

    widths: in a residual block, tensors with a row for each channel it gives. time: the layer in it for the
    timestep, label: integer labels, vector: vectors.
    """

    conv_in: str
    conv_out: str
    label: str
    vector: str
    widths: tuple[str, ...]
    time: str


LDM = Dialect(
    "input_blocks.0.0", "out.2", "label_emb", "label_emb.0.0",
    ("out_layers.0.weight", "out_layers.0.bias", "out_layers.3.weight", "out_layers.3.bias"), "emb_layers.1",
)  # fmt: skip
DIFFUSERS = Dialect(
    "conv_in", "conv_out", "class_embedding", "add_embedding.linear_1",
    ("norm2.weight", "norm2.bias", "conv2.weight", "conv2.bias"), "time_emb_proj",
)  # fmt: skip
RESIDUAL = {"in_layers", "emb_layers", "out_layers", "norm1", "conv1", "time_emb_proj", "norm2", "conv2"}


@dataclass(frozen=True)
class Block:
    """A residual block by its name, and the attention after it: `depth` transformer blocks, 0 for none."""

    name: str
    attention: str = ""
    depth: int = 0
    plain: bool = False


@dataclass(frozen=True)
class Skeleton:
    """The blocks of a U-Net: the encoder's by level, the decoder's in their order, and the middle's."""

    dialect: Dialect
    encoder: Sequence[Sequence[Block]]
    decoder: Sequence[Block]
    middle: Sequence[Block]
    resampling: Resampling

    def mirror(self) -> list[Sequence[Block]]:
        """The decoder's blocks by level, in the encoder's order; each level has one more than there."""
        found, end = [], len(self.decoder)
        for level in self.encoder:
            found.append(self.decoder[end - len(level) - 1 : end])
            end -= len(level) + 1
        return found

    def blocks(self) -> Iterator[Block]:
        """All of them."""
        for level in self.encoder:
            yield from level
        yield from self.middle
        yield from self.decoder


def read_unet(shapes: Shapes, layout: str) -> UNetConfig:
    """The options of the U-Net whose tensors have these names and shapes.

    Heads, dropout and the order of plain attention leave no trace in shapes: heads have 64 channels as in
    Stable Diffusion 2, for the caller to set. A few damaged shapes are outvoted, so that what is read can
    be compared with the file. `CheckpointError` for a network that no UNetConfig describes.
    """
    modules = tree(shapes)
    skeleton = _ldm(modules) if layout == "ldm" else _diffusers(modules)
    if not skeleton.encoder or not all(skeleton.encoder):
        raise CheckpointError("the U-Net has a level without residual blocks", "The file is incomplete.")
    try:
        return UNetConfig(**_options(skeleton, shapes))
    except InputError as error:
        raise CheckpointError(f"the U-Net has a shape that is not built here: {error.message}") from error


def _block(modules: Tree, name: str, attention: str) -> Block:
    found = inside(modules, *attention.split("."))
    if found.keys() & {"transformer_blocks", "proj_in"}:
        return Block(name, attention, len(numbers(inside(found, "transformer_blocks"))))
    return Block(name, attention, int(bool(found)), plain=bool(found))


def _ldm(modules: Tree) -> Skeleton:
    decoder: list[Block] = []
    ends: list[int] = []  # the blocks of the decoder that a level ends with
    updown = False
    outputs = inside(modules, "output_blocks")
    for number in numbers(outputs):
        layers = inside(outputs, number)
        doublings = [k for k in numbers(layers) if k > 0 and inside(layers, k).keys() & {"conv", *RESIDUAL}]
        updown |= any(inside(layers, k).keys() & RESIDUAL for k in doublings)
        ends += [number] if doublings else []
        attention = "" if 1 in doublings else f"output_blocks.{number}.1"
        decoder.append(_block(modules, f"output_blocks.{number}.0", attention))
    inputs = inside(modules, "input_blocks")
    places = [number for number in numbers(inputs) if number > 0]
    if updown:
        # A residual block that halves looks like any other. The decoder's levels have a block more than the
        # encoder's without it, which makes them equally long.
        last = max(numbers(outputs))
        halvings, convolutions = {last - end for end in ends}, set()
    else:
        convolutions = {number for number in places if "op" in inside(inputs, number, 0)}
        # Pooling has no tensors and leaves a gap in the numbers.
        gaps = set(range(1, max(places, default=0))) - set(places) if not convolutions else set()
        halvings = convolutions | gaps
    levels: list[list[Block]] = [[]]
    for number in sorted({*places, *halvings}):
        if number in halvings:
            levels.append([])
        else:
            place = f"input_blocks.{number}"
            levels[-1].append(_block(modules, f"{place}.0", f"{place}.1"))
    middle = [_block(modules, "middle_block.0", "middle_block.1")] if "middle_block" in modules else []
    if inside(modules, "middle_block", 2):
        middle.append(Block("middle_block.2"))
    resampling: Resampling = "residual" if updown else "convolution" if convolutions else "none"
    return Skeleton(LDM, levels, decoder, middle, resampling)


def _diffusers(modules: Tree) -> Skeleton:
    def blocks(side: str, level: int) -> list[Block]:
        place = f"{side}.{level}"
        resnets = numbers(inside(modules, side, level, "resnets"))
        return [_block(modules, f"{place}.resnets.{i}", f"{place}.attentions.{i}") for i in resnets]

    down, up = inside(modules, "down_blocks"), inside(modules, "up_blocks")
    middle = numbers(inside(modules, "mid_block", "resnets"))
    halvings = [inside(level, "downsamplers", 0).keys() for level in down.values()]
    resampling: Resampling = "none"
    if any(halving & RESIDUAL for halving in halvings):
        resampling = "residual"
    elif any("conv" in halving for halving in halvings):
        resampling = "convolution"
    return Skeleton(
        DIFFUSERS,
        [blocks("down_blocks", level) for level in numbers(down)],
        [block for level in numbers(up) for block in blocks("up_blocks", level)],
        [_block(modules, f"mid_block.resnets.{i}", "" if i else "mid_block.attentions.0") for i in middle],
        resampling,
    )


def _options(skeleton: Skeleton, shapes: Shapes) -> dict[str, Any]:
    dialect, levels = skeleton.dialect, skeleton.encoder
    sizes = [len(level) for level in levels]
    if len(skeleton.decoder) != sum(sizes) + len(sizes):
        raise CheckpointError(
            f"the U-Net's encoder has levels of {shown(sizes)} residual blocks, which asks for "
            f"{sum(sizes) + len(sizes)} in the decoder, and it has {len(skeleton.decoder)}",
            "A network of this shape is not built here, or the file is incomplete.",
        )
    conv_in, conv_out = f"{dialect.conv_in}.weight", f"{dialect.conv_out}.weight"
    rows = (f"{dialect.conv_in}.weight", f"{dialect.conv_in}.bias")
    width = vote(
        [*(side(shapes, name) for name in rows), *_time_widths(skeleton, shapes)], "the U-Net's base width"
    )
    widths = [vote(_widths(level, dialect, shapes), "a level's width") for level in levels]
    for each in widths:
        if each % width:
            raise CheckpointError(
                f"the U-Net's levels have {shown(widths)} channels; each must be a multiple of {width}",
                "A network of this shape is not built here.",
            )
    scaled = vote(_time_ratios(skeleton, shapes), "how the timestep enters") == 2
    return {
        "in_channels": vote([side(shapes, conv_in, 1)], conv_in),
        "out_channels": vote([side(shapes, conv_out), side(shapes, f"{dialect.conv_out}.bias")], conv_out),
        "model_channels": width,
        "num_res_blocks": _uniform(sizes),
        "channel_mult": tuple(each // width for each in widths),
        "conv_resample": skeleton.resampling == "convolution",
        "resblock_updown": skeleton.resampling == "residual",
        "dims": vote([len(shapes.get(name, ())) - 2 for name in (conv_in, conv_out)], "the dimensions"),
        "use_scale_shift_norm": scaled,
        "num_head_channels": 64,
        "legacy": False,
        "num_groups": gcd(width, 32),
        **_labels(dialect, shapes),
        **_attention(skeleton, shapes),
    }


def _widths(blocks: Iterable[Block], dialect: Dialect, shapes: Shapes) -> Iterator[int | None]:
    return (side(shapes, f"{block.name}.{name}") for block in blocks for name in dialect.widths)


def _time_widths(skeleton: Skeleton, shapes: Shapes) -> Iterator[int | None]:
    """A quarter of the timestep embedding's width, from every layer that takes it."""
    for block in skeleton.blocks():
        columns = side(shapes, f"{block.name}.{skeleton.dialect.time}.weight", 1)
        yield None if columns is None else columns // 4


def _time_ratios(skeleton: Skeleton, shapes: Shapes) -> Iterator[int | None]:
    for block in skeleton.blocks():
        rows = side(shapes, f"{block.name}.{skeleton.dialect.time}.weight")
        width = side(shapes, f"{block.name}.{skeleton.dialect.widths[0]}")
        yield rows // width if rows and width else None


def _labels(dialect: Dialect, shapes: Shapes) -> dict[str, Any]:
    if f"{dialect.label}.bias" in shapes:
        return {"num_classes": "continuous"}
    if f"{dialect.label}.weight" in shapes:
        return {"num_classes": side(shapes, f"{dialect.label}.weight")}
    vector = f"{dialect.vector}.weight"
    if vector in shapes or f"{dialect.vector}.bias" in shapes:
        return {"num_classes": "sequential", "adm_in_channels": vote([side(shapes, vector, 1)], vector)}
    return {}


def _attention(skeleton: Skeleton, shapes: Shapes) -> dict[str, Any]:
    plain = {block.plain for block in skeleton.blocks() if block.depth}
    if len(plain) > 1:
        raise CheckpointError(
            "the U-Net has plain attention and transformers", "A network of this shape is not built here."
        )
    depths = [_level_depth(level, number) for number, level in enumerate(skeleton.encoder)]
    attended = tuple(2**level for level, depth in enumerate(depths) if depth)
    options: dict[str, Any] = {"attention_resolutions": attended, **_middle(skeleton.middle)}
    # What each block of the decoder has if it mirrors the encoder, the lowest level first.
    mirrored = [
        depth
        for level, depth in reversed(list(enumerate(depths)))
        for _ in range(len(skeleton.encoder[level]) + 1)
    ]
    decoder = [block.depth for block in skeleton.decoder]
    if plain == {True}:
        if decoder != mirrored:
            raise CheckpointError(
                f"the U-Net's decoder has attention after its blocks as in {shown(decoder)}, its encoder "
                f"asks for {shown(mirrored)}",
                "A network of this shape is not built here.",
            )
        return options
    if not plain:
        return options
    middle = skeleton.middle[0].depth if skeleton.middle else 0
    known = {depth for depth in depths if depth} or {max([middle, *decoder])}
    options |= {
        "use_spatial_transformer": True,
        "transformer_depth": known.pop() if len(known) == 1 else tuple(depth or 1 for depth in depths),
        "context_dim": _context_width(skeleton, shapes),
        "use_linear_in_transformer": vote(_projection_ranks(skeleton, shapes), "the transformers' kind") == 2,
    }
    depth = options["transformer_depth"]
    if middle and middle != (depth if isinstance(depth, int) else depth[-1]):
        options["transformer_depth_middle"] = middle
    if decoder != mirrored:
        options["transformer_depth_output"] = tuple(decoder)
    levels = [
        [*level, *backwards] for level, backwards in zip(skeleton.encoder, skeleton.mirror(), strict=True)
    ]
    reads = [_reads_context(level, options["context_dim"], shapes) for level in levels]
    if any(reads):  # levels without attention as in the released one
        options["disable_self_attentions"] = tuple(
            read or not any(block.depth for block in level) for read, level in zip(reads, levels, strict=True)
        )
    return options


def _reads_context(level: Sequence[Block], width: int | None, shapes: Shapes) -> bool:
    """Whether the first attention of most of a level's transformers takes the context of this width.

    In a level as wide as its context that leaves no trace; self-attention is likelier.
    """
    places = [
        f"{block.attention}.transformer_blocks.{layer}.attn1"
        for block in level
        for layer in range(block.depth)
    ]
    read = [side(shapes, f"{place}.{name}.weight", 1) for place in places for name in ("to_k", "to_v")]
    own = [side(shapes, f"{place}.to_q.weight", 1) for place in places]
    return width is not None and 2 * read.count(width) > len(read) and 2 * own.count(width) <= len(own)


def _level_depth(level: Sequence[Block], number: int) -> int:
    depths = [block.depth for block in level]
    if len(set(depths)) > 1:
        raise CheckpointError(
            f"level {number} of the U-Net's encoder has {shown(depths)} transformers after its blocks",
            "They must be equal: a network of this shape is not built here.",
        )
    return depths[0]


def _middle(blocks: Sequence[Block]) -> dict[str, Any]:
    if not blocks:
        return {"middle": "none"}
    if len(blocks) == 1 and not blocks[0].depth:
        return {"middle": "residual"}
    if not blocks[0].depth:
        raise CheckpointError(
            f"the U-Net's middle has {len(blocks)} residual blocks and no attention",
            "A network of this shape is not built here, or the file is incomplete.",
        )
    return {}


def _transformers(skeleton: Skeleton) -> Iterator[tuple[str, str]]:
    for block in skeleton.blocks():
        if block.depth and not block.plain:
            for layer in range(block.depth):
                yield block.attention, f"{block.attention}.transformer_blocks.{layer}"


def _context_width(skeleton: Skeleton, shapes: Shapes) -> int | None:
    """The width of the tokens that transformers attend to; None where each attends to its own."""
    own: list[bool] = []
    found: list[int] = []
    for _, layer in _transformers(skeleton):
        for name in ("to_k", "to_v"):
            columns = side(shapes, f"{layer}.attn2.{name}.weight", 1)
            if columns is not None:
                own.append(columns == side(shapes, f"{layer}.attn1.{name}.weight", 1))
                found.append(columns)
    width = vote(found, "the width of the context")
    # In transformers of one width alone, a context of that width cannot be told from none; it is likelier.
    return None if sum(own) > len(own) / 2 and len({*found}) > 1 else width


def _projection_ranks(skeleton: Skeleton, shapes: Shapes) -> Iterator[int | None]:
    for place in dict(_transformers(skeleton)):
        for name in ("proj_in", "proj_out"):
            shape = shapes.get(f"{place}.{name}.weight")
            yield None if shape is None else min(len(shape), 3)


def _uniform(values: Sequence[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)

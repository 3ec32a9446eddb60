"""The options of a U-Net, under latent diffusion's own names (Rombach et al. 2022), and what they imply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfumato.errors import InputError, nearest

PER_LEVEL = ("num_res_blocks", "transformer_depth", "disable_self_attentions")
MIDDLES = ("attention", "residual", "none")


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net, under LDM's own option names; lists are taken as tuples.

    in_channels, out_channels: of the sample (concatenated conditions included) and of the prediction.
    model_channels: the base width; `channel_mult` multiplies it, level by level, each level half as large.
    num_res_blocks: residual blocks in each level, one number or one per level.
    attention_resolutions: the downsampling factors (1, 2, 4, ...) that have attention; the middle always has.
    dropout: rate inside the residual blocks.
    conv_resample: resample with learned convolutions, where `resblock_updown` does not with residual blocks.
    dims: 1 for sequences, 2 for pictures, 3 for volumes (whose depth is never resampled).
    num_classes: a number of integer labels; "sequential" for vectors of `adm_in_channels` floats (implied by
        giving that width); "continuous" for one float; None or 0 for none.
    num_heads, num_head_channels: attention heads by number or by width; the width wins where both are given.
    num_heads_upsample: heads of the decoder's plain attention blocks, read where `legacy` counts them.
    use_scale_shift_norm: the timestep scales and shifts the second normalised map; else it is added before.
    use_spatial_transformer: transformers of `transformer_depth` blocks (one number or one per level) instead
        of plain attention blocks. `transformer_depth_middle` is the last level's where None. `context_dim` is
        the width of the tokens that they attend to; None leaves them with self-attention.
    use_linear_in_transformer: linear layers instead of 1-wide convolutions around the transformer blocks.
    use_new_attention_order: order of the channels in plain attention blocks, see `AttentionBlock`.
    legacy: LDM's first rule for heads; differs only where the heads do not divide the channels evenly.
    num_groups: groups of every group normalisation, a divisor of `model_channels`.
    middle: what the distilled networks left of the middle block: all of it ("attention", which stands between
        two residual blocks), one residual block alone ("residual", SSD-1B), or nothing ("none", BK-SDM).
    transformer_depth_output: transformer blocks in each block of the decoder, in `output_blocks`' order, 0
        for no attention; None for as many as the encoder's level has.
    disable_self_attentions: for each level whether the first attention of its transformer blocks attends to
        the context too, and none to the picture (Stable Diffusion's x4 upscaler); None for nowhere. The
        middle keeps its self-attention.

    Raises InputError for options that contradict each other.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int | tuple[int, ...]
    attention_resolutions: tuple[int, ...]
    dropout: float = 0.0
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    conv_resample: bool = True
    dims: int = 2
    num_classes: int | Literal["sequential", "continuous"] | None = None
    adm_in_channels: int | None = None
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int | tuple[int, ...] = 1
    transformer_depth_middle: int | None = None
    context_dim: int | None = None
    use_linear_in_transformer: bool = False
    use_new_attention_order: bool = False
    legacy: bool = True
    num_groups: int = 32
    middle: Literal["attention", "residual", "none"] = "attention"
    transformer_depth_output: tuple[int, ...] | None = None
    disable_self_attentions: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("attention_resolutions", "channel_mult", "transformer_depth_output", *PER_LEVEL):
            value = getattr(self, name)
            if isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(value))
        if self.num_classes == 0:
            object.__setattr__(self, "num_classes", None)
        if self.num_classes is None and self.adm_in_channels is not None:
            object.__setattr__(self, "num_classes", "sequential")
        _check_config(self)

    @property
    def downsampling(self) -> int:
        """Factor between the first and the last level."""
        return 2 ** (len(self.channel_mult) - 1)

    def residual_blocks(self, level: int) -> int:
        """Residual blocks of the encoder's level; the decoder has one more."""
        blocks = self.num_res_blocks
        return blocks if isinstance(blocks, int) else blocks[level]

    def attended(self, level: int) -> bool:
        """Whether attention follows the residual blocks of the encoder's level."""
        return 2**level in self.attention_resolutions

    def depth(self, level: int) -> int:
        """Transformer blocks in each spatial transformer of the encoder's level."""
        depth = self.transformer_depth
        return depth if isinstance(depth, int) else depth[level]

    def self_attends(self, level: int) -> bool:
        """Whether transformer blocks in the level have self-attention."""
        return not (self.disable_self_attentions and self.disable_self_attentions[level])

    def attended_output(self, level: int, index: int) -> bool:
        """Whether attention follows the residual block of `output_blocks.index`, which lies in the level."""
        depths = self.transformer_depth_output
        return self.attended(level) if depths is None else depths[index] > 0

    def depth_output(self, level: int, index: int) -> int:
        """Transformer blocks in the spatial transformer of `output_blocks.index`, which lies in the level."""
        depths = self.transformer_depth_output
        return self.depth(level) if depths is None else depths[index]

    def heads(self, channels: int, *, decoder: bool = False) -> tuple[int, int]:
        """Number and width of the attention heads at `channels`, by LDM's rules.

        Plain attention blocks need heads that fill the channels exactly; InputError where they do not.
        """
        plain, by_width = not self.use_spatial_transformer, self.num_head_channels != -1
        count, width = self.num_heads, self.num_head_channels
        if plain and self.legacy and decoder and self.num_heads_upsample != -1:
            count = self.num_heads_upsample
        count, width = (channels // width, width) if by_width else (count, channels // count)
        if width and plain and not self.legacy:
            count = channels // width
        if count and not plain and self.legacy:
            width = channels // count
        if count < 1 or width < 1 or (plain and count * width != channels):
            asked = f"num_heads={self.num_heads}, num_head_channels={self.num_head_channels}"
            raise InputError(f"{asked}: no such heads in {channels} channels.", "Choose a divisor of them.")
        return count, width


def _check_config(config: UNetConfig) -> None:
    levels = len(config.channel_mult)
    for name in PER_LEVEL:
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != levels:
            raise InputError(f"{name}={value} must be one number, or {levels} as channel_mult has levels.")
    if config.middle not in MIDDLES:
        raise InputError(f"middle is {config.middle!r}.", nearest(config.middle, MIDDLES))
    depths, blocks = config.transformer_depth_output, _output_blocks(config)
    if depths is not None and (len(depths) != blocks or not config.use_spatial_transformer):
        raise InputError(
            f"transformer_depth_output={depths} needs use_spatial_transformer=True, and one number for each "
            f"of the {blocks} blocks of the decoder."
        )
    if config.dims not in (1, 2, 3):
        raise InputError(f"dims={config.dims} must be 1, 2 or 3.")
    heads = (config.num_heads, config.num_head_channels)
    if max(heads) < 1 or any(number < 1 and number != -1 for number in (*heads, config.num_heads_upsample)):
        given = f"num_heads={heads[0]}, num_head_channels={heads[1]}"
        raise InputError(f"{given}: one must be positive, -1 leaves the other unset.", "Set one of them.")
    if config.context_dim is not None and not config.use_spatial_transformer:
        raise InputError(f"context_dim={config.context_dim} needs use_spatial_transformer=True.")
    if config.disable_self_attentions and config.context_dim is None:
        raise InputError(
            f"disable_self_attentions={config.disable_self_attentions} needs a context_dim to attend to."
        )
    if config.model_channels % config.num_groups:
        raise InputError(
            f"num_groups={config.num_groups} must divide model_channels={config.model_channels}."
        )
    if (config.num_classes == "sequential") != (config.adm_in_channels is not None):
        raise InputError(
            f"num_classes={config.num_classes!r} does not go with adm_in_channels={config.adm_in_channels}.",
            'A vector\'s width is needed with num_classes="sequential", and with nothing else.',
        )


def _output_blocks(config: UNetConfig) -> int:
    return sum(config.residual_blocks(level) + 1 for level in range(len(config.channel_mult)))

"""The denoising U-Net of latent diffusion, with the original state-dict names (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import InputError
from sfumato.nn.attention import (
    Attend,
    AttentionBlock,
    CrossAttention,
    SpatialTransformer,
    SpatialTransformerConfig,
    attend,
)
from sfumato.nn.layers import (
    Downsample,
    ResBlock,
    ResBlockConfig,
    Upsample,
    conv_nd,
    perceptron,
    resampling_factors,
    timestep_embedding,
    zero_,
)
from sfumato.nn.unet_config import UNetConfig


@dataclass(frozen=True)
class Patch:
    """The block seam: functions that replace or follow what happens at named places inside a U-Net.

    attention(name, q, k, v): the attention itself, (b, heads, tokens, width) each, returning the shape of q;
        `name` is the module's state-dict name, e.g. "middle_block.1.transformer_blocks.0.attn1".
    encoder(i, h): what leaves `input_blocks.i`, for the next block and for the skip connection.
    skip(i, h, skip): what enters `output_blocks.i`, as the pair (h, skip), before they are joined.
    """

    attention: Attend = attend
    encoder: Callable[[int, Tensor], Tensor] = lambda i, h: h
    skip: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda i, h, skip: (h, skip)


class Stage(nn.ModuleList):
    """One numbered block of the U-Net: layers in turn, each given the conditions that its kind takes."""

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None, attend: Attend) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context, attend)
            elif isinstance(layer, AttentionBlock):
                h = layer(h, attend)
            else:
                h = layer(h)
        return h


class UNet(nn.Module):
    """Predicts noise, velocity or sample from a noised sample; see `forward`.

    Set `gradient_checkpointing` to recompute each block in the backward pass instead of storing activations.
    The functions that build its parts also make control networks, whose keys then are equal.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.model_channels
        self.time_embed = perceptron(width, 4 * width)
        self.label_emb = build_label_embedding(config)
        self.input_blocks, skips = build_input_blocks(config)
        self.middle_block = build_middle_block(config)
        self.output_blocks = build_output_blocks(config, skips)
        self.out = nn.Sequential(
            nn.GroupNorm(config.num_groups, config.channel_mult[0] * width),
            nn.SiLU(),
            conv_nd(config.dims, config.channel_mult[0] * width, config.out_channels, 3),
        )
        zero_(self.out[2])
        name_attention(self)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        residuals: Sequence[Tensor] = (),
        patch: Patch | None = None,
    ) -> Tensor:
        """Raw prediction (b, out_channels, *s), in the dtype of x, for samples x: (b, in_channels, *s).

        timesteps: (b,), integers or fractions. context: (b, tokens, context_dim), if and only if the network
        has a context_dim. vector: (b,) long labels or (b, adm_in_channels) floats, if and only if it has
        classes. residuals: one for each input block's skip connection, and one for the middle block's output.
        Raises InputError for a shape that does not fit, naming the nearest size that does.
        """
        check_inputs(self.config, x, context, vector)
        check_residuals(residuals, len(self.input_blocks))
        patch = Patch() if patch is None else patch
        emb = self.embed(timesteps, vector, x.dtype)
        skips: list[Tensor] = []
        h = x
        for i, stage in enumerate(self.input_blocks):
            h = patch.encoder(i, self._run(stage, h, emb, context, patch.attention))
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context, patch.attention)
        if residuals:
            h = h + residuals[-1]
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
        for i, stage in enumerate(self.output_blocks):
            h = torch.cat(patch.skip(i, h, skips.pop()), dim=1)
            h = self._run(stage, h, emb, context, patch.attention)
        return self.out(h).to(x.dtype)

    def embed(self, timesteps: Tensor, vector: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What every residual block is told: the timestep and, where the network has classes, `vector`."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(dtype))
        return emb if vector is None else emb + self.label_emb(vector)

    def _run(self, stage: nn.Module, *inputs: Tensor | Attend | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


def build_label_embedding(config: UNetConfig) -> nn.Module:
    """The layer that takes `vector` to the width of the timestep embedding; no parameters without classes."""
    width = 4 * config.model_channels
    if isinstance(config.num_classes, int):
        return nn.Embedding(config.num_classes, width)
    if config.num_classes == "sequential" and config.adm_in_channels is not None:
        return nn.Sequential(perceptron(config.adm_in_channels, width))
    return nn.Linear(1, width) if config.num_classes == "continuous" else nn.Identity()


def build_input_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The encoder and the channels that each of its blocks gives to its skip connection."""
    channels = config.model_channels
    blocks = nn.ModuleList([Stage([conv_nd(config.dims, config.in_channels, channels, 3)])])
    skips = [channels]
    for level, multiplier in enumerate(config.channel_mult):
        for _ in range(config.residual_blocks(level)):
            layers: list[nn.Module] = [_res_block(config, channels, multiplier * config.model_channels)]
            channels = multiplier * config.model_channels
            if config.attended(level):
                layers.append(_attention(config, channels, config.depth(level), level))
            blocks.append(Stage(layers))
            skips.append(channels)
        if level < len(config.channel_mult) - 1:
            blocks.append(Stage([_resample(config, channels, Downsample)]))
            skips.append(channels)
    return blocks, skips


def build_middle_block(config: UNetConfig) -> Stage:
    """Residual block, attention, residual block at the lowest resolution, as far as the config has them."""
    channels = config.channel_mult[-1] * config.model_channels
    if config.middle == "none":
        return Stage()
    if config.middle == "residual":
        return Stage([_res_block(config, channels, channels)])
    depth = config.transformer_depth_middle
    depth = config.depth(len(config.channel_mult) - 1) if depth is None else depth
    return Stage(
        [
            _res_block(config, channels, channels),
            _attention(config, channels, depth),
            _res_block(config, channels, channels),
        ]
    )


def build_output_blocks(config: UNetConfig, skips: Sequence[int]) -> nn.ModuleList:
    """The decoder; `skips` are the encoder's channels in its own order."""
    remaining = list(skips)
    channels = config.channel_mult[-1] * config.model_channels
    blocks = nn.ModuleList()
    for level, multiplier in reversed(list(enumerate(config.channel_mult))):
        for i in range(config.residual_blocks(level) + 1):
            in_channels = channels + remaining.pop()
            channels = multiplier * config.model_channels
            layers: list[nn.Module] = [_res_block(config, in_channels, channels)]
            if config.attended_output(level, len(blocks)):
                depth = config.depth_output(level, len(blocks))
                layers.append(_attention(config, channels, depth, level, decoder=True))
            if level > 0 and i == config.residual_blocks(level):
                layers.append(_resample(config, channels, Upsample))
            blocks.append(Stage(layers))
    return blocks


def name_attention(network: nn.Module) -> None:
    """Tell every attention module in `network` its state-dict name, for the block seam."""
    for name, module in network.named_modules():
        if isinstance(module, CrossAttention | AttentionBlock):
            module.name = name


def check_inputs(config: UNetConfig, x: Tensor, context: Tensor | None, vector: Tensor | None) -> None:
    """Raise InputError where an input does not fit the network of `config`, naming what would."""
    if x.ndim != config.dims + 2 or x.shape[1] != config.in_channels:
        axes = ", ".join("dhw"[-config.dims :])
        wanted = f"(b, {config.in_channels}, {axes})"
        raise InputError(f"The sample has shape {tuple(x.shape)}; this network takes {wanted}.")
    steps = [config.downsampling if factor == 2 else 1 for factor in resampling_factors(config.dims)]
    size = tuple(x.shape[2:])
    nearest = tuple(max(1, round(length / step)) * step for length, step in zip(size, steps, strict=True))
    if size != nearest:
        raise InputError(f"Size {size} must be a multiple of {tuple(steps)}.", f"The nearest is {nearest}.")
    given = "none" if context is None else f"{tuple(context.shape)}"
    if config.context_dim is None and context is not None:
        raise InputError(f"A context {given} was given to a network without context_dim.", "Leave it out.")
    if config.context_dim is not None and (context is None or context.shape[2:] != (config.context_dim,)):
        raise InputError(f"This network takes a context (b, tokens, {config.context_dim}); got {given}.")
    given = "none" if vector is None else f"{tuple(vector.shape)} {vector.dtype}"
    if config.num_classes is None and vector is not None:
        raise InputError(f"A vector {given} was given to a network without classes.", "Leave it out.")
    labels = vector is not None and vector.ndim == 1 and not vector.is_floating_point()
    if isinstance(config.num_classes, int) and not labels:
        raise InputError(f"This network takes (b,) integer labels below {config.num_classes}; got {given}.")
    width = config.adm_in_channels or 1
    if isinstance(config.num_classes, str) and (vector is None or vector.shape[1:] != (width,)):
        raise InputError(f"This network takes a vector (b, {width}) of floats; got {given}.")


def check_residuals(residuals: Sequence[Tensor], num_blocks: int) -> None:
    """Raise InputError unless there are no residuals, or `num_blocks` and one for the middle block."""
    if len(residuals) not in (0, num_blocks + 1):
        raise InputError(
            f"Got {len(residuals)} residuals; this network takes none or {num_blocks + 1}.",
            f"Give {num_blocks} for its skip connections, then one for its middle block.",
        )


def _res_block(
    config: UNetConfig, in_channels: int, out_channels: int, resample: nn.Module | None = None
) -> ResBlock:
    shared = ResBlockConfig(
        emb_channels=4 * config.model_channels,
        dropout=config.dropout,
        dims=config.dims,
        use_scale_shift_norm=config.use_scale_shift_norm,
        num_groups=config.num_groups,
    )
    return ResBlock(shared, in_channels, out_channels, resample)


def _resample(config: UNetConfig, channels: int, kind: type[Downsample] | type[Upsample]) -> nn.Module:
    if config.resblock_updown:
        return _res_block(config, channels, channels, kind(channels, use_conv=False, dims=config.dims))
    return kind(channels, use_conv=config.conv_resample, dims=config.dims)


def _attention(
    config: UNetConfig, channels: int, depth: int, level: int | None = None, *, decoder: bool = False
) -> nn.Module:
    """level: None in the middle."""
    heads, dim_head = config.heads(channels, decoder=decoder)
    if not config.use_spatial_transformer:
        order = config.use_new_attention_order
        return AttentionBlock(channels, heads, use_new_attention_order=order, num_groups=config.num_groups)
    transformer = SpatialTransformerConfig(
        heads=heads,
        dim_head=dim_head,
        depth=depth,
        context_dim=config.context_dim,
        use_linear=config.use_linear_in_transformer,
        dims=config.dims,
        num_groups=config.num_groups,
        disable_self_attention=level is not None and not config.self_attends(level),
    )
    return SpatialTransformer(channels, transformer)

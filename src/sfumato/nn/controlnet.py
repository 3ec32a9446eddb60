"""ControlNet: a copy of the U-Net's encoder that adds to its skip connections (Zhang et al. 2023)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.attention import attend
from sfumato.nn.layers import conv_nd, perceptron, timestep_embedding, zero_
from sfumato.nn.unet import (
    UNet,
    build_input_blocks,
    build_label_embedding,
    build_middle_block,
    check_inputs,
    name_attention,
)
from sfumato.nn.unet_config import UNetConfig

NEW = ("zero_convs.", "input_hint_block.", "middle_block_out.")  # what a U-Net has not


@dataclass(frozen=True)
class ControlNetConfig:
    """Architecture of a control network.

    encoder: the options of the U-Net that it belongs to, of which those of the decoder are not read.
    hint_channels: of the pictures it is shown. hint_widths: channels of the layers that bring them to the
        size of the samples; each after the first halves the sides. global_average: residuals are their means
        over all places, as the network for shuffled pictures was trained. Raises InputError for no widths.
    """

    encoder: UNetConfig
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)  # cldm.py of lllyasviel/ControlNet
    global_average: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "hint_widths", tuple(self.hint_widths))
        if not self.hint_widths or min(self.hint_widths) < 1 or self.hint_channels < 1:
            raise InputError(
                f"hint_channels={self.hint_channels} and hint_widths={self.hint_widths} make no layers",
                "Give positive numbers, one width at least.",
            )

    @property
    def hint_scale(self) -> int:
        """How much longer the sides of a hint are than those of the sample."""
        return 2 ** (len(self.hint_widths) - 1)


class ControlNet(nn.Module):
    """What a picture adds to each skip connection of a U-Net, and to its middle; see `forward`.

    The parts that it shares with the U-Net have equal state-dict names.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        encoder = config.encoder
        width = encoder.model_channels
        self.time_embed = perceptron(width, 4 * width)
        self.label_emb = build_label_embedding(encoder)
        self.input_blocks, skips = build_input_blocks(encoder)
        self.zero_convs = nn.ModuleList(_zero_convolution(encoder.dims, channels) for channels in skips)
        self.input_hint_block = build_hint_block(config)
        self.middle_block = build_middle_block(encoder)
        self.middle_block_out = _zero_convolution(encoder.dims, encoder.channel_mult[-1] * width)
        pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
        self.pool = pools[encoder.dims](1) if config.global_average else nn.Identity()
        name_attention(self)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        hint: Tensor,
        context: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> list[Tensor]:
        """Residuals for `UNet.forward`: one for each skip connection, then the middle's.

        hint: (b, hint_channels, *s * hint_scale) in 0..1. The others: as the U-Net's, without the channels
        that an inpainting model joins to x. Raises InputError for a shape that does not fit.
        """
        check_inputs(self.config.encoder, x, context, vector)
        check_hint(self.config, x, hint)
        emb = self.embed(timesteps, vector, x)
        outputs: list[Tensor] = []
        h = x
        for i, (stage, zero_convolution) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = stage(h, emb, context, attend)
            if i == 0:
                h = h + self.input_hint_block(hint)
            outputs.append(zero_convolution(h))
        outputs.append(self.middle_block_out(self.middle_block(h, emb, context, attend)))
        return [self.pool(residual) for residual in outputs]

    def embed(self, timesteps: Tensor, vector: Tensor | None, x: Tensor) -> Tensor:
        """What every residual block is told, as in the U-Net."""
        width = self.config.encoder.model_channels
        emb = self.time_embed(timestep_embedding(timesteps, width).to(x.dtype))
        return emb if vector is None else emb + self.label_emb(vector)


def build_hint_block(config: ControlNetConfig) -> nn.Sequential:
    """The convolutions that bring a hint to the size and width of the first block's output."""
    dims, widths = config.encoder.dims, config.hint_widths
    layers: list[nn.Module] = [conv_nd(dims, config.hint_channels, widths[0], 3), nn.SiLU()]
    for narrow, wide in itertools.pairwise(widths):
        layers += [conv_nd(dims, narrow, narrow, 3), nn.SiLU(), conv_nd(dims, narrow, wide, 3, 2), nn.SiLU()]
    last = conv_nd(dims, widths[-1], config.encoder.model_channels, 3)
    zero_(last)
    return nn.Sequential(*layers, last)


def check_hint(config: ControlNetConfig, x: Tensor, hint: Tensor) -> None:
    """Raise InputError where a hint does not belong to samples x of this shape."""
    wanted = (x.shape[0], config.hint_channels, *(side * config.hint_scale for side in x.shape[2:]))
    if tuple(hint.shape) != wanted:
        raise InputError(
            f"The hint has shape {tuple(hint.shape)}; for samples {tuple(x.shape)} it must be {wanted}.",
            "Bring the picture to the size that is drawn.",
        )


def controlnet_from_unet(unet: UNet, config: ControlNetConfig | None = None) -> ControlNet:
    """A ControlNet to be trained from a U-Net: its encoder copied, new layers that at first add nothing.

    config: by default the U-Net's own options; a U-Net with more input channels gives those of its samples.
    Raises InputError where the options are not those of the U-Net's encoder.
    """
    if config is None:
        config = ControlNetConfig(unet.config)
    network = ControlNet(config).to(next(unet.parameters()).device, next(unet.parameters()).dtype)
    own, theirs = network.state_dict(), unet.state_dict()
    shared = {name: tensor for name, tensor in own.items() if not name.startswith(NEW)}
    wrong = [
        name for name, tensor in shared.items() if name not in theirs or theirs[name].shape != tensor.shape
    ]
    if wrong:
        raise InputError(
            f"{len(wrong)} tensors are not as in the U-Net: {', '.join(wrong[:10])}",
            "Give the options of the U-Net it starts from.",
        )
    network.load_state_dict({**own, **{name: theirs[name] for name in shared}})
    return network


def _zero_convolution(dims: int, channels: int) -> nn.Sequential:
    layer = conv_nd(dims, channels, channels, 1)
    zero_(layer)
    return nn.Sequential(layer)

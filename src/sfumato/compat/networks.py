"""The original's network classes and constructors (Rombach et al. 2022) around this package's networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.build import copy_into
from sfumato.checkpoints.load import open_model
from sfumato.compat.distributions import DiagonalGaussianDistribution
from sfumato.errors import InputError, nearest
from sfumato.nn import autoencoder, vq
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.unet import UNet
from sfumato.nn.unet_config import UNetConfig

ModuleType = TypeVar("ModuleType", bound=nn.Module)
REQUIRED = ("ch", "out_ch", "num_res_blocks", "attn_resolutions", "in_channels", "resolution", "z_channels")
COMMITMENT = 0.25  # beta of the original's VectorQuantizer2
DDCONFIG = tuple(
    field.name for field in fields(AutoencoderConfig) if field.name not in ("embed_dim", "n_embed")
)


def view(module: nn.Module, kind: type[ModuleType]) -> ModuleType:
    """The same module under another class: parameters, buffers, hooks and mode are shared, not copied."""
    seen = kind.__new__(kind)
    seen.__dict__ = module.__dict__
    return seen


def autoencoder_config(
    ddconfig: Mapping[str, Any], embed_dim: int, n_embed: int | None = None
) -> AutoencoderConfig:
    """The configuration that the original's `ddconfig` table means.

    Raises `InputError` for a key that is missing or unknown.
    """
    options = {"ch_mult": (1, 2, 4, 8), **ddconfig}  # the default of the original's Encoder and Decoder
    if options.pop("use_linear_attn", False):
        options["attn_type"] = "linear"
    for name in options:
        if name not in DDCONFIG:
            raise InputError(f"ddconfig has no {name!r}", nearest(name, DDCONFIG))
    missing = [name for name in REQUIRED if name not in options]
    if missing:
        raise InputError(f"ddconfig lacks {', '.join(missing)}", "Take it whole from the model's yaml file.")
    options |= {name: tuple(options[name]) for name in ("ch_mult", "attn_resolutions")}
    return AutoencoderConfig(**options, embed_dim=embed_dim, n_embed=n_embed)


def restore(autoencoder: nn.Module, path: str | Path) -> None:
    """Give a first stage the weights of a file: of its own, or of a whole model.

    Raises `CheckpointError` for a file that cannot be read, has no first stage, or one of another shape.
    """
    found = open_model(path).module("autoencoder")
    copy_into(autoencoder, found.state_dict(), f"{path} does not fit {type(autoencoder).__name__}")


def to_nchw(pictures: Tensor) -> Tensor:
    """Pictures (b, h, w, c), or grey ones (b, h, w), as contiguous floats (b, c, h, w)."""
    pictures = pictures[..., None] if pictures.ndim == 3 else pictures
    return pictures.permute(0, 3, 1, 2).to(memory_format=torch.contiguous_format).float()


class Encoder(autoencoder.Encoder):
    """`ldm.modules.diffusionmodules.model.Encoder(**ddconfig)`; (b, c, H, W) -> moments before quant_conv."""

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__(autoencoder_config(ddconfig, embed_dim=1))


class Decoder(autoencoder.Decoder):
    """`ldm.modules.diffusionmodules.model.Decoder(**ddconfig)`; latents after post_quant_conv -> pictures.

    z_shape: of one latent at the configured resolution, (1, z_channels, h, w).
    """

    def __init__(self, **ddconfig: Any) -> None:
        config = autoencoder_config(ddconfig, embed_dim=1)
        super().__init__(config)
        side = config.resolution // config.downsampling
        self.z_shape = (1, config.z_channels, side, side)


class AutoencoderKL(autoencoder.AutoencoderKL):
    """`ldm.models.autoencoder.AutoencoderKL`, without the losses of its training.

    ddconfig: see `autoencoder_config`. ckpt_path: weights, see `restore`. lossconfig, ignore_keys, image_key
    and monitor are taken because configurations have them; training is `sfumato train`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any] | None = None,
        embed_dim: int = 4,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        monitor: str | None = None,
    ) -> None:
        super().__init__(autoencoder_config(ddconfig, embed_dim))
        if ckpt_path is not None:
            restore(self, ckpt_path)

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """The pictures `batch[k]`, (b, h, w, c) or (b, h, w), as contiguous floats (b, c, h, w)."""
        return to_nchw(batch[k])

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(b, c, H, W) in -1..1 -> the posterior over (b, embed_dim, H / f, W / f), not scaled."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original's second argument
        self, input: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """The reconstruction of a sample, or of the mode, and the posterior."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class VQModel(vq.VQModel):
    """`ldm.models.autoencoder.VQModel`, without the losses of its training: latents are codebook entries.

    Constructor as `AutoencoderKL`, with n_embed, the number of entries.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any] | None = None,
        n_embed: int = 8192,
        embed_dim: int = 3,
        ckpt_path: str | Path | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        monitor: str | None = None,
    ) -> None:
        super().__init__(autoencoder_config(ddconfig, embed_dim, n_embed))
        if ckpt_path is not None:
            restore(self, ckpt_path)

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """The pictures `batch[k]`, (b, h, w, c) or (b, h, w), as contiguous floats (b, c, h, w)."""
        return to_nchw(batch[k])

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """(b, c, H, W) in -1..1 -> latents (b, embed_dim, H / f, W / f) before the codebook."""
        return self.quant_conv(self.encoder(x))

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original's result
        self, x: Tensor
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantised latents, whose gradient is the latents'; the codebook's loss; (None, None, indices).

        indices: (b * h * w,) long.
        """
        latents = self.encode_to_prequant(x)
        indices = self.quantize.indices(latents)
        entries = self.quantize.lookup(indices)
        # The first term draws the encoder to the entries, the second, times beta, the entries to the encoder:
        # the order that taming's quantiser was released with (its "legacy").
        loss = F.mse_loss(entries.detach(), latents) + COMMITMENT * F.mse_loss(entries, latents.detach())
        return latents + (entries - latents).detach(), loss, (None, None, indices.flatten())

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]  # quantised already, in the original
        self, quant: Tensor
    ) -> Tensor:
        """Codebook entries (b, embed_dim, h, w) -> pictures (b, c, h * f, w * f), about -1..1."""
        return super().decode(quant, quantise=False)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Indices (b, h, w) long -> pictures."""
        return self.decode(self.quantize.lookup(code_b))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original's result
        self, input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The reconstruction and the codebook's loss."""
        quant, loss, _ = self.encode(input)
        return self.decode(quant), loss


class VQModelInterface(VQModel):
    """`ldm.models.autoencoder.VQModelInterface`: diffusion sees latents before the codebook."""

    def encode(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original's result
        self, x: Tensor
    ) -> Tensor:
        """(b, c, H, W) in -1..1 -> latents (b, embed_dim, H / f, W / f) before the codebook."""
        return self.encode_to_prequant(x)

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original's argument
        self, h: Tensor, force_not_quantize: bool = False
    ) -> Tensor:
        """Latents (b, embed_dim, h, w) -> pictures, through the codebook unless force_not_quantize."""
        return super().decode(h if force_not_quantize else self.quantize(h))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original inherits one that fails
        self, input: Tensor
    ) -> Tensor:
        """The reconstruction."""
        return self.decode(self.encode(input))


class IdentityFirstStage(nn.Module):
    """`ldm.models.autoencoder.IdentityFirstStage`: the first stage of a model in pixel space."""

    def encode(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """z as it is."""
        return z

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x


class UNetModel(UNet):
    """`ldm.modules.diffusionmodules.openaimodel.UNetModel`, with the options of its later versions.

    image_size: a note that no layer reads. use_checkpoint: recompute activations in the backward pass.
    use_fp16: without effect, here as there it is `convert_to_fp16` that converts; the dtype is the weights'.
    n_embed (prediction of codebook entries), num_attention_blocks and disable_middle_self_attn have no place
    in this U-Net: `InputError` unless they are left unset.
    """

    image_size: int | Sequence[int] | None = None

    def __init__(
        self,
        image_size: int | Sequence[int] | None,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
        num_groups: int = 32,
    ) -> None:
        refused = {
            "n_embed": n_embed,
            "num_attention_blocks": num_attention_blocks,
            "disable_middle_self_attn": disable_middle_self_attn or None,
        }
        for name, value in refused.items():
            if value is not None:
                raise InputError(f"{name} = {value}: this U-Net does without that option", "Leave it unset.")
        config = UNetConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            num_res_blocks=_number_or_tuple(num_res_blocks),
            attention_resolutions=tuple(attention_resolutions),
            dropout=dropout,
            channel_mult=tuple(channel_mult),
            conv_resample=conv_resample,
            dims=dims,
            num_classes=_classes(num_classes),
            adm_in_channels=adm_in_channels,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_spatial_transformer=use_spatial_transformer,
            transformer_depth=_number_or_tuple(transformer_depth),
            context_dim=_one_width(context_dim),
            use_linear_in_transformer=use_linear_in_transformer,
            use_new_attention_order=use_new_attention_order,
            legacy=legacy,
            num_groups=num_groups,
            disable_self_attentions=None
            if disable_self_attentions is None
            else tuple(disable_self_attentions),
        )
        super().__init__(config)
        self.image_size = image_size
        self.gradient_checkpointing = use_checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return next(self.parameters()).dtype

    @property
    def in_channels(self) -> int:
        """Channels of the sample, concatenated conditions included."""
        return self.config.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.config.out_channels

    @property
    def model_channels(self) -> int:
        """The base width."""
        return self.config.model_channels

    @property
    def num_classes(self) -> int | str | None:
        """Number of labels, or the kind of vector, that `y` is; None without."""
        return self.config.num_classes

    def convert_to_fp16(self) -> None:
        """Weights to float16."""
        self.half()

    def convert_to_fp32(self) -> None:
        """Weights to float32."""
        self.float()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the original calls the vector y
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Raw prediction (b, out_channels, *s) for samples (b, in_channels, *s) at timesteps (b,).

        context: (b, tokens, context_dim). y: (b,) long labels, or (b, adm_in_channels). Errors as `UNet`.
        """
        return super().forward(x, timesteps, context, y)


def _number_or_tuple(value: int | Sequence[int]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


def _one_width(width: int | Sequence[int] | None) -> int | None:
    """SDXL's configurations write the width of the context as a list of one, or one for each block."""
    if width is None or isinstance(width, int):
        return width
    if len(set(width)) != 1:
        raise InputError(f"context_dim is {list(width)}", "One width serves all transformer blocks here.")
    return width[0]


def _classes(value: int | str | None) -> Any:
    if isinstance(value, str) and value not in ("sequential", "continuous"):
        raise InputError(f"num_classes is {value!r}", nearest(value, ("sequential", "continuous")))
    return value

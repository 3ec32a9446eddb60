"""The original's `LatentDiffusion` (Rombach et al. 2022) around a loaded `StableDiffusion`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sfumato.compat.ddpm import DDPM
from sfumato.compat.distributions import DiagonalGaussianDistribution
from sfumato.compat.encoders import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder, labels
from sfumato.compat.networks import (
    AutoencoderKL,
    IdentityFirstStage,
    UNetModel,
    VQModelInterface,
    to_nchw,
    view,
)
from sfumato.errors import InputError, nearest
from sfumato.model import StableDiffusion
from sfumato.nn import autoencoder
from sfumato.nn.unet import UNet
from sfumato.nn.unet_config import UNetConfig

Condition: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor | Sequence[Tensor]] | None
"""What `apply_model` takes: a tensor, a list of them, or lists under c_concat, c_crossattn and c_adm."""

CONDITIONING: Mapping[str | None, tuple[str, ...]] = {  # DiffusionWrapper's keys, and what each reads
    None: (),
    "concat": ("c_concat",),
    "crossattn": ("c_crossattn",),
    "hybrid": ("c_concat", "c_crossattn"),
    "adm": ("c_crossattn",),
    "crossattn-adm": ("c_crossattn", "c_adm"),
    "hybrid-adm": ("c_concat", "c_crossattn", "c_adm"),
}


def conditioning_key(config: UNetConfig) -> str | None:
    """The original's word for how a U-Net is conditioned: a row of `CONDITIONING`."""
    concat, context = config.in_channels > config.out_channels, config.context_dim is not None
    key = "hybrid" if concat and context else "concat" if concat else "crossattn" if context else None
    if config.num_classes is None:
        return key
    return "adm" if key is None else f"{key}-adm"


class DiffusionWrapper(nn.Module):
    """The U-Net as `diffusion_model`, given its conditions by the original's names.

    conditioning_key: a row of `CONDITIONING`, `InputError` for another.
    """

    def __init__(self, unet: UNet, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING:
            known = [str(key) for key in CONDITIONING]
            raise InputError(
                f"there is no conditioning_key {conditioning_key!r}", nearest(str(conditioning_key), known)
            )
        self.diffusion_model = view(unet, UNetModel)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """Raw prediction like x, (b, c, h, w), at t, (b,) long.

        c_concat: latents joined to the channels of x; c_crossattn: contexts (b, tokens, width), joined along
        the tokens, or the labels (b,) of an "adm" model; c_adm: (b, width). `InputError` where one that the
        model reads is missing, or one that it does not read is given.
        """
        given = {"c_concat": c_concat, "c_crossattn": c_crossattn, "c_adm": c_adm}
        needed = CONDITIONING[self.conditioning_key]
        for name, value in given.items():
            if (value is not None) != (name in needed):
                wanted = " and ".join(needed) or "no condition"
                raise InputError(
                    f"{name} was {'not ' if value is None else ''}given; the model's conditioning_key is "
                    f"{self.conditioning_key!r}",
                    f"It takes {wanted}.",
                )
        if c_concat is not None:
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key == "adm":
            assert c_crossattn is not None
            return self.diffusion_model(x, t, y=c_crossattn[0])
        context = None if c_crossattn is None else torch.cat(list(c_crossattn), dim=1)
        return self.diffusion_model(x, t, context=context, y=c_adm)


class LatentDiffusion(DDPM):
    """The model object that the original's scripts work with: `LatentDiffusion(sfumato.load(path))`.

    It shares its networks with `model`: moving or training one moves and trains the other. The state dict
    has the original's names. Methods that encode and decode need no gradient, but for
    `differentiable_decode_first_stage`.
    """

    def __init__(self, model: StableDiffusion) -> None:
        super().__init__(model.schedule, model.prediction)
        config, unet = model.config, model.unet.config
        self.source = model
        self.model = DiffusionWrapper(model.unet, conditioning_key(unet))
        self.first_stage_model = first_stage(model)
        self.cond_stage_model = cond_stage(model)
        if self.cond_stage_model is None and self.model.conditioning_key == "concat":
            self.cond_stage_model = self.first_stage_model  # the original's "__is_first_stage__"
        self.scale_factor = model.latent_scale
        self.channels = unet.out_channels
        self.image_size = config.image_size[0] // model.downsampling
        self.first_stage_key = "image"
        self.cond_stage_key = "txt" if config.text else "caption" if config.bert else "class_label"
        self.cond_stage_trainable = False
        self.num_timesteps_cond = 1
        self.clip_denoised = False
        self.log_every_t = 100

    def get_learned_conditioning(self, c: Any) -> Any:
        """What the network is conditioned on, from a prompt, a list of them, or {"class_label": labels (b,)}.

        Text gives (b, tokens, width), (b, 77, 768) for Stable Diffusion 1, and a dict for SDXL; labels give
        (b, 1, width), or themselves where the U-Net embeds them; models conditioned on a picture alone take
        one, (b, c, H, W). `InputError` for another kind than the model's, and for a model without conditions.
        """
        if self.cond_stage_model is not None:
            found = getattr(self.cond_stage_model, "encode", self.cond_stage_model)(c)
            return found.mode() if isinstance(found, autoencoder.DiagonalGaussian) else found
        if self.model.conditioning_key == "adm":
            return labels(c, self.cond_stage_key)
        raise InputError(f"{self.source.name!r} has no conditions", "Give apply_model None.")

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Pictures (b, c, H, W) in -1..1 -> their posterior, not scaled; a tensor for VQ and pixel models."""
        return self.first_stage_model.encode(self._placed(x))

    def get_first_stage_encoding(
        self,
        encoder_posterior: autoencoder.DiagonalGaussian | Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scaled latents: of a posterior a sample, drawn by `generator` or torch's global one."""
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        return self.scale_factor * encoder_posterior.sample(generator)

    @torch.no_grad()
    def decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """Scaled latents (b, z, h, w) -> pictures (b, c, h * f, w * f), about -1..1 and not clamped.

        force_not_quantize: VQ models decode the latents as they are. predict_cids is `InputError` if set.
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """`decode_first_stage` that gradients pass through."""
        if predict_cids:
            raise InputError("predict_cids is set; no U-Net here predicts codebook entries", "Leave it out.")
        latents = self._placed(z / self.scale_factor)
        if isinstance(self.first_stage_model, VQModelInterface):
            return self.first_stage_model.decode(latents, force_not_quantize)
        return self.first_stage_model.decode(latents)

    def quantize_first_stage(self, z: Tensor) -> Tensor:
        """Each latent of z replaced by its nearest codebook entry; `InputError` for a model without one."""
        if not isinstance(self.first_stage_model, VQModelInterface):
            raise InputError(f"{self.source.name!r} has no codebook", "Leave quantize_x0 out.")
        return self.first_stage_model.quantize(z)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition, return_ids: bool = False) -> Tensor:
        """Raw prediction like x_noisy (b, c, h, w), in the number format of the weights, at t, (b,) long.

        cond: a tensor or list, read as the model's conditioning_key says; or a dict of c_concat, c_crossattn
        and c_adm; None without a condition. return_ids is taken and ignored. Errors as `DiffusionWrapper`.
        """
        given: dict[str, Any] = {}
        if isinstance(cond, Mapping):
            for name, value in cond.items():
                if name not in ("c_concat", "c_crossattn", "c_adm"):
                    raise InputError(
                        f"there is no condition {name!r}", nearest(name, ("c_concat", "c_crossattn", "c_adm"))
                    )
                given[name] = value
        elif cond is not None:
            given["c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"] = cond
        for name, value in given.items():
            if name == "c_adm":
                given[name] = self._placed(value)
            else:
                parts = [value] if isinstance(value, Tensor) else value
                given[name] = [self._placed(part) for part in parts]
        return self.model(self._placed(x_noisy), t.to(self.device), **given)

    def get_input(self, batch: Mapping[str, Any], k: str) -> list[Any]:
        """[scaled latents, condition] of a training batch whose pictures `batch[k]` are (b, h, w, c)."""
        posterior = self.encode_first_stage(to_nchw(batch[k]))
        condition = None
        if self.model.conditioning_key is not None:
            own = batch if self.cond_stage_key == "class_label" else batch[self.cond_stage_key]
            condition = self.get_learned_conditioning(own)
        return [self.get_first_stage_encoding(posterior), condition]

    def _placed(self, x: Tensor) -> Tensor:
        """x on the device and, unless it holds integers, in the number format of the weights."""
        return x.to(self.device, self.model.diffusion_model.dtype if x.is_floating_point() else None)


def first_stage(model: StableDiffusion) -> AutoencoderKL | VQModelInterface | IdentityFirstStage:
    """The original's class around the model's autoencoder, or around none in pixel space."""
    if model.autoencoder is None:
        return IdentityFirstStage()
    vq = model.autoencoder.config.n_embed is not None
    return view(model.autoencoder, VQModelInterface if vq else AutoencoderKL)


def cond_stage(model: StableDiffusion) -> nn.Module | None:
    """The original's class around what encodes the model's conditions; None without."""
    if model.classes is not None:
        return view(model.classes, ClassEmbedder)
    if model.bert is not None:
        return BERTEmbedder(model)
    return None if model.text_encoder is None else FrozenCLIPEmbedder(model)


def join(first: Condition, second: Condition) -> Condition:
    """Two conditions of one kind along the sample axis; `InputError` for two of different kinds."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        joined = {name: join(first[name], second[name]) for name in first}
        return joined  # pyright: ignore[reportReturnType]  # no value of a condition is a mapping
    if isinstance(first, Sequence) and isinstance(second, Sequence) and len(first) == len(second):
        return [torch.cat([a, b]) for a, b in zip(first, second, strict=True)]
    raise InputError(
        "conditioning and unconditional_conditioning are of different kinds",
        "Give both as tensors, as lists of equal length, or as dicts with equal keys.",
    )

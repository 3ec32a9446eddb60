"""A latent diffusion model as one object: its parts, and the ways between prompts, pictures and latents."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import load_file
from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor, paired
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig
from sfumato.runtime import resolve_device, resolve_dtype
from sfumato.text.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "assets" / "illustrations.safetensors"


class StableDiffusion:
    """U-Net, autoencoder (None: pixel space), text encoder (None: no prompts), schedule and prediction.

    `latent_scale` multiplies latents on their way into the U-Net; `defaults` are the request fields the model
    draws best with; `digest` is the sha256 of the file it came from, None for a model built in memory.
    Raises `InputError` for parts that do not fit together.
    """

    def __init__(
        self, config: ModelConfig, modules: Mapping[str, nn.Module], digest: str | None = None
    ) -> None:
        if "unet" not in modules:
            raise CheckpointError(
                f"{config.name!r} has no U-Net: it is an autoencoder alone",
                "Give the file of a diffusion run.",
            )
        self.config = config
        self.unet = cast(UNet, modules["unet"])
        self.autoencoder = cast(AutoencoderKL | None, modules.get("autoencoder"))
        self.text_encoder = cast(CLIPTextEncoder | None, modules.get("text"))
        self.tokenizer = None if config.tokenizer is None else Tokenizer.from_json(config.tokenizer)
        self.schedule = Schedule(config.schedule)
        self.prediction = paired(config.prediction, self.schedule).name
        self.latent_scale = config.latent_scale
        self.defaults: Mapping[str, Any] = config.defaults
        self.name = config.name
        self.digest = digest
        self._check_parts()

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def image_size(self) -> tuple[int, ...]:
        """Pixels it was trained at: (height, width), or (length,) or (depth, height, width)."""
        return self.config.image_size

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each resampled side."""
        return 1 if self.autoencoder is None else self.autoencoder.downsampling

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(channels, ...) of the U-Net's sample for a picture; `InputError` names the nearest that works.

        1-D models read `width` as their length, 3-D models take their depth from `image_size`.
        """
        dims, channels = self.unet.config.dims, self.unet.config.out_channels
        factor = self.downsampling * self.unet.config.downsampling
        sides = (width,) if dims == 1 else (height, width)
        good = tuple(max(1, round(side / factor)) * factor for side in sides)
        if good != sides:
            raise InputError(
                f"this model cannot draw {'x'.join(str(side) for side in reversed(sides))} pixels; "
                f"sides must be multiples of {factor}",
                f"The nearest size is {'x'.join(str(side) for side in reversed(good))} (width x height).",
            )
        depth = self.image_size[:1] if dims == 3 else ()
        return (channels, *depth, *(side // self.downsampling for side in sides))

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> Conditioning:
        """Token-wise text features: `.context` is (b, tokens, width). Text beyond the context is cut."""
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError(f"{self.name!r} has no text encoder", "Leave the prompt out.")
        tokens, _ = self.tokenizer.batch(prompts, self.text_encoder.config.max_position_embeddings)
        return Conditioning(context=self.text_encoder(tokens.to(self.device)).last_hidden_state)

    def prompt_cuts(self, prompts: list[str]) -> list[str]:
        """For each prompt the words that do not fit into the context, "" where all do."""
        if self.text_encoder is None or self.tokenizer is None:
            return ["" for _ in prompts]
        return self.tokenizer.batch(prompts, self.text_encoder.config.max_position_embeddings)[1]

    def uncondition(self, count: int) -> Conditioning:
        """The condition of "nothing asked for": the empty prompt, or none without a text encoder."""
        return Conditioning() if self.text_encoder is None else self.encode_prompt([""] * count)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (b, c, h, w) in -1..1 -> scaled latents (b, z, h/f, w/f); themselves in pixel space."""
        images = images.to(self.device, self.dtype)
        if self.autoencoder is None:
            return images
        return self.autoencoder.encode(images).mode() * self.latent_scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, z, h, w) -> pictures (b, c, h*f, w*f), about -1..1; the same in pixel space."""
        if self.autoencoder is None:
            return latents
        return self.autoencoder.decode((latents / self.latent_scale).to(self.device, self.dtype)).float()

    def network(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network seam: x (b, c, ...), t (b,), conditions -> raw prediction like x."""
        cond = cond.to(x.device, x.dtype)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)
        return self.unet(x, t, context=cond.context, vector=cond.vector)

    def predictor(self) -> Predictor:
        """The model as a conditional denoiser P(x, sigma, cond) -> x0."""
        return Predictor(self.network, self.schedule, self.prediction, self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """Move every part, in place; returns itself."""
        for module in self._modules():
            module.to(device, dtype)
        return self

    def float32(self) -> StableDiffusion:
        """A copy that computes in float32, for stages that left the finite numbers in a narrower type."""
        other = copy.copy(self)
        for name in ("unet", "autoencoder", "text_encoder"):
            module = getattr(self, name)
            setattr(other, name, None if module is None else copy.deepcopy(module).float())
        return other

    def _check_parts(self) -> None:
        unet, text = self.unet.config, self.text_encoder and self.text_encoder.config
        if self.autoencoder and self.autoencoder.config.embed_dim != unet.out_channels:
            raise InputError(
                f"the U-Net has {unet.out_channels} channels, latents {self.autoencoder.config.embed_dim}",
                "Set unet.out_channels to the autoencoder's embed_dim.",
            )
        if text and unet.context_dim != text.hidden_size:
            raise InputError(
                f"unet.context_dim is {unet.context_dim}, text.hidden_size {text.hidden_size}",
                "Make them equal.",
            )
        if text and (self.tokenizer is None or self.tokenizer.vocab_size > text.vocab_size):
            size = "no" if self.tokenizer is None else self.tokenizer.vocab_size
            raise InputError(
                f"the tokenizer has {size} tokens, the text encoder {text.vocab_size}",
                "Give the tokenizer that the text encoder was trained with.",
            )

    def _modules(self) -> Sequence[nn.Module]:
        return [module for module in (self.unet, self.autoencoder, self.text_encoder) if module is not None]


def load(
    source: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> StableDiffusion:
    """Load a model file, or `model.safetensors` in a folder; None is the embedded model.

    It computes in float32 on a CPU and float16 on cuda unless `dtype` says otherwise.
    Raises `CheckpointError` where the file is missing, damaged or of another architecture.
    """
    path = EMBEDDED if source is None else Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    target = resolve_device(device)
    wanted = resolve_dtype(dtype, target)
    file = load_file(path, wanted)
    try:
        model = StableDiffusion(file.config, file.modules, file.digest)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # no schedule, other parts
        raise CheckpointError(f"{path} describes no model: {error}", "Get the file again.") from error
    return model.to(target, wanted)

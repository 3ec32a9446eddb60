"""A latent diffusion model as one object: its parts, and the ways between prompts, pictures and latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import open_model
from sfumato.conditioned import Conditioned
from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor, paired
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.bert import BERTEmbedder
from sfumato.nn.classes import ClassEmbedder
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.preview import PreviewDecoder
from sfumato.nn.tiled import decode_tiled, encode_tiled
from sfumato.nn.unet import Patch, UNet, UNetConfig
from sfumato.nn.vq import VQModel
from sfumato.presets import (
    PARTS,
    ModelConfig,
    check_parts,
    check_tokenizer,
)
from sfumato.runtime import resolve_device, resolve_dtype


@dataclass(frozen=True)
class Tiles:
    """Whether an autoencoder runs in parts, see `nn.tiled`; wrap: whether (y, x) are circles."""

    mode: Literal["none", "exact", "fast"] = "none"
    wrap: tuple[bool, bool] = (False, False)


WHOLE = Tiles()
EMBEDDED = Path(__file__).parent / "assets" / "illustrations.safetensors"


class StableDiffusion(Conditioned):
    """The parts that its config describes, each loaded when first used; schedule and prediction.

    modules: the networks by name ("unet", "autoencoder", "text", "text2", "bert", "classes", "preview"), a
    mapping that may build a part when it is asked for it; here only its names are read. Without an
    autoencoder it draws pixels. `latent_scale` multiplies latents on their way into the U-Net; `defaults` are
    the request fields the model draws best with; `digest` is the sha256 of the file it came from, or finds it
    out when first asked; None for a model built in memory. Raises `InputError` for parts that do not fit
    together.
    """

    def __init__(
        self,
        config: ModelConfig,
        modules: Mapping[str, nn.Module],
        digest: str | Callable[[], str | None] | None = None,
    ) -> None:
        names = set(modules)  # by iteration: a mapping may build what it is asked for, even by `in`
        if "unet" not in names:
            raise CheckpointError(
                f"{config.name!r} has no U-Net: it is an autoencoder alone",
                "Give the file of a diffusion run.",
            )
        described = {part for part in PARTS if getattr(config, part) is not None}
        if described != names:
            raise InputError(
                f"the config of {config.name!r} describes {', '.join(sorted(described))}; "
                f"given are {', '.join(sorted(names))}",
                "Give a config with those parts.",
            )
        self.config = config
        self._build: Callable[[str], nn.Module] = modules.__getitem__
        self._built: dict[str, nn.Module] = {}
        self._target: tuple[torch.device, torch.dtype] | None = None
        self._digest = digest
        self.schedule = Schedule(config.schedule)
        self.prediction = paired(config.prediction, self.schedule).name
        self.latent_scale = config.latent_scale
        self.defaults: Mapping[str, Any] = config.defaults
        self.name = config.name
        check_parts(config)
        check_tokenizer(config, lambda: self.tokenizer)

    # What it is made of

    def part(self, name: str) -> nn.Module | None:
        """A part, built and moved to the model's device when first asked for; None where there is none."""
        if getattr(self.config, name) is None:
            return None
        if name not in self._built:
            module = self._build(name)
            self._built[name] = module if self._target is None else module.to(*self._target)
        return self._built[name]

    @property
    def unet(self) -> UNet:
        """The denoising network."""
        return cast(UNet, self.part("unet"))

    @property
    def autoencoder(self) -> AutoencoderKL | VQModel | None:
        """The first stage, None in pixel space."""
        return cast(AutoencoderKL | VQModel | None, self.part("autoencoder"))

    @property
    def preview_decoder(self) -> PreviewDecoder | None:
        """The tiny decoder that `preview_latents` takes, where the model has one."""
        return cast(PreviewDecoder | None, self.part("preview"))

    @property
    def text_encoder(self) -> CLIPTextEncoder | None:
        """CLIP's text transformer; SDXL's first."""
        return cast(CLIPTextEncoder | None, self.part("text"))

    @property
    def text_encoder2(self) -> CLIPTextEncoder | None:
        """SDXL's second text transformer."""
        return cast(CLIPTextEncoder | None, self.part("text2"))

    @property
    def bert(self) -> BERTEmbedder | None:
        """The text transformer of LDM's 1.45 B model."""
        return cast(BERTEmbedder | None, self.part("bert"))

    @property
    def classes(self) -> ClassEmbedder | None:
        """The table of classes, for models conditioned on them through their context."""
        return cast(ClassEmbedder | None, self.part("classes"))

    @property
    def digest(self) -> str | None:
        """sha256 of the file it came from, None for a model built in memory."""
        if callable(self._digest):
            self._digest = self._digest()
        return self._digest

    @property
    def device(self) -> torch.device:
        return self._placed()[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._placed()[1]

    def _placed(self) -> tuple[torch.device, torch.dtype]:
        if self._target is not None and "unet" not in self._built:
            return self._target
        parameter = next(self.unet.parameters())
        return parameter.device, parameter.dtype

    @property
    def image_size(self) -> tuple[int, ...]:
        """Pixels it was trained at: (height, width), or (length,) or (depth, height, width)."""
        return self.config.image_size

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each resampled side."""
        return 1 if self.config.autoencoder is None else self.config.autoencoder.downsampling

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(channels, ...) of the U-Net's sample for a picture; `InputError` names the nearest that works.

        1-D models read `width` as their length, 3-D models take their depth from `image_size`.
        """
        unet = cast(UNetConfig, self.config.unet)
        dims, channels = unet.dims, unet.out_channels
        factor = self.downsampling * unet.downsampling
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
    def encode_image(self, images: Tensor, tiles: Tiles = WHOLE) -> Tensor:
        """Pictures (b, c, h, w) in -1..1 -> scaled latents (b, z, h/f, w/f); themselves in pixel space."""
        images = images.to(self.device, self.dtype)
        if self.autoencoder is None:
            return images
        if tiles.mode == "none":
            return self.autoencoder.encode(images).mode() * self.latent_scale
        return encode_tiled(self.autoencoder, images, tiles.mode, wrap=tiles.wrap).mode() * self.latent_scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, tiles: Tiles = WHOLE) -> Tensor:
        """Scaled latents (b, z, h, w) -> pictures (b, c, h*f, w*f), about -1..1; the same in pixel space."""
        if self.autoencoder is None:
            return latents
        latents = (latents / self.latent_scale).to(self.device, self.dtype)
        if tiles.mode == "none":
            return self.autoencoder.decode(latents).float()
        return decode_tiled(self.autoencoder, latents, tiles.mode, wrap=tiles.wrap).float()

    @torch.no_grad()
    def preview_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (b, z, h, w), as a step's `denoised` -> pictures to watch (b, c, ...) in -1..1.

        By the model's preview decoder; without, by its matrix to colours, at the latents' own size; without
        both by the autoencoder, which costs what the last picture does. In pixel space the same.
        """
        matrix = self.config.latent_rgb
        if self.preview_decoder is not None:
            return self.preview_decoder(latents.to(self.device, self.dtype)).float().clamp(-1, 1)
        if matrix is None:
            return self.decode_latents(latents).clamp(-1, 1)
        *weights, constant = torch.tensor(matrix, device=latents.device)
        colours = torch.einsum("bz...,zc->bc...", latents.float(), torch.stack(weights))
        return (colours + constant.view(-1, *[1] * (latents.ndim - 2))).clamp(-1, 1)

    def network(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        patch: Patch | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """The network seam: x (b, c, ...), t (b,), conditions -> raw prediction like x.

        residuals: what control networks add to the U-Net's skip connections and its middle.
        """
        self.check_pictures(cond)
        cond = cond.to(x.device, x.dtype)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)
        return self.unet(x, t, context=cond.context, vector=cond.vector, patch=patch, residuals=residuals)

    def predictor(self, patch: Patch | None = None) -> Predictor:
        """The model as a conditional denoiser P(x, sigma, cond) -> x0; `patch`: see `sfumato.nn.patches`."""
        network = self.network if patch is None else partial(self.network, patch=patch)
        return Predictor(network, self.schedule, self.prediction, self.dtype)

    def check_pictures(self, cond: Conditioning) -> None:
        """`InputError` where the model is conditioned on a picture and `cond.concat` is not there."""
        unet = cast(UNetConfig, self.config.unet)
        wanted = unet.in_channels - unet.out_channels
        if wanted > 0 and cond.concat is None:
            raise InputError(
                f"{self.name!r} needs a picture to start from: {wanted} more channels beside the sample's "
                f"{unet.out_channels}, as inpainting and editing models have",
                f"Give them as Conditioning.concat (b, {wanted}, ...), or take a model that draws from text.",
            )

    def to(self, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """Move every part, in place, those not loaded yet as soon as they are; returns itself."""
        self._target = (device, dtype)
        for module in self._built.values():
            module.to(device, dtype)
        return self

    def float32(self) -> StableDiffusion:
        """A copy that computes in float32, for stages that left the finite numbers in a narrower type.

        A part is copied when it is first used.
        """
        other = copy.copy(self)
        other._built = {}
        other._build = lambda name: copy.deepcopy(cast(nn.Module, self.part(name))).float()
        other._target = (self.device, torch.float32)
        return other


def load(
    source: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
    ema: bool = False,
    offline: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    vocab: str | Path | None = None,
    mmap: bool = True,
) -> StableDiffusion:
    """Load a model; None is the embedded one.

    source: a file of any format and layout, a diffusers folder, the folder of a training run, or a name on
    the Hugging Face hub ("org/name", "org/name/file"), which is fetched once; `offline` asks the hub's cache
    alone, `revision` is a branch, tag or commit there.
    device, dtype: what it computes on and in; a CPU takes float32 whatever the file has, cuda float16.
    vae: the autoencoder of another model, instead of its own. prediction: "eps", "v" or "x0", where the file
    does not say or says it wrong. ema: the averaged weights beside those of training, where there are both.
    variant: which of a folder's sets of weights, as "fp16". vocab: BERT's vocab.txt (a path, or a name on the
    hub), for LDM's 1.45 B model.
    mmap: False copies the weights, for servers: where a file is cut off while it is mapped, the process ends.

    Names and shapes are checked now; each network is read when it is first used. Raises `CheckpointError`,
    naming file, tensor and cause, for what is missing, damaged or of another architecture, then or now;
    `ResourceError` where the hub cannot be reached.
    """
    target = resolve_device(device)
    wanted = resolve_dtype(dtype, target)
    path = EMBEDDED if source is None else source
    file = open_model(
        path, vae=vae, prediction=prediction, ema=ema, offline=offline, revision=revision,
        variant=variant, vocab=vocab, mmap=mmap, dtype=wanted, device=target,
    )  # fmt: skip
    try:
        model = StableDiffusion(file.config, file.modules, lambda: file.digest)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # no schedule, other parts
        raise CheckpointError(f"{path} describes no model: {error}", "Get the file again.") from error
    return model.to(target, wanted)

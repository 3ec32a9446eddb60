"""A latent diffusion model as one object: its parts, and the ways between prompts, pictures and latents."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.checkpoints.load import open_model
from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import Predictor, paired
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.bert import BERTEmbedder
from sfumato.nn.classes import ClassEmbedder
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import Patch, UNet, UNetConfig
from sfumato.nn.vq import VQModel
from sfumato.presets import (
    PARTS,
    ModelConfig,
    check_parts,
    check_tokenizer,
    context_width,
    num_classes,
)
from sfumato.runtime import resolve_device, resolve_dtype
from sfumato.text import encode
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.wordpiece import WordPiece

EMBEDDED = Path(__file__).parent / "assets" / "illustrations.safetensors"


class StableDiffusion:
    """The parts that its config describes, each loaded when first used; schedule and prediction.

    modules: the networks by name ("unet", "autoencoder", "text", "text2", "bert", "classes"), a mapping that
    may build a part when it is asked for it; here only its names are read. Without an autoencoder it draws
    pixels. `latent_scale` multiplies latents on their way into the U-Net; `defaults` are the request fields
    the model draws best with; `digest` is the sha256 of the file it came from, or finds it out when first
    asked; None for a model built in memory. Raises `InputError` for parts that do not fit together.
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

    @cached_property
    def tokenizer(self) -> Tokenizer | WordPiece | None:
        """The text encoder's tokenizer."""
        return None if self.config.tokenizer is None else encode.read_tokenizer(self.config.tokenizer)

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
    def encode_prompt(
        self,
        prompts: list[str],
        clip_skip: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        dialect: encode.Dialect | None = None,
        vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Conditioning:
        """Token-wise text features: `.context` is (b, tokens, width). Text beyond the context is cut.

        dialect: reads weights in the prompts, "a1111" or "comfyui", and takes texts of any length, in rows of
        the context's; None takes the words as they stand. vectors: the textual inversions that prompts of a
        dialect may name, for each of "text" and "text2" (n, width).
        clip_skip: the layer of CLIP from the end, 1 the last (AUTOMATIC1111's numbering); None is the model's
        own, 1 but for SDXL's 2. size, original, crop: for SDXL's `.vector`, (height, width) in pixels of the
        picture and of what it was made from, (top, left) of what was cut off; None is `image_size`, and
        `size`. Raises `InputError` without a text encoder, its tokenizer, or such a layer.
        """
        config, tokenizer = self.config, self.tokenizer
        if config.bert is not None:
            return self._encode_wordpieces(prompts, clip_skip)
        if self.text_encoder is None or not isinstance(tokenizer, Tokenizer):
            raise InputError(f"{self.name!r} has no text encoder", "Leave the prompt out.")
        skip = config.clip_skip if clip_skip is None else clip_skip
        if dialect is not None:
            second = self.text_encoder2
            encoders = [self.text_encoder] if second is None else [self.text_encoder, second]
            parts = ("text", "text2")[: len(encoders)]
            own = {name: [given[part] for part in parts] for name, given in (vectors or {}).items()}
            sizes = None if second is None else self._sizes(size, original, crop)
            normed = config.text_normed
            return encode.encode_weighted(prompts, tokenizer, encoders, skip, normed, sizes, dialect, own)
        if self.text_encoder2 is None:
            return encode.encode_prompts(
                prompts, tokenizer, self.text_encoder, skip, config.text_normed
            ).conditioning
        towers, sizes = (self.text_encoder, self.text_encoder2), self._sizes(size, original, crop)
        return encode.encode_two_towers(
            prompts, tokenizer, towers, sizes, skip, config.text_normed
        ).conditioning

    def prompt_cuts(self, prompts: list[str]) -> list[str]:
        """For each prompt the words that do not fit into the context, "" where all do."""
        if self.tokenizer is None or (tokens := self._tokens()) is None:
            return ["" for _ in prompts]
        return self.tokenizer.batch(prompts, tokens)[1]

    @torch.no_grad()
    def encode_label(self, labels: list[int]) -> Conditioning:
        """Numbered classes, as `.context` (b, 1, width) or as `.vector` (b,), as the model takes them.

        Raises `InputError` for a class that it does not have.
        """
        count = num_classes(self.config)
        for label in labels:
            if count is None or not 0 <= label < count:
                most = "none" if count is None else f"0 to {count - 1}"
                raise InputError(
                    f"the label is {label}; {self.name!r} has labels: {most}", "Change the label."
                )
        numbers = torch.tensor(labels, device=self.device)
        table = self.classes
        return Conditioning(vector=numbers) if table is None else Conditioning(context=table(numbers))

    def uncondition(
        self,
        count: int,
        clip_skip: int | None = None,
        zeros: bool | None = None,
        *,
        size: tuple[int, int] | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> Conditioning:
        """The condition of "nothing asked for": the empty prompt, "no class", or none where there is neither.

        zeros: all zeros for the empty prompt, as SDXL was trained; None is the model's own choice. The rest
        is that of `encode_prompt`.
        """
        config = self.config
        if config.classes is not None:
            last = config.classes.n_classes - 1
            return self.encode_label([last] * count) if config.classes.unconditional else Conditioning()
        if config.text is None and config.bert is None:
            return Conditioning()
        if not (config.zeros_for_empty if zeros is None else zeros):
            return self.encode_prompt([""] * count, clip_skip, size=size, original=original, crop=crop)
        tokens, width = cast(int, self._tokens()), cast(int, context_width(config))
        context, vector = torch.zeros(count, tokens, width, device=self.device, dtype=self.dtype), None
        if config.text2 is not None:
            numbers = self._sizes(size, original, crop).vector().expand(count, -1)
            vector = torch.cat([torch.zeros(count, config.text2.pooled_size), numbers], dim=1)
            vector = vector.to(self.device)
        return Conditioning(context, vector)

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

    def network(self, x: Tensor, t: Tensor, cond: Conditioning, patch: Patch | None = None) -> Tensor:
        """The network seam: x (b, c, ...), t (b,), conditions -> raw prediction like x."""
        self.check_pictures(cond)
        cond = cond.to(x.device, x.dtype)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat], dim=1)
        return self.unet(x, t, context=cond.context, vector=cond.vector, patch=patch)

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

    def _encode_wordpieces(self, prompts: list[str], clip_skip: int | None) -> Conditioning:
        if not isinstance(self.tokenizer, WordPiece) or self.bert is None:
            raise InputError(
                f"{self.name!r} reads prompts with BERT's vocabulary, which its file does not hold",
                "Give the vocab.txt of bert-base-uncased: load(..., vocab=) or --vocab.",
            )
        if clip_skip not in (None, 1):
            raise InputError(
                f"clip_skip is {clip_skip}; the text encoder of {self.name!r} is not CLIP", "Leave it out."
            )
        return encode.encode_wordpieces(prompts, self.tokenizer, self.bert).conditioning

    def _sizes(
        self, size: tuple[int, int] | None, original: tuple[int, int] | None, crop: tuple[int, int]
    ) -> encode.Sizes:
        height, width = self.image_size[-2:] if size is None else size
        return encode.Sizes((height, width), original, crop)

    def _tokens(self) -> int | None:
        """Tokens in a row of the text encoder, None without one."""
        text, bert = self.config.text, self.config.bert
        return text.max_position_embeddings if text else bert.max_seq_len if bert else None


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

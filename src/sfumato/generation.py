"""From a request to pictures, the one path of every kind of generation (Rombach et al. 2022, section 3)."""

from __future__ import annotations

import bisect
import hashlib
import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from sfumato import __version__, images
from sfumato.checkpoints.files import read_tensors
from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Denoiser, Predictor
from sfumato.diffusion.samplers import SAMPLERS, Step, sampler
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.spacing import spacing
from sfumato.errors import InputError, NumericalError
from sfumato.presets import ModelConfig, num_classes
from sfumato.request import Request, input_error

DEFAULTS: Mapping[str, Any] = {  # where neither the request nor the model says
    "steps": 25,
    "sampler": "dpmpp_2m",
    "guidance": 7.5,  # Stable Diffusion v1, scripts/txt2img.py --scale
}


class Model(Protocol):
    """What generation asks of a model; `sfumato.StableDiffusion` is one."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def defaults(self) -> Mapping[str, Any]: ...
    @property
    def image_size(self) -> tuple[int, ...]: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def schedule(self) -> Schedule: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def encode_prompt(
        self,
        prompts: list[str],
        clip_skip: int | None = None,
        *,
        size: tuple[int, int] | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> Conditioning: ...
    def prompt_cuts(self, prompts: list[str]) -> list[str]: ...
    def encode_label(self, labels: list[int]) -> Conditioning: ...
    def uncondition(
        self,
        count: int,
        clip_skip: int | None = None,
        zeros: bool | None = None,
        *,
        size: tuple[int, int] | None = None,
        original: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> Conditioning: ...
    def check_pictures(self, cond: Conditioning) -> None: ...
    def predictor(self) -> Predictor: ...
    def decode_latents(self, latents: Tensor) -> Tensor: ...
    def float32(self) -> Model: ...


@dataclass
class Notes:
    """What a run has to tell: warnings for people, and the stages that were repeated in float32."""

    warnings: list[str] = field(default_factory=list)
    float32_retries: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What was drawn.

    images: one PIL picture each, or a preview where samples are no pictures (1-D, 3-D, other channels).
    samples: (n, c, ...) in about -1..1. latents: (n, z, ...) before decoding. parameters: for each picture
    all that it takes to draw it again. seconds: wall-clock time.
    """

    images: list[Image.Image]
    samples: Tensor
    latents: Tensor
    parameters: list[dict[str, Any]]
    warnings: list[str]
    seconds: float

    @property
    def are_pictures(self) -> bool:
        """Whether the samples are pictures; if not, the samples themselves are what to keep."""
        return self.samples.ndim == 4 and self.samples.shape[1] in images.MODES


def generate(model: Model, request: Request) -> Result:
    """Draw `request.num_images` pictures.

    Raises `InputError` for what this model cannot take, `NumericalError` naming stage and step where values
    are not finite in float32 either.
    """
    started, notes = time.perf_counter(), Notes()
    request = complete(model, request)
    *_, last = stream(model, request, notes)
    return finish(model, request, last, notes, time.perf_counter() - started)


def stream(model: Model, request: Request, notes: Notes | None = None) -> Iterator[Step]:
    """The steps of a generation, computed as they are iterated: stop to cancel. Errors as `generate`.

    Warnings go to `notes`, or to Python's `warnings` without one. `finish` turns the last step into pictures.
    """
    told = Notes() if notes is None else notes
    request = complete(model, request)
    assert request.seed is not None
    positive, negative = _conditions(model, request, told)
    for text in told.warnings if notes is None else ():
        warnings.warn(text, stacklevel=2)
    seeds = [request.seed + index for index in range(request.num_images)]
    return _steps(model, request, positive, negative, seeds, told)


def draw(model: Model, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Samples (n, c, ...), about -1..1, of many prompts in one batch, each with its seed, else by default."""
    request, notes = complete(model, Request(prompt="", num_images=len(prompts))), Notes()
    rows = [_encoded(model, request, prompt, notes) for prompt in prompts]
    negative = _encoded(model, request, None, notes).repeat(len(prompts))
    *_, last = _steps(model, request, concatenate(rows), negative, seeds, notes)
    return _decoded(model, request, _latents(last), notes)


@torch.no_grad()
def finish(model: Model, request: Request, last: Step, notes: Notes, seconds: float) -> Result:
    """The pictures of the last step of `stream(model, request, notes)`, for a request from `complete`."""
    started = time.perf_counter()
    latents = _latents(last)
    samples = _decoded(model, request, latents, notes)
    shown = [images.preview(sample) for sample in samples]
    seconds += time.perf_counter() - started
    return Result(shown, samples, latents, _parameters(model, request, notes), notes.warnings, seconds)


def complete(model: Model, request: Request) -> Request:
    """The request with every open field decided: by the model's defaults, then `DEFAULTS`, a random seed."""
    sides = model.image_size
    if len(sides) == 1 and request.height not in (None, 1):
        raise InputError(
            f"{model.name!r} draws in one dimension; height is {request.height}", "Give width alone."
        )
    values = {name: getattr(request, name) for name in Request.model_fields}
    choices = {
        **DEFAULTS,
        "width": sides[-1],
        "height": sides[-2] if len(sides) > 1 else 1,
        "seed": secrets.randbelow(2**32),
        **{name: value for name, value in model.defaults.items() if name != "spacing"},
    }
    values |= {name: value for name, value in choices.items() if values.get(name) is None}
    for name, own in _text_choices(model, values).items():
        if own is None and values[name] is not None:
            raise InputError(f"{name} is {values[name]}; {model.name!r} does not read it", "Leave it out.")
        values[name] = own if values[name] is None else values[name]
    if request.prompt is None and request.label is None and not request.negative_prompt:
        values["guidance"] = 1.0  # there is nothing to guide towards
    if request.spacing == "auto" and values["sampler"] in SAMPLERS:
        own = model.defaults.get("spacing") if values["sampler"] == model.defaults.get("sampler") else None
        values["spacing"] = own or SAMPLERS[values["sampler"]].spacing
    if values["sampler"] == "ddpm" and values["variance"] is None:
        values["variance"] = "large" if values["steps"] == model.schedule.num_timesteps else "small"
    try:
        return Request(**values)
    except ValidationError as error:
        raise input_error(error) from error


def _text_choices(model: Model, values: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own value of every field that some text encoders read; None where its own does not."""
    config = model.config
    words = config.text is not None or config.bert is not None
    sizes = config.text2 is not None
    return {
        "clip_skip": None if config.text is None else config.clip_skip,
        "zeros_for_empty": config.zeros_for_empty if words else None,
        "original_width": values["width"] if sizes else None,
        "original_height": values["height"] if sizes else None,
        "crop_left": 0 if sizes else None,
        "crop_top": 0 if sizes else None,
    }


def _steps(
    model: Model,
    request: Request,
    positive: Conditioning,
    negative: Conditioning,
    seeds: Sequence[int],
    notes: Notes,
) -> Iterator[Step]:
    """Sampling itself; the conditions have one row for each seed."""
    assert request.steps is not None and request.sampler is not None and request.guidance is not None
    assert request.height is not None and request.width is not None
    shape = model.latent_shape(request.height, request.width)
    noise = ImageNoise(seeds, shape, device=model.device, start=_start_noise(request, seeds, shape))
    scale = request.guidance

    def denoiser(model: Model) -> Denoiser:
        predict = model.predictor()
        branches = {"cond": (predict, positive), "uncond": (predict, negative)}
        return guided(branches, cfg(scale), batched=not request.deterministic)

    plan = spacing(request.spacing)(model.schedule, request.steps)
    denoise = _finite_denoiser(denoiser, model, plan.sigmas, notes)
    options = {"eta": request.eta, "variance": request.variance}
    given = {name: value for name, value in options.items() if value is not None}
    return sampler(request.sampler)(denoise, noise.initial() * plan.start_scale, plan.sigmas, noise, **given)


def _conditions(model: Model, request: Request, notes: Notes) -> tuple[Conditioning, Conditioning]:
    """Positive and negative conditions, a row for each picture."""
    positive = _encoded(model, request, request.prompt, notes)
    negative = _encoded(model, request, request.negative_prompt or None, notes, "negative prompt")
    model.check_pictures(positive)
    if request.negative_prompt and request.guidance == 1:
        notes.warnings.append("the negative prompt has no effect at guidance 1")
    count = num_classes(model.config)
    free = model.config.classes is not None and model.config.classes.unconditional
    if request.label is None and count is not None and not free:
        raise InputError(f"{model.name!r} draws one of {count} classes", f"Give a label, 0 to {count - 1}.")
    if request.label is not None:
        drawn = model.encode_label([request.label])
        positive = drawn if drawn.context is not None else replace(positive, vector=drawn.vector)
        if not free and request.guidance != 1:
            raise InputError(
                f"{model.name!r} was not trained without a class, so its guidance is 1",
                "Use guidance 1 with it.",
            )
    return positive.repeat(request.num_images), negative.repeat(request.num_images)


def _encoded(
    model: Model, request: Request, prompt: str | None, notes: Notes, role: str = "prompt"
) -> Conditioning:
    """One row: a prompt, or nothing asked for. A model without text takes the empty prompt as nothing."""
    skip, zeros = request.clip_skip, request.zeros_for_empty
    assert request.height is not None and request.width is not None
    size = (request.height, request.width)
    original = (request.original_height or request.height, request.original_width or request.width)
    crop = (request.crop_top or 0, request.crop_left or 0)

    def encode(model: Model) -> Conditioning:
        if prompt:
            return model.encode_prompt([prompt], skip, size=size, original=original, crop=crop)
        return model.uncondition(1, skip, zeros, size=size, original=original, crop=crop)

    for cut in model.prompt_cuts([prompt] if prompt else []):
        if cut:
            notes.warnings.append(f"the {role} is longer than the model reads; this was cut: {cut!r}")
    cond = encode(model)
    if not _finite_condition(cond):
        notes.float32_retries.append("text encoder")
        cond = encode(model.float32())
        if not _finite_condition(cond):
            raise _not_finite("the text encoder", f"for {prompt!r}")
    return cond


def _finite_condition(cond: Conditioning) -> bool:
    found: list[bool] = []
    cond.map(lambda value: (found.append(bool(torch.isfinite(value).all())), value)[1])
    return all(found)


def _finite_denoiser(
    denoiser: Callable[[Model], Denoiser], model: Model, sigmas: Sequence[float], notes: Notes
) -> Denoiser:
    """The denoiser of `model`, asked once more in float32 where its answer is not finite."""
    narrow, wide = denoiser(model), None
    rising = [-sigma for sigma in sigmas]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal wide
        denoised = narrow(x, sigma)
        if not bool(torch.isfinite(denoised).all()):
            step = min(bisect.bisect_left(rising, -sigma), len(sigmas) - 2)
            notes.float32_retries.append(f"U-Net at step {step + 1}")
            wide = wide or denoiser(model.float32())
            denoised = wide(x, sigma)
            if not bool(torch.isfinite(denoised).all()):
                raise _not_finite("the U-Net", f"at step {step + 1} of {len(sigmas) - 1} (sigma {sigma:.4g})")
        return denoised

    return denoise


def _latents(last: Step) -> Tensor:
    """Where sampling ended above 0 the last x still holds noise's share: back to the scale of the data."""
    return last.x / math.sqrt(1 + last.target**2)


def _decoded(model: Model, request: Request, latents: Tensor, notes: Notes) -> Tensor:
    parts = latents.split(1) if request.deterministic else [latents]
    decoded = []
    for part in parts:
        samples = model.decode_latents(part)
        if not bool(torch.isfinite(samples).all()):
            notes.float32_retries.append("decoder")
            samples = model.float32().decode_latents(part)
            if not bool(torch.isfinite(samples).all()):
                raise _not_finite("the decoder", f"after step {request.steps}")
        decoded.append(samples)
    return torch.cat(decoded)


def _not_finite(stage: str, place: str) -> NumericalError:
    return NumericalError(
        f"{stage} gave values that are not finite {place}, in float32 too",
        "Try another seed, sampler or a lower guidance; if it stays, the model's weights may be damaged.",
    )


def _start_noise(request: Request, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor | None:
    """The given start noise, or that of the first seed for all; None lets every picture have its own."""
    given = request.start_noise
    if given is None:
        own = ImageNoise(seeds[:1], shape, device=torch.device("cpu"))
        return own.initial() if request.shared_start else None
    noise = _read_noise(given) if isinstance(given, Path) else torch.as_tensor(given)
    if not bool(torch.isfinite(noise).all()):
        raise InputError(
            "the start noise holds values that are not finite", "Give normally distributed noise."
        )
    return noise[:1] if request.shared_start and noise.ndim > len(shape) else noise


def _read_noise(path: Path) -> Tensor:
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
        if len(tensors) != 1:
            raise InputError(
                f"{path} holds {len(tensors)} tensors", "Give a file with the start noise alone."
            )
        return next(iter(tensors.values()))
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise InputError(
            f"the start noise {path} cannot be read: {error}", "Give a .npy or .safetensors file."
        ) from error


def _parameters(model: Model, request: Request, notes: Notes) -> list[dict[str, Any]]:
    """For each picture what it takes to draw it again; the same run always gives the same text."""
    assert request.seed is not None
    skipped = {"num_images", "seed", "start_noise"}
    common = {name: getattr(request, name) for name in Request.model_fields if name not in skipped}
    if request.start_noise is not None:
        given = request.start_noise
        noise = _read_noise(given) if isinstance(given, Path) else torch.as_tensor(given)
        raw = noise.detach().cpu().float().contiguous().numpy().tobytes()
        common["start_noise_sha256"] = hashlib.sha256(raw).hexdigest()
    common |= {
        "model": model.name,
        "model_digest": model.digest,
        "version": __version__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "float32_retries": notes.float32_retries,
        "batch_size": request.num_images,
    }
    return [{**common, "seed": request.seed + i, "batch_index": i} for i in range(request.num_images)]

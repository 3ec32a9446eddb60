"""From a request to pictures, the one path of every kind of generation (Rombach et al. 2022, section 3)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato import images
from sfumato.checkpoints.addons.apply import Weighted
from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.samplers import Step, sampler
from sfumato.generation.addons import applied, embeddings, loras
from sfumato.generation.canvas import nearest_side
from sfumato.generation.conditions import Conditions, Stage, conditions, encoded
from sfumato.generation.controlling import NONE, controls
from sfumato.generation.defaults import complete
from sfumato.generation.guiding import NotFinite, Watch, denoiser
from sfumato.generation.large import around, joined_edges
from sfumato.generation.notes import Notes, not_finite
from sfumato.generation.pictures import Start, start
from sfumato.generation.recipe import addon_digests, parameters
from sfumato.generation.stages import continued, plan
from sfumato.generation.start import brownian, noise_config, start_noise
from sfumato.generation.written import written
from sfumato.model import StableDiffusion, Tiles
from sfumato.request import Request


@dataclass(frozen=True)
class Result:
    """What was drawn.

    images: one PIL picture each, or a preview where samples are no pictures (1-D, 3-D, other channels); with
    a mask, what was drawn put into the given picture. samples: (n, c, ...) as decoded, in about -1..1.
    latents: (n, z, ...) before decoding. parameters: for each picture all that it takes to draw it again.
    seconds: wall-clock time.
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


def generate(model: StableDiffusion, request: Request) -> Result:
    """Draw `request.num_images` pictures.

    Raises `InputError` for what this model cannot take, `NumericalError` naming stage and step where values
    are not finite in float32 either.
    """

    def run(stage: Request, notes: Notes) -> Result:
        started = time.perf_counter()
        *_, last = stream(model, stage, notes)
        return finish(model, stage, last, notes, time.perf_counter() - started)

    return in_turn(model, complete(model, request), run)


def in_turn(model: StableDiffusion, request: Request, run: Callable[[Request, Notes], Result]) -> Result:
    """The result of a request from `complete`, whose drawings `run` makes in turn, each from the last one's.

    Its recipes are those of the request as a whole.
    """
    first, *others = plan(request, nearest_side(model, 0))
    notes = Notes()
    result = run(first, notes)
    for stage in others:
        seconds = result.seconds
        result = run(continued(stage, result.images, result.latents), notes)
        result = replace(result, seconds=seconds + result.seconds)
    if first is request:
        return result
    return replace(result, parameters=parameters(model, request, notes, notes.addons))


def stream(model: StableDiffusion, request: Request, notes: Notes | None = None) -> Iterator[Step]:
    """The steps of a generation, computed as they are iterated: stop to cancel. Errors as `generate`.

    Warnings go to `notes`, or to Python's `warnings` without one. `finish` turns the last step into pictures.
    Where a narrow number format left the finite numbers, the steps begin anew, in float32.
    """
    told = Notes() if notes is None else notes
    request = complete(model, request)
    assert request.seed is not None
    with joined_edges(model, request):
        begin = told.start = start(model, request, told)
    told.steps = len(begin.plan.sigmas) - 1
    running = request.model_copy(update={"steps": max(1, told.steps)})
    prompts = written(running, told)
    told.prompts = [(one.prompt, one.negative_prompt) for one in prompts]
    addons = loras(request, prompts)
    vectors, files = embeddings(model, request, prompts)
    told.addons = addon_digests(addons, files)
    with applied(model, addons):
        conds = begin.conditioned(model, conditions(model, running, prompts, vectors, told))
    shown = told.controls = controls(model, request, *begin.shown)
    conds = shown.conditioned(conds, request.num_images)
    for text in told.warnings if notes is None else ():
        warnings.warn(text, stacklevel=2)
    seeds = [request.seed + index for index in range(request.num_images)]
    return _changed(model, request, addons, _steps(model, request, conds, seeds, begin, told))


def draw(
    model: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int], request: Request | None = None
) -> Tensor:
    """Samples (n, c, ...), about -1..1, of many prompts in one batch, each with its seed.

    The prompts are taken as they stand, and cut where the model reads no further, as training does.
    All else is as `request` says, or by default.
    """
    notes = Notes()
    asked = {"prompt": "", "num_images": len(prompts), "emphasis": "plain"}
    request = complete(model, (request or Request()).model_copy(update=asked))
    rows = [encoded(model, request, prompt, notes) for prompt in prompts]
    negative = encoded(model, request, None, notes).repeat(len(prompts))
    conds = {"cond": concatenate(rows), "uncond": negative}
    return conditioned_samples(model, request, conds, seeds, notes)


def conditioned_samples(
    model: StableDiffusion,
    request: Request,
    conds: Mapping[str, Conditioning],
    seeds: Sequence[int],
    notes: Notes,
) -> Tensor:
    """Samples (n, c, ...), about -1..1, under conditions of a row for each seed; request: from `complete`."""
    assert request.steps is not None
    stages = Conditions((Stage(request.steps, conds),))
    *_, last = _steps(model, request, stages, seeds, start(model, request, notes), notes)
    return _decoded(model, request, final_latents(last), notes)


@torch.no_grad()
def finish(model: StableDiffusion, request: Request, last: Step, notes: Notes, seconds: float) -> Result:
    """The pictures of the last step of `stream(model, request, notes)`, for a request from `complete`."""
    started = time.perf_counter()
    assert notes.start is not None
    latents = notes.start.kept(final_latents(last))
    with joined_edges(model, request):
        samples = _decoded(model, request, latents, notes)
    shown = notes.start.finished([images.preview(sample) for sample in samples])
    seconds += time.perf_counter() - started
    return Result(
        shown, samples, latents, parameters(model, request, notes, notes.addons), notes.warnings, seconds
    )


def _steps(
    model: StableDiffusion,
    request: Request,
    conds: Conditions,
    seeds: Sequence[int],
    begin: Start,
    notes: Notes,
) -> Iterator[Step]:
    """Sampling itself; the conditions have one row for each seed."""
    assert request.sampler is not None
    assert request.height is not None and request.width is not None
    row = sampler(request.sampler)
    shape = model.latent_shape(request.height, request.width)
    sigmas = begin.plan.sigmas
    given = start_noise(request, seeds, shape)
    config = noise_config(model, request)
    options: dict[str, Any] = {"eta": request.eta, "variance": request.variance, **request.sampler_options}
    options = {name: value for name, value in options.items() if value is not None}
    if "schedule" in row.options:
        options["schedule"] = model.schedule

    def run(model: StableDiffusion) -> Iterator[Step]:
        noise = ImageNoise(seeds, shape, device=model.device, start=given, config=config)
        initial = noise.initial()
        x = begin.x(initial)
        if len(sigmas) == 1:  # nothing to do
            yield Step(0, 0.0, 0.0, x, x)
            return
        steps_noise = noise if row.noise == "fresh" else brownian(model, seeds, shape, sigmas, config)
        watch = Watch(
            begin.denoiser(denoiser(model, request, conds, sigmas, notes.controls or NONE), initial)
        )
        yield from row(watch, x, sigmas, steps_noise, **options)
        watch.check()

    def finite() -> Iterator[Step]:
        try:
            yield from run(model)
        except NotFinite as left:
            notes.float32_retries.append(f"U-Net at step {_step(left.sigma, sigmas)}")
        else:
            return
        try:
            yield from run(model.float32())
        except NotFinite as left:
            place = f"at step {_step(left.sigma, sigmas)} of {len(sigmas) - 1}"
            raise not_finite("the U-Net", f"{place} (sigma {left.sigma:.4g})") from left

    return finite()


def _changed(
    model: StableDiffusion, request: Request, addons: Sequence[Weighted], steps: Iterator[Step]
) -> Iterator[Step]:
    """The steps, with weights and edges changed from the first until the last, or until they are given up."""
    with applied(model, addons), joined_edges(model, request):
        yield from steps


def _step(sigma: float, sigmas: Sequence[float]) -> int:
    """The number of the step in which the network is asked at this noise level, from 1."""
    return max(1, sum(level >= sigma for level in sigmas[:-1]))


def final_latents(last: Step) -> Tensor:
    """What a last step leaves: where it ended above 0, x still holds noise's share."""
    return last.x / math.sqrt(1 + last.target**2)


def _decoded(model: StableDiffusion, request: Request, latents: Tensor, notes: Notes) -> Tensor:
    parts = latents.split(1) if request.deterministic else [latents]
    tiles = Tiles(request.tiled, around(request))
    decoded = []
    for part in parts:
        samples = model.decode_latents(part, tiles)
        if not bool(torch.isfinite(samples).all()):
            notes.float32_retries.append("decoder")
            samples = model.float32().decode_latents(part, tiles)
            if not bool(torch.isfinite(samples).all()):
                raise not_finite("the decoder", f"after step {request.steps}")
        decoded.append(samples)
    return torch.cat(decoded)

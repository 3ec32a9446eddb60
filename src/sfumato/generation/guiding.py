"""How a request is guided: its conditions and methods made into one denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.classifier import load_classifier
from sfumato.conditioning import Conditioning
from sfumato.diffusion.classifier import ClassProbability, classifier_guided
from sfumato.diffusion.guidance import Branch, Combine, composed, guided, image_cfg
from sfumato.diffusion.guidance_attention import attended, self_attention_guided
from sfumato.diffusion.guidance_methods import (
    autoguidance,
    away_from,
    interval,
    interval_of_steps,
    pag,
    rescale,
)
from sfumato.diffusion.guidance_projection import apg, perp_neg
from sfumato.diffusion.guidance_threshold import dynamic_threshold, mimic_threshold
from sfumato.diffusion.prediction import ConditionalDenoiser, GuidedDenoiser
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import InputError, nearest
from sfumato.generation.conditions import Conditions
from sfumato.generation.controlling import NONE, Controls, predictors
from sfumato.generation.large import in_windows
from sfumato.model import StableDiffusion, load
from sfumato.nn.patches import (
    combine_patches,
    freeu,
    kept_attention,
    perturbed_attention,
    smoothed_attention,
)
from sfumato.nn.unet import Patch
from sfumato.request import Request

APG_OPTIONS = ("eta", "norm_threshold", "momentum")


class NotFinite(ArithmeticError):
    """A denoiser's answer at the noise level `sigma` holds values that are not finite."""

    def __init__(self, sigma: float) -> None:
        super().__init__(sigma)
        self.sigma = sigma


class Watch:
    """A denoiser whose answers are looked at: `NotFinite` at once on a CPU, elsewhere when `check` is asked.

    A look at an accelerator's answer would make every step wait for it; its flags stay there until the end.
    """

    def __init__(self, denoise: GuidedDenoiser) -> None:
        self._denoise = denoise
        self._flags: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self._seen(self._denoise(x, sigma), sigma)

    def parts(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        guided, unguided = self._denoise.parts(x, sigma)
        return self._seen(guided, sigma), unguided

    def rows(self, start: int, stop: int) -> Watch:
        some = Watch(self._denoise.rows(start, stop))
        some._flags = self._flags
        return some

    def check(self) -> None:
        """Raise `NotFinite` for the first answer that was not."""
        for sigma, finite in self._flags:
            if not bool(finite):
                raise NotFinite(sigma)

    def _seen(self, denoised: Tensor, sigma: float) -> Tensor:
        self._flags.append((sigma, torch.isfinite(denoised).all()))
        if denoised.device.type == "cpu":
            self.check()
            self._flags.clear()
        return denoised


@dataclass(frozen=True)
class Staged:
    """A denoiser for each stage of a run: (the noise level at its end, the denoiser), the highest first."""

    stages: tuple[tuple[float, GuidedDenoiser], ...]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self._at(sigma)(x, sigma)

    def parts(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return self._at(sigma).parts(x, sigma)

    def rows(self, start: int, stop: int) -> Staged:
        return Staged(tuple((level, denoise.rows(start, stop)) for level, denoise in self.stages))

    def _at(self, sigma: float) -> GuidedDenoiser:
        return next((denoise for level, denoise in self.stages if sigma > level), self.stages[-1][1])


def denoiser(
    model: StableDiffusion,
    request: Request,
    conds: Conditions,
    sigmas: Sequence[float],
    controls: Controls = NONE,
) -> GuidedDenoiser:
    """The model guided and controlled as the request says; sigmas: the noise levels of the run.

    What this makes remembers its run: make a new one for each. Raises `InputError` for methods that do not
    fit together or the model.
    """
    weak = None if request.weak_model is None else _weak(request.weak_model, model).predictor()
    steps = len(sigmas) - 1
    make = predictors(model, request, controls, sigmas)

    def part(conds: Conditions) -> GuidedDenoiser:
        combine = _combined(model, request, conds.weights, sigmas)
        made = [_stage(model, request, stage.conds, combine, weak, sigmas, make) for stage in conds.stages]
        if len(made) == 1:
            return made[0]
        ends = [sigmas[min(stage.until, steps)] for stage in conds.stages]
        return Staged(tuple(zip(ends, made, strict=True)))

    return in_windows(model, request, conds, part)


def _stage(
    model: StableDiffusion,
    request: Request,
    conds: Mapping[str, Conditioning],
    combine: Combine,
    weak: ConditionalDenoiser | None,
    sigmas: Sequence[float],
    make: Callable[[Patch], ConditionalDenoiser],
) -> GuidedDenoiser:
    """The denoiser of one stage; make: the model with a patch."""
    patch = freeu(model.unet.config, *request.freeu) if request.freeu else Patch()
    predict = make(patch)  # one for all, so that branches share a pass
    branches: dict[str, Branch] = {name: (predict, cond) for name, cond in conds.items()}
    for name, weight, disturbed in (
        ("perturbed", request.pag, perturbed_attention),
        ("smoothed", request.seg, smoothed_attention),
    ):
        if weight:
            changed = combine_patches(disturbed(model.unet, request.attention_layers), patch)
            branches[name] = (make(changed), conds["cond"])
    if weak is not None:
        branches["weak"] = (weak, conds["cond"])
    batched = not request.deterministic
    found: GuidedDenoiser = guided(branches, combine, batched=batched)
    if request.sag:
        kept, take = kept_attention(model.unet)
        looking = attended(make(combine_patches(kept, patch)), take)
        found = self_attention_guided(branches, combine, looking, request.sag, batched=batched)
    if request.classifier is not None and request.classifier_scale:
        probability = _class_probability(model, request)
        found = classifier_guided(
            found, probability, request.classifier_scale, form=request.classifier_form, sigmas=sigmas,
            batched=batched,
        )  # fmt: skip
    return found


def _combined(
    model: StableDiffusion, request: Request, weights: Sequence[float], sigmas: Sequence[float]
) -> Combine:
    """The methods of the request that combine branches, the innermost first."""
    scale = request.guidance
    assert scale is not None
    if list(weights) != [1] and (request.apg or request.perp_neg is not None):
        raise InputError("AND composes prompts by guidance; apg and perp_neg are others", "Leave one out.")
    if request.image_guidance is not None and (
        list(weights) != [1] or request.apg or request.perp_neg is not None
    ):
        raise InputError(
            "models that edit by instructions have a guidance of their own",
            "Leave AND, apg and perp_neg out.",
        )
    if request.apg:
        combine: Combine = apg(scale, **_known(request.apg_options, APG_OPTIONS))
    elif request.perp_neg is not None:
        combine = perp_neg(scale, request.perp_neg)
    elif request.image_guidance is not None:
        combine = image_cfg(scale, request.image_guidance)
    else:
        combine = composed(scale, weights)
    if request.mimic is not None:
        combine = mimic_threshold(combine, request.mimic, request.dynamic_threshold or 1.0)
    elif request.dynamic_threshold is not None:
        combine = dynamic_threshold(combine, request.dynamic_threshold, request.threshold_limit)
    combine = rescale(combine, request.rescale, model.prediction)
    combine = away_from(pag(combine, request.pag), "smoothed", request.seg)
    if request.weak_model is not None:
        combine = autoguidance(request.weak_guidance, combine)
    low, high = interval_of_steps(sigmas, request.guidance_start, request.guidance_stop)
    low, high = max(low, request.guidance_low), min(high, request.guidance_high or math.inf)
    return combine if (low, high) == (0, math.inf) else interval(combine, min(low, high), high)


def _known(options: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    for name in options:
        if name not in allowed:
            raise InputError(f"apg has no option {name!r}", nearest(name, allowed))
    return dict(options)


def _weak(given: Any, model: StableDiffusion) -> StableDiffusion:
    weak = load(given, device=model.device, dtype=model.dtype) if isinstance(given, str) else given
    shapes = [one.latent_shape(*one.image_size[-2:])[0] for one in (weak, model)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{weak.name!r} has {shapes[0]} latent channels, {model.name!r} has {shapes[1]}",
            "Take a weaker version of the same model.",
        )
    return weak


def _class_probability(model: StableDiffusion, request: Request) -> ClassProbability:
    given: Any = request.classifier
    label = request.classifier_label
    loaded = load_classifier(given, model.device) if isinstance(given, str) else given
    description = loaded.description
    number = int(label) if label.isdecimal() else description.label(label)
    if number >= len(description.classes):
        raise InputError(
            f"the class is {number}; {description.name!r} has 0 to {len(description.classes) - 1}",
            f"They are: {', '.join(description.classes[:20])}.",
        )
    labels = torch.full((request.num_images,), number, device=model.device)
    return ClassProbability(loaded.network, Schedule(description.schedule), labels)

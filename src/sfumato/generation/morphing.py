"""Pictures on the way from one prompt and noise to the next (Shoemake 1985 for the arcs between noises)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image

from sfumato import images
from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.interpolate import between_conditions, between_noises, positions
from sfumato.diffusion.noise import ImageNoise
from sfumato.errors import InputError
from sfumato.generation.conditions import encoded
from sfumato.generation.defaults import complete
from sfumato.generation.notes import Notes
from sfumato.generation.run import conditioned_samples
from sfumato.generation.start import noise_config
from sfumato.model import StableDiffusion
from sfumato.request import Request

BATCH = 8  # frames drawn together
WITHOUT = ("init", "control", "regions", "hires", "start_noise", "label", "lora")


def morph(
    model: StableDiffusion,
    request: Request,
    prompts: Sequence[str],
    frames: int,
    *,
    seeds: Sequence[int] = (),
    loop: bool = False,
    notes: Notes | None = None,
    show: Callable[[int, int], object] = lambda done, every: None,
) -> Iterator[Image.Image]:
    """Pictures on the way through `prompts`, drawn as they are iterated.

    request: everything else about them. frames: from each prompt to the next. seeds: of the noise at each
    prompt, the request's for all by default; those of noise inside the steps are the request's, so that
    samplers which draw some do not flicker. loop: back to the first. show(done, all). Raises `InputError`
    where there is no way, and for fields that say something about single pictures.
    """
    told = Notes() if notes is None else notes
    for name in WITHOUT:
        if getattr(request, name):
            raise InputError(f"{name} is given, which a way between prompts does not take", "Leave it out.")
    way = positions(len(prompts), frames, loop=loop)
    request = complete(model, request.model_copy(update={"prompt": prompts[0], "num_images": 1}))
    assert request.seed is not None and request.height is not None and request.width is not None
    every = list(seeds) or [request.seed] * len(prompts)
    if len(every) != len(prompts):
        raise InputError(f"{len(prompts)} prompts have {len(every)} seeds", "Give one for each, or none.")
    rows = [encoded(model, request, prompt, told) for prompt in prompts]
    negative = encoded(model, request, request.negative_prompt or None, told, "negative prompt")
    shape, config = model.latent_shape(request.height, request.width), noise_config(model, request)
    noises = list(ImageNoise(every, shape, device=torch.device("cpu"), config=config).initial().split(1))

    for first in range(0, len(way), BATCH):
        part = way[first : first + BATCH]
        count = len(part)
        conds = [_condition(rows, key, share) for key, share in part]
        noise = torch.cat([between_noises(noises, key, share) for key, share in part])
        own = request.model_copy(update={"num_images": count, "start_noise": noise})
        branches = {"cond": concatenate(conds), "uncond": negative.repeat(count)}
        samples = conditioned_samples(model, own, branches, [request.seed] * count, told)
        show(first + count, len(way))
        yield from (images.preview(sample) for sample in samples)


def _condition(rows: Sequence[Conditioning], key: int, share: float) -> Conditioning:
    return between_conditions(rows[key], rows[(key + 1) % len(rows)], share)

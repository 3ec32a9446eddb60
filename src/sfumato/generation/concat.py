"""What networks are shown of pictures as further input channels (Rombach et al. 2022, sections 4.4, 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato import images
from sfumato.conditioning import Conditioning
from sfumato.diffusion.low_scale import low_scale
from sfumato.diffusion.noise import ImageNoise, NoiseConfig
from sfumato.errors import InputError
from sfumato.generation.canvas import Canvas, fitted, margins, mode, resized_mask
from sfumato.generation.conditions import Conditions
from sfumato.model import StableDiffusion
from sfumato.presets import concat_kind
from sfumato.request import Request

# From a picture's seed to that of its small picture's noise, 2^32 over the golden ratio: the same seed would
# give it the start noise. torch's generator reads 32 bits.
LOW_SEEDS = 2_654_435_769
WHOLE = ("mask", "mask_alpha", "only_masked", "region")

Encode = Callable[[Tensor], Tensor]
"""Pictures (n, c, h, w) in -1..1 -> scaled latents (n, z, h/f, w/f)."""


def kind_of(model: StableDiffusion) -> str | None:
    """What the further channels show, see `ModelConfig.concat`; None where there are none."""
    return concat_kind(model.config)


def further(
    model: StableDiffusion, request: Request, place: Canvas, latents: Tensor, encode: Encode
) -> Conditioning | None:
    """`concat`, a row for each picture or one for all, and the `vector` that goes with it; None for neither.

    latents: scaled, of the pictures. `InputError` for a mask where a picture is enlarged.
    """
    kind = kind_of(model)
    if kind == "edits":  # unscaled: Brooks et al. 2023
        return Conditioning(concat=latents / model.latent_scale)
    if kind == "enlarges":
        return _small(model, request, place)
    if kind not in ("inpaints", "inpaints_black"):
        return None
    pictures, mask = images.to_tensor(place.parts, mode(model)), place.drawn_mask
    mask = torch.ones(1, 1, *place.size[::-1]) if mask is None else (mask >= 0.5).float()
    known = encode(pictures * (1 - mask) - (mask if kind == "inpaints_black" else 0))
    size = (known.shape[2], known.shape[3])
    if kind == "inpaints":
        small = resized_mask(mask, size).to(known)
        return Conditioning(concat=torch.cat([small.expand(len(known), -1, -1, -1), known], dim=1))
    # scripts/inpaint.py of latent diffusion: the mask last, as a picture is, -1 and 1, without a filter.
    small = (2 * F.interpolate(mask, size, mode="nearest") - 1).to(known).expand(len(known), -1, -1, -1)
    return Conditioning(concat=torch.cat([known / model.latent_scale, small], dim=1))


def joined(model: StableDiffusion, conds: Conditions, shown: Conditioning) -> Conditions:
    """The conditions with what is shown, a row for each picture."""

    def same_for_all(branches: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        return {
            name: replace(
                cond, concat=shown.concat, vector=cond.vector if shown.vector is None else shown.vector
            )
            for name, cond in branches.items()
        }

    def edited(branches: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        """Of two guidances: picture and text, the picture alone ("image"), neither ("uncond")."""
        assert shown.concat is not None
        nothing = replace(branches["uncond"], concat=torch.zeros_like(shown.concat))
        return same_for_all(branches) | {
            "uncond": nothing,
            "image": replace(branches["uncond"], concat=shown.concat),
        }

    return conds.map(edited if kind_of(model) == "edits" else same_for_all)


def checked(model: StableDiffusion, conds: Conditions) -> Conditions:
    """The conditions, where the network needs no picture; errors as `StableDiffusion.check_pictures`."""
    return conds.each(lambda cond: (model.check_pictures(cond), cond)[1])


def small_noise(request: Request, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise in the small pictures of these seeds, (n, *shape), apart from all that draws the large."""
    own = [(seed + LOW_SEEDS) % 2**64 for seed in seeds]
    config = NoiseConfig(source=request.noise_source)
    return ImageNoise(own, shape, device=torch.device("cpu"), config=config).initial()


def _small(model: StableDiffusion, request: Request, place: Canvas) -> Conditioning:
    """The pictures themselves, as large as the latents; noised, and how much, where the network is told."""
    refused = [name for name in WHOLE if getattr(request, name)]
    refused += ["outpainting"] if any(margins(request)) else []
    if refused:
        raise InputError(
            f"{model.name!r} enlarges whole pictures; {refused[0]} is asked for", "Leave it out."
        )
    assert request.height is not None and request.width is not None and request.seed is not None
    height, width = model.latent_shape(request.height, request.width)[1:]
    small = images.to_tensor(
        [fitted(each, (width, height), request.resize) for each in place.given], mode(model)
    )
    if request.noise_level is None:
        return Conditioning(concat=small)
    count = request.num_images
    noise = small_noise(request, [request.seed + index for index in range(count)], small.shape[1:])
    return low_scale(small.expand(count, -1, -1, -1), request.noise_level, noise)

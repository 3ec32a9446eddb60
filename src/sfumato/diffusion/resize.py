"""Latents at another size, for a second pass over a larger picture ("hires fix")."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import InputError, nearest

# Name -> (torch's mode, antialiased); in AUTOMATIC1111's words "Latent", "Latent (antialiased)", ...
LATENT_MODES: Mapping[str, tuple[str, bool]] = {
    "bilinear": ("bilinear", False),
    "bilinear-antialiased": ("bilinear", True),
    "bicubic": ("bicubic", False),
    "bicubic-antialiased": ("bicubic", True),
    "nearest": ("nearest", False),
    "nearest-exact": ("nearest-exact", False),
}
LATENT = "latent"
# What a second pass may be called to start from, beside pixels: latent, latent-bicubic, ...
LATENTS: Mapping[str, str] = {LATENT: "bilinear"} | {f"{LATENT}-{mode}": mode for mode in LATENT_MODES}


def resize_latents(latents: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Latents (b, c, h, w) at `size` = (height, width), in their own dtype; mode: a name in `LATENT_MODES`.

    Enlarged latents decode to blurred pictures: draw on from them with a strength of 0.5 or more. Raises
    InputError for another mode or a side below 1.
    """
    if mode not in LATENT_MODES:
        raise InputError(f"there is no mode {mode!r} for latents", nearest(mode, LATENT_MODES))
    if min(size) < 1:
        raise InputError(f"the size is {size}; sides are at least 1.")
    kind, antialias = LATENT_MODES[mode]
    corners = False if kind in ("bilinear", "bicubic") else None
    return F.interpolate(latents, size=size, mode=kind, align_corners=corners, antialias=antialias)

"""Self-attention guidance: away from a picture blurred where the network looks (Hong et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato import errors
from sfumato.conditioning import Conditioning
from sfumato.diffusion.guidance import Branch, Combine, Guided
from sfumato.diffusion.prediction import ConditionalDenoiser, GuidedDenoiser

Attended = Callable[[Tensor, float, Conditioning], tuple[Tensor, Tensor]]
"""A predictor that also tells where it looked: (x, sigma, cond) -> x0 and the attention received (b, n)."""


def attended(predictor: ConditionalDenoiser, take: Callable[[], Tensor]) -> Attended:
    """An `Attended` of a predictor whose network keeps the attention of a pass, and of what takes it then."""
    return lambda x, sigma, cond: (predictor(x, sigma, cond), take())


@dataclass(frozen=True)
class SelfAttentionGuided:
    """See `self_attention_guided`; a `GuidedDenoiser`."""

    guided: Guided
    attended: Attended
    scale: float
    blur: float
    threshold: float

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        """The guided x0, like x."""
        return self._parts(x, sigma, [])[0]

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        """(guided, unguided) x0; unguided is the branch "uncond"."""
        denoised, predictions = self._parts(x, sigma, ["uncond"])
        return denoised, predictions["uncond"]

    def rows(self, start: int, stop: int, /) -> SelfAttentionGuided:
        """The same for the images start..stop of the batch alone."""
        return replace(self, guided=self.guided.rows(start, stop))

    def _parts(self, x: Tensor, sigma: float, also: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        combine = self.guided.combine
        needed = list(combine.needs(sigma))
        base = "uncond" if "uncond" in needed else "cond"
        others = [name for name in dict.fromkeys([*needed, *also]) if name != base]
        predictions = self.guided.evaluate(x, sigma, others)
        predictions[base], correction = self._base(x, sigma, self.guided.branch(base))
        denoised = combine(x, sigma, {name: predictions[name] for name in needed})
        return denoised + self.scale * correction, predictions

    def _base(self, x: Tensor, sigma: float, branch: Branch) -> tuple[Tensor, Tensor]:
        """x0 of the branch, and the difference that guides: in one pass of all images each, or one by one."""
        predictor, cond = branch
        size = x.shape[0] if self.guided.batched else 1
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, x.shape[0], size):
            rows, its_cond = x[start : start + size], cond.rows(start, start + size)
            x0, received = self.attended(rows, sigma, its_cond)
            degraded = blurred_where(x0, received > self.threshold, self.blur)
            noised = degraded + (rows - x0)  # with the noise that the network saw: sigma * eps = x - x0
            # In eps this is eps(x) - eps(noised), times -sigma.
            found.append((x0, degraded - predictor(noised, sigma, its_cond)))
        x0, correction = (torch.cat(parts) for parts in zip(*found, strict=True))
        return x0, correction


def self_attention_guided(
    branches: Mapping[str, Branch],
    combine: Combine,
    attended: Attended,
    scale: float,
    *,
    blur: float = 1.0,
    threshold: float = 1.0,
    batched: bool = True,
) -> GuidedDenoiser:
    """`guided`, and away from the picture blurred where the network looks (Hong et al. 2023).

    To the guided eps it adds scale * (eps of x - eps of x blurred there), both of one branch.

    attended: the predictor of the branches' network with its self-attention kept, see `attended`; it takes
    the place of the predictor of "uncond", or of "cond" where that is not computed. One evaluation more for
    each sigma. scale: 0 is off, 0.75 is usual with Stable Diffusion. blur: of x0, standard deviation in
    its positions. threshold: positions that receive more attention than this are blurred; on average a
    position receives 1. x: (b, c, h, w). `InputError` for a sample of another rank
    or a blur that is not above 0.
    """
    if not blur > 0:
        raise errors.InputError(f"the blur of self-attention guidance is {blur:g}", "Allowed is above 0.")
    denoise = Guided(branches, combine, batched)
    return SelfAttentionGuided(denoise, attended, scale, blur, threshold) if scale else denoise


def blurred_where(x0: Tensor, mask: Tensor, blur: float) -> Tensor:
    """x0 (b, c, h, w), blurred where `mask` (b, n) of a coarser grid of the same proportions says so."""
    if x0.ndim != 4:
        raise errors.InputError(
            f"self-attention guidance takes samples (b, c, h, w); this one has shape {tuple(x0.shape)}"
        )
    height, width = x0.shape[2:]
    factor = round(math.sqrt(height * width / mask.shape[1]))
    grid = mask.reshape(-1, 1, height // factor, width // factor).to(x0.dtype)
    return torch.lerp(x0, gaussian_blur(x0, blur), F.interpolate(grid, (height, width)).expand_as(x0))


def gaussian_blur(values: Tensor, blur: float) -> Tensor:
    """A Gaussian of standard deviation `blur` over the last two axes, cut at 4 of them; (b, c, h, w).

    The edges are mirrored; sides shorter than the Gaussian cut it short.
    """
    for axis in (2, 3):
        radius = min(math.ceil(4 * blur), values.shape[axis] - 1)
        offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
        kernel = torch.exp(-0.5 * (offsets / blur) ** 2)
        kernel = (kernel / kernel.sum()).reshape(1, 1, *((-1, 1) if axis == 2 else (1, -1)))
        padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        single = F.pad(values.flatten(0, 1)[:, None], padding, mode="reflect")
        values = F.conv2d(single, kernel).reshape(values.shape)
    return values

"""Pictures that control what is drawn: ControlNets, T2I-Adapters and IP-Adapters around a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.control import Influence, timed, weigh, weighted_hint
from sfumato.diffusion.prediction import ConditionalDenoiser, Network
from sfumato.errors import InputError
from sfumato.nn.clip_vision import DEVIATION, MEAN, CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet
from sfumato.nn.ip_adapter import IPAdapter, image_prompt_patch
from sfumato.nn.patches import combine_patches
from sfumato.nn.t2i_adapter import T2IAdapter, adapter_patch
from sfumato.nn.unet import Patch, UNet


class OpenNetwork(Protocol):
    """A network seam with its block seam and residuals open, as the model's own."""

    def __call__(
        self, x: Tensor, t: Tensor, cond: Conditioning, /, *, patch: Patch | None, residuals: Sequence[Tensor]
    ) -> Tensor: ...


@dataclass(frozen=True)
class Control:
    """A network that a picture is shown to, and how much what it says counts.

    Modes are for ControlNets and T2I-Adapters; the fading of "prompt" and "control" for ControlNets alone.
    """

    network: ControlNet | T2IAdapter | IPAdapter
    influence: Influence = field(default_factory=Influence)


@dataclass(frozen=True)
class Shown:
    """What a control makes of its picture before the first step, on either side of guidance.

    A ControlNet: the picture and its weight, one tensor; a T2I-Adapter: its features; an IP-Adapter: tokens
    (1, n, width). Each has one row, or one for each sample.
    """

    conditional: tuple[Tensor, ...]
    unconditional: tuple[Tensor, ...]


@dataclass(frozen=True)
class Controlled:
    """A network seam F -> F: residual lists are summed, patches joined, by what the conditions' hints hold.

    unet: what lies inside `network`. active: whether each control counts; those that do not cost nothing.
    """

    network: OpenNetwork
    unet: UNet
    controls: tuple[Control, ...]
    active: tuple[bool, ...]
    patch: Patch | None = None

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, /) -> Tensor:
        """The raw prediction, like x."""
        cond = cond.to(x.device, x.dtype)
        residuals: list[Tensor] = []
        patch = Patch() if self.patch is None else self.patch
        prompted: list[tuple[IPAdapter, Tensor, float]] = []
        for control, active, given in zip(self.controls, self.active, self._given(cond), strict=True):
            if not active:
                continue
            if isinstance(control.network, ControlNet):
                residuals = _added(residuals, control_residuals(control, x, t, cond, given[0]))
            elif isinstance(control.network, T2IAdapter):
                patch = combine_patches(adapter_patch(self.unet.config, given), patch)
            else:
                prompted.append((control.network, given[0], control.influence.weight))
        if prompted:
            adapters, tokens, scales = zip(*prompted, strict=True)
            patch = combine_patches(image_prompt_patch(self.unet, adapters, tokens, scales), patch)
        return self.network(x, t, cond, patch=patch, residuals=residuals)

    def _given(self, cond: Conditioning) -> list[tuple[Tensor, ...]]:
        """Each control's share of the hints; InputError where they are not as many as the controls need."""
        hints = cond.hints or ()
        counts = [num_hints(control) for control in self.controls]
        if len(hints) != sum(counts):
            raise InputError(
                f"{len(self.controls)} controls need {sum(counts)} hints; the conditions hold {len(hints)}",
                "Make them by `with_shown`.",
            )
        ends = np.cumsum(counts).tolist()
        return [hints[end - count : end] for end, count in zip(ends, counts, strict=True)]


def controlled(
    network: OpenNetwork,
    unet: UNet,
    controls: Sequence[Control],
    sigmas: Sequence[float],
    predictor: Callable[[Network], ConditionalDenoiser],
    patch: Patch | None = None,
) -> ConditionalDenoiser:
    """P(x, sigma, cond) -> x0 of a model under controls, for conditions made by `with_shown`.

    network: the model's own, around `unet`. sigmas: the noise levels of the run, by which controls start and
    end. predictor: makes a P of a network seam. patch: what guidance changes inside the U-Net besides.
    """

    def make(active: tuple[bool, ...]) -> ConditionalDenoiser:
        return predictor(Controlled(network, unet, tuple(controls), active, patch))

    return timed(make, [control.influence for control in controls], sigmas)


def num_hints(control: Control) -> int:
    """How many tensors of the conditions' `hints` are a control's."""
    return len(control.network.config.channels) if isinstance(control.network, T2IAdapter) else 1


def control_residuals(
    control: Control, x: Tensor, t: Tensor, cond: Conditioning, hint: Tensor
) -> list[Tensor]:
    """What a ControlNet adds to the U-Net's skip connections and its middle, weighted, in x's number format.

    hint: as `weighted_hint` makes it. The network computes where it lies and in its own number format.
    """
    network = control.network
    assert isinstance(network, ControlNet)
    own = next(network.parameters())
    given = cond.to(own.device, own.dtype)
    picture, weights = hint.to(own.device, own.dtype).split([hint.shape[1] - 1, 1], dim=1)
    made = network(x.to(own.device, own.dtype), t.to(own.device), picture, given.context, given.vector)
    shares = control.influence.residual_weights(len(made))
    return [(weigh(each, weights) * share).to(x) for each, share in zip(made, shares, strict=True)]


@torch.no_grad()
def shown(
    control: Control,
    picture: Tensor,
    *,
    mask: Tensor | None = None,
    image_encoder: CLIPVisionEncoder | None = None,
) -> Shown:
    """What a control makes of a picture before the first step.

    picture: (1 or b, c, h, w) in 0..1, of the size that is drawn; for an IP-Adapter as `clip_pixels` makes
    it, where more than one picture is seen as one prompt. mask: (1 or b, 1, h, w) in 0..1, where a ControlNet
    or T2I-Adapter counts. image_encoder: CLIP's, which an IP-Adapter needs. Raises InputError for what does
    not fit.
    """
    network, influence = control.network, control.influence
    own = next(network.parameters())
    picture = picture.to(own.device, own.dtype)
    mask = None if mask is None else mask.to(own.device, own.dtype)
    if isinstance(network, IPAdapter):
        return _seen(network, picture, image_encoder)
    weights = (influence.weight, influence.unguided_weight())
    if isinstance(network, ControlNet):
        return Shown(*((weighted_hint(picture, weight, mask),) for weight in weights))
    features = network(picture)
    if mask is not None:
        features = [weigh(feature, mask) for feature in features]
    return Shown(*(tuple(feature * weight for feature in features) for weight in weights))


def with_shown(
    conds: Mapping[str, Conditioning], seen: Sequence[Shown], rows: int
) -> dict[str, Conditioning]:
    """The branches of guidance with what the controls were shown, in the controls' order.

    rows: samples in each branch. Branches called "cond..." are the conditional ones.
    """
    hinted: dict[str, Conditioning] = {}
    for name, cond in conds.items():
        sides = [one.conditional if name.startswith("cond") else one.unconditional for one in seen]
        hints = tuple(_repeated(part, rows) for parts in sides for part in parts)
        hinted[name] = replace(cond, hints=hints)
    return hinted


def clip_pixels(pictures: Sequence[Image.Image], size: int = 224) -> Tensor:
    """Pictures as CLIP's image transformer sees them: the middle square, (b, 3, size, size), normalised.

    The shorter side is brought to `size` by bicubic resampling first, as in CLIP's own preprocessing.
    """
    rows = [torch.from_numpy(np.array(_square(picture.convert("RGB"), size))) for picture in pictures]
    pixels = torch.stack(rows).movedim(-1, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def _square(picture: Image.Image, size: int) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    # The longer side is cut off, not rounded, in CLIPImageProcessor of transformers.
    resized = picture.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _seen(network: IPAdapter, pixels: Tensor, encoder: CLIPVisionEncoder | None) -> Shown:
    """The tokens of pictures, and those of none: of a vector of zeros, or of a picture that is all zeros."""
    if encoder is None:
        raise InputError(
            "an IP-Adapter was given no image encoder", "Give the CLIP image tower it was trained with."
        )
    weight = next(encoder.parameters())
    pixels = pixels.to(weight.device, weight.dtype)
    own = next(network.parameters())
    plain = network.config.kind == "plain"
    sides: list[tuple[Tensor]] = []
    for given in (pixels, torch.zeros_like(pixels)):
        output = encoder(given)
        seen = output.embeds if plain else output.hidden_states[-2]
        seen = torch.zeros_like(seen) if plain and given is not pixels else seen
        tokens = network(seen.to(own.device, own.dtype))
        sides.append((tokens.flatten(0, 1)[None],))
    return Shown(*sides)


def _added(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(first, second, strict=True)] if first else second


def _repeated(value: Tensor, rows: int) -> Tensor:
    return value.repeat_interleave(rows, dim=0) if value.shape[0] == 1 else value

"""Pictures that a denoiser is shown beside the sample: what a mask leaves, or a small version of it.

They are further channels of its input (Rombach et al. 2022, sections 4.4 and 4.5), as drawing makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.low_scale import low_scale
from sfumato.generation.canvas import resized_mask
from sfumato.training.data import Dataset, Placed, Position, to_tensor
from sfumato.training.masks import own_mask, random_mask
from sfumato.training.settings_diffusion import DiffusionTaskConfig

ENLARGE = 4  # where the recipe does not say
NOISE_LEVEL = 20  # of held-out pictures; what drawing takes too

Encode = Callable[[Tensor], Tensor]
"""Pictures (b, c, h, w) in -1..1 -> scaled latents (b, z, h/f, w/f)."""


class Inpainting:
    """Mask and masked picture, 1 + z channels in Stable Diffusion's order; what is masked is grey.

    data: the pictures, and those held out. Where they have masks of their own these are shown, else random
    ones; training pictures then come with their masks as one channel more (`masked`), cut and mirrored alike.
    """

    trained = False
    modules: Mapping[str, nn.Module] = {}

    def __init__(
        self, options: DiffusionTaskConfig, encode: Encode, seed: int, data: tuple[Dataset, Dataset]
    ) -> None:
        self.options, self.encode, self.seed = options, encode, seed
        self.masked, self.own = _with_masks(data[0]) is not None, _with_masks(data[1])

    def training(self, places: Sequence[Position], pictures: Tensor | None) -> Conditioning:
        assert pictures is not None
        if self.masked:
            return self.shown(pictures[:, :-1], self._hiding(places, pictures[:, -1:]))
        return self.shown(pictures, self._random(places, pictures))

    def held_out(self, indices: Sequence[int], pictures: Tensor | None) -> Conditioning:
        assert pictures is not None
        places = [Position(self.seed, -1, index, index) for index in indices]
        return self.shown(pictures, self.masks(places, pictures))

    def masks(self, places: Sequence[Position], pictures: Tensor) -> Tensor:
        """(b, 1, h, w) of held-out pictures, a function of the places alone."""
        if self.own is None:
            return self._random(places, pictures)
        # At the place that `picture` takes, so that what stands in for an unusable one has its own mask.
        found = [self.own.shown(Position(0, -1, each.index, each.index), ("mask",)) for each in places]
        return self._hiding(places, torch.stack([to_tensor(mask) for _, (mask,) in found]))

    def _random(self, places: Sequence[Position], pictures: Tensor) -> Tensor:
        height, width = pictures.shape[2:]
        share = self.options.mask_whole
        return torch.stack([random_mask(height, width, each.generator("mask"), share) for each in places])

    def _hiding(self, places: Sequence[Position], given: Tensor) -> Tensor:
        """Masks of pictures (b, 1, h, w) in -1..1 as 0 and 1, some of them of everything."""
        share = self.options.mask_whole
        pairs = zip(places, given, strict=True)
        return torch.stack([own_mask(mask, place.generator("mask"), share) for place, mask in pairs])

    def shown(self, pictures: Tensor, masks: Tensor) -> Conditioning:
        """The channels for masks (b, 1, h, w) of 0 and 1."""
        known = self.encode(pictures * (1 - masks.to(pictures)))
        small = resized_mask(masks, tuple(known.shape[2:])).to(known)
        return Conditioning(concat=torch.cat([small, known], dim=1))


class StretchedPicture:
    """In pixels: the picture made `enlarge` times smaller and stretched, c channels (Saharia et al. 2021).

    These are the channels of models that edit pictures, which drawing makes of a picture to start from; some
    are left out, for guidance by the picture (Brooks et al. 2023).
    """

    trained = False
    modules: Mapping[str, nn.Module] = {}

    def __init__(self, options: DiffusionTaskConfig) -> None:
        self.options = options

    def training(self, places: Sequence[Position], pictures: Tensor | None) -> Conditioning:
        assert pictures is not None
        small = noisy(self.small(pictures), places, self.options.small_noise)
        dropped = [float(torch.rand((), generator=each.generator("concat dropout"))) for each in places]
        kept = torch.tensor(dropped).to(small) >= self.options.concat_dropout
        return Conditioning(concat=_resized(small, pictures.shape[2:]) * kept.reshape(-1, 1, 1, 1))

    def held_out(self, indices: Sequence[int], pictures: Tensor | None) -> Conditioning:
        assert pictures is not None
        return Conditioning(concat=_resized(self.small(pictures), pictures.shape[2:]))

    def small(self, pictures: Tensor) -> Tensor:
        """(b, c, h / enlarge, w / enlarge) of pictures (b, c, h, w)."""
        factor = self.options.enlarge or ENLARGE
        return _resized(pictures, [max(1, side // factor) for side in pictures.shape[2:]])


class SmallPicture:
    """In latents: the picture itself, made as small as its latents, c channels (Rombach et al. 2022, 4.4).

    With `noise_levels` it is noised by a level by chance, which is the network's label, as in Stable
    Diffusion's upscaler (Ho et al. 2022, section 4.2). factor: pixels for each latent.
    """

    trained = False
    modules: Mapping[str, nn.Module] = {}

    def __init__(self, options: DiffusionTaskConfig, factor: int) -> None:
        self.options, self.factor = options, factor

    def training(self, places: Sequence[Position], pictures: Tensor | None) -> Conditioning:
        assert pictures is not None
        small = noisy(self.small(pictures), places, self.options.small_noise)
        levels = [
            int(torch.randint(max(1, self.options.noise_levels), (), generator=each.generator("noise level")))
            for each in places
        ]
        return self.noised(small, places, levels)

    def held_out(self, indices: Sequence[int], pictures: Tensor | None) -> Conditioning:
        assert pictures is not None
        level = min(NOISE_LEVEL, self.options.noise_levels - 1)
        places = [Position(0, -1, index, index) for index in indices]
        return self.noised(self.small(pictures), places, [level] * len(places))

    def noised(self, small: Tensor, places: Sequence[Position], levels: Sequence[int]) -> Conditioning:
        """Small pictures at levels, which are the labels too; as they are where there are no levels."""
        if not self.options.noise_levels:
            return Conditioning(concat=small)
        noise = [torch.randn(small.shape[1:], generator=place.generator("low scale")) for place in places]
        rows = [
            low_scale(each[None], level, one.to(each)[None])
            for each, one, level in zip(small, noise, levels, strict=True)
        ]
        return concatenate(rows)

    def small(self, pictures: Tensor) -> Tensor:
        """(b, c, h / factor, w / factor) of pictures (b, c, h, w)."""
        return _resized(pictures, [side // self.factor for side in pictures.shape[2:]])


def _with_masks(dataset: Dataset) -> Placed | None:
    """The data set, if there are masks beside its pictures."""
    return dataset if isinstance(dataset, Placed) and dataset.masked else None


def noisy(pictures: Tensor, places: Sequence[Position], most: float) -> Tensor:
    """Pictures with noise of a deviation between 0 and `most`, a function of their places."""
    if not most:
        return pictures
    found = []
    for place, each in zip(places, pictures, strict=True):
        generator = place.generator("small picture")
        amount = most * float(torch.rand((), generator=generator))
        found.append(each + amount * torch.randn(each.shape, generator=generator).to(each))
    return torch.stack(found)


def _resized(pictures: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(pictures, tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)

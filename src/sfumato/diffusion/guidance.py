"""Guidance: several conditional predictions made into one denoiser (Ho and Salimans 2022)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sfumato import errors
from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.prediction import ConditionalDenoiser

Branch = tuple[ConditionalDenoiser, Conditioning]


class Combine(Protocol):
    """How the branches' x0 become one; `needs` names the branches that have to be evaluated at this sigma."""

    def needs(self, sigma: float, /) -> Collection[str]: ...

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor: ...

    def rows(self, start: int, stop: int, /) -> Combine:
        """The same for the images start..stop alone; itself, where nothing is remembered of the images."""
        ...


@dataclass(frozen=True)
class Weighted:
    """The sum of the branches' x0 by weights that sum to 1; a branch of weight 0 is not evaluated.

    Such sums give the same on x0 as on eps or v. A single branch is returned as it is.
    """

    weights: tuple[tuple[str, float], ...]

    def needs(self, sigma: float, /) -> list[str]:
        """The branches with a weight other than 0."""
        return [name for name, weight in self.weights if weight != 0]

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor:
        """The guided x0."""
        if len(names := self.needs(sigma)) == 1:
            return predictions[names[0]]
        weights = dict(self.weights)
        total = weights[names[0]] * predictions[names[0]]
        for name in names[1:]:
            total = total + weights[name] * predictions[name]
        return total

    def rows(self, start: int, stop: int, /) -> Weighted:
        """Itself."""
        return self


def cfg(scale: float) -> Combine:
    """Classifier-free guidance of the branches "cond" and "uncond" (Ho and Salimans 2022, eq. 6).

    scale: 0 ignores the condition, 1 follows it, more exaggerates it; 0 and 1 evaluate one branch only. A
    negative prompt takes the place of the empty one in "uncond". The paper's weight w is scale - 1.
    """
    return composed(scale, [1.0])


def composed(scale: float, weights: Sequence[float]) -> Combine:
    """Several conditions at once, each with its weight (Liu et al. 2022, "concept conjunction").

    uncond + scale * sum of weights[i] * (cond_i - uncond), of the branches "cond", "cond1", "cond2", ... and
    "uncond". A negative weight leads away from its condition. `InputError` without any condition.
    """
    if not weights:
        raise errors.InputError("no conditions are composed", "Give the weight of one at least.")
    names = [f"cond{i or ''}" for i in range(len(weights))]
    shares = [scale * weight for weight in weights]
    rest = 1 - math.fsum(shares)
    rounded = 0.0 if abs(rest) < 1e-12 else rest  # 49 times 1 / 49 leaves nothing to "uncond"
    return Weighted((*zip(names, shares, strict=True), ("uncond", rounded)))


def image_cfg(scale: float, image_scale: float) -> Combine:
    """Guidance by a text and a picture, each with its scale (Brooks et al. 2023, eq. 3).

    uncond + image_scale * (image - uncond) + scale * (cond - image): "cond" knows both, "image" the picture
    alone, "uncond" neither.
    """
    return Weighted((("cond", scale), ("image", image_scale - scale), ("uncond", 1 - image_scale)))


@dataclass(frozen=True)
class Guided:
    """Conditions bound to their predictors, a `GuidedDenoiser`; made by `guided`."""

    branches: Mapping[str, Branch]
    combine: Combine
    batched: bool = True

    def __call__(self, x: Tensor, sigma: float, /) -> Tensor:
        """The guided x0, like x; `InputError` where a branch is needed that is not there."""
        return self.combine(x, sigma, self.evaluate(x, sigma, self.combine.needs(sigma)))

    def parts(self, x: Tensor, sigma: float, /) -> tuple[Tensor, Tensor]:
        """(guided, unguided) x0; the branch "uncond" is evaluated whether guidance needs it or not."""
        needed = list(self.combine.needs(sigma))
        predictions = self.evaluate(x, sigma, dict.fromkeys([*needed, "uncond"]))
        denoised = self.combine(x, sigma, {name: predictions[name] for name in needed})
        return denoised, predictions["uncond"]

    def rows(self, start: int, stop: int, /) -> Guided:
        """The same for the images start..stop of the batch alone."""
        branches = {name: (one, cond.rows(start, stop)) for name, (one, cond) in self.branches.items()}
        return replace(self, branches=branches, combine=self.combine.rows(start, stop))

    def evaluate(self, x: Tensor, sigma: float, names: Iterable[str]) -> dict[str, Tensor]:
        """The x0 of each named branch, in as few passes as can be, or one by one."""
        chosen = {name: self.branch(name) for name in names}
        return (_in_batches if self.batched else _one_by_one)(x, sigma, chosen)

    def branch(self, name: str) -> Branch:
        """The branch of that name; `InputError` where it is not given."""
        if name not in self.branches:
            raise errors.InputError(
                f"this guidance needs the branch {name!r}; given are {', '.join(map(repr, self.branches))}",
                "Give that condition, or a scale that does without it.",
            )
        return self.branches[name]


def guided(branches: Mapping[str, Branch], combine: Combine, *, batched: bool = True) -> Guided:
    """Bind conditions to their predictors: a denoiser D(x, sigma) -> x0 that also gives its parts.

    branches: name -> (predictor, conditioning of as many rows as x). Branches that share a predictor and
    the shapes of their conditionings run in one pass; batched=False makes every call one image and one
    condition, so that a picture cannot depend on its batch. `InputError` when `combine` asks for a branch
    that is not there.
    """
    return Guided(branches, combine, batched)


def _in_batches(x: Tensor, sigma: float, branches: Mapping[str, Branch]) -> dict[str, Tensor]:
    groups: list[list[str]] = []
    for name, (predictor, cond) in branches.items():
        for group in groups:
            other_predictor, other_cond = branches[group[0]]
            if predictor is other_predictor and cond.same_shape(other_cond):
                group.append(name)
                break
        else:
            groups.append([name])
    predictions: dict[str, Tensor] = {}
    for group in groups:
        predictor = branches[group[0]][0]
        cond = concatenate([branches[name][1] for name in group])
        x0 = predictor(torch.cat([x] * len(group)), sigma, cond)
        predictions.update(zip(group, x0.chunk(len(group)), strict=True))
    return predictions


def _one_by_one(x: Tensor, sigma: float, branches: Mapping[str, Branch]) -> dict[str, Tensor]:
    return {
        name: torch.cat([predictor(x[i : i + 1], sigma, cond.rows(i, i + 1)) for i in range(x.shape[0])])
        for name, (predictor, cond) in branches.items()
    }

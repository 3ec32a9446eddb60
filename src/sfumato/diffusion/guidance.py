"""Guidance: several conditional predictions made into one denoiser (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfumato import errors
from sfumato.conditioning import Conditioning, concatenate
from sfumato.diffusion.prediction import ConditionalDenoiser, Denoiser

Branch = tuple[ConditionalDenoiser, Conditioning]


class Combine(Protocol):
    """How the branches' x0 become one; `needs` names the branches that have to be evaluated at this sigma."""

    def needs(self, sigma: float, /) -> Collection[str]: ...

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFree:
    """scale * cond + (1 - scale) * uncond; 0 and 1 evaluate one branch only and return it as it is."""

    scale: float

    def needs(self, sigma: float, /) -> list[str]:
        """The branches with a weight other than 0."""
        weights = {"cond": self.scale, "uncond": 1 - self.scale}
        return [name for name, weight in weights.items() if weight != 0]

    def __call__(self, x: Tensor, sigma: float, predictions: Mapping[str, Tensor], /) -> Tensor:
        """The guided x0; weights that sum to 1 give the same on x0 as on eps or v."""
        if len(names := self.needs(sigma)) == 1:
            return predictions[names[0]]
        return self.scale * predictions["cond"] + (1 - self.scale) * predictions["uncond"]


def cfg(scale: float) -> Combine:
    """Classifier-free guidance of the branches "cond" and "uncond" (Ho and Salimans 2022, eq. 6).

    scale: 0 ignores the condition, 1 follows it, more exaggerates it. A negative prompt takes the place of
    the empty one in "uncond". The paper's weight w is scale - 1.
    """
    return ClassifierFree(scale)


def guided(branches: Mapping[str, Branch], combine: Combine, *, batched: bool = True) -> Denoiser:
    """Bind conditions to their predictors: a denoiser D(x, sigma) -> x0.

    branches: name -> (predictor, conditioning of as many rows as x). Branches that share a predictor and
    the shapes of their conditionings run in one pass; batched=False makes every call one image and one
    condition, so that a picture cannot depend on its batch. `InputError` when `combine` asks for a branch
    that is not there.
    """
    evaluate = _in_batches if batched else _one_by_one

    def denoise(x: Tensor, sigma: float) -> Tensor:
        needed = combine.needs(sigma)
        missing = [name for name in needed if name not in branches]
        if missing:
            raise errors.InputError(
                f"this guidance needs the branch {missing[0]!r}; given are {', '.join(map(repr, branches))}",
                "Give that condition, or a scale that does without it.",
            )
        predictions = evaluate(x, sigma, {name: branches[name] for name in needed})
        return combine(x, sigma, predictions)

    return denoise


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

"""When and how much a picture controls what is drawn (Zhang et al. 2023, section 3.4 and guess mode)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.prediction import ConditionalDenoiser
from sfumato.errors import InputError, nearest

Mode = Literal["balanced", "prompt", "control"]
MODES: dict[str, str] = {
    "balanced": "prompt and picture count alike",
    "prompt": "the prompt counts more: what is added to the finer levels fades",
    "control": "the picture counts more: it fades so too, and only guidance's conditional side sees it",
}
DECAY = 0.825  # from one residual to the next finer one: gradio_*.py of lllyasviel/ControlNet, guess mode
ROUNDING = 1e-9  # of step / steps against a fraction somebody wrote
MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class Influence:
    """How much a control counts, and when.

    weight: what it adds is multiplied by this. start, end: the fractions of the steps between which it is
    there at all; a step that lies in both wholly is. mode: a key of MODES. Raises InputError for others.
    """

    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: Mode = "balanced"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"there is no control mode {self.mode!r}", nearest(self.mode, MODES))
        if not (math.isfinite(self.weight) and abs(self.weight) <= MAX_WEIGHT):
            raise InputError(f"the weight of a control is {self.weight}", "Give a number, 0 to 2 as a rule.")
        if not 0 <= self.start <= self.end <= 1:
            raise InputError(
                f"a control starts at {self.start} and ends at {self.end}",
                "Give two fractions of the steps, 0 to 1, the smaller first.",
            )

    def active(self, step: int, steps: int) -> bool:
        """Whether it counts in a step, from 0, of so many."""
        begins, ends = step / steps, (step + 1) / steps
        return self.weight != 0 and begins >= self.start - ROUNDING and ends <= self.end + ROUNDING

    def unguided_weight(self) -> float:
        """Its weight on guidance's unconditional side."""
        return 0.0 if self.mode == "control" else self.weight

    def residual_weights(self, count: int) -> list[float]:
        """What each of `count` residuals is multiplied by beside the weight; the last is the middle's."""
        if self.mode == "balanced":
            return [1.0] * count
        return [DECAY ** (count - 1 - i) for i in range(count)]


@dataclass(frozen=True)
class Timed:
    """A conditional denoiser for each stage of a run: (the noise level at its end, P), the highest first."""

    stages: tuple[tuple[float, ConditionalDenoiser], ...]

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        """x0, as the stage that holds sigma sees it."""
        for level, predictor in self.stages:
            if sigma > level:
                return predictor(x, sigma, cond)
        return self.stages[-1][1](x, sigma, cond)


def timed(
    make: Callable[[tuple[bool, ...]], ConditionalDenoiser],
    influences: Sequence[Influence],
    sigmas: Sequence[float],
) -> ConditionalDenoiser:
    """P with the controls that are active at each noise level.

    make: P for the controls that are, one truth value for each. sigmas: the noise levels of the run,
    descending. Each P is made once; where nothing changes over the steps, it is the only one.
    """
    steps = max(len(sigmas) - 1, 1)
    made: dict[tuple[bool, ...], ConditionalDenoiser] = {}
    stages: list[tuple[float, ConditionalDenoiser]] = []
    for step in range(steps):
        active = tuple(influence.active(step, steps) for influence in influences)
        if active not in made:
            made[active] = make(active)
        level = sigmas[min(step + 1, len(sigmas) - 1)]
        if stages and stages[-1][1] is made[active]:
            stages.pop()
        stages.append((level, made[active]))
    return stages[0][1] if len(stages) == 1 else Timed(tuple(stages))


def weighted_hint(picture: Tensor, weight: float, mask: Tensor | None = None) -> Tensor:
    """A hint that carries its weight as one more channel: (b, c, h, w) -> (b, c + 1, h, w).

    mask: (1 or b, 1, h, w) in 0..1, where it counts; everywhere without one. So samples of one batch may have
    other weights, and the conditions of guidance share a pass.
    """
    weights = picture.new_full((picture.shape[0], 1, *picture.shape[2:]), weight)
    return torch.cat([picture, weights if mask is None else weights * mask], dim=1)


def weigh(residual: Tensor, weights: Tensor) -> Tensor:
    """A residual (b, c, *s) multiplied by weights (b, 1, *S), brought to its size by averaging."""
    if weights.shape[2:] != residual.shape[2:]:
        weights = F.interpolate(weights, size=residual.shape[2:], mode="area")
    return residual * weights.to(residual.dtype)

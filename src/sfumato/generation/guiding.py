"""How a request is guided: its conditions and methods made into one denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.prediction import GuidedDenoiser
from sfumato.model import StableDiffusion
from sfumato.request import Request


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


def denoiser(
    model: StableDiffusion, request: Request, conds: Mapping[str, Conditioning], sigmas: Sequence[float]
) -> GuidedDenoiser:
    """The model guided as the request says; `conds` by branch, a row for each picture."""
    assert request.guidance is not None
    predict = model.predictor()
    branches = {name: (predict, cond) for name, cond in conds.items()}
    return guided(branches, cfg(request.guidance), batched=not request.deterministic)

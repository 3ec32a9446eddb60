"""How fast samplers converge: the distance from a long run, over evaluations of the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError, nearest
from sfumato.generation.defaults import complete
from sfumato.generation.run import final_latents, stream
from sfumato.model import StableDiffusion
from sfumato.request import Request

REFERENCE = {"sampler": "heun", "steps": 1000, "spacing": "karras"}


@dataclass(frozen=True)
class Point:
    """One run: its evaluations of the guided network, and its root mean square error.

    The error is that of the latents of all pictures, as a share of the reference's root mean square.
    """

    sampler: str
    steps: int
    evaluations: int
    error: float


def deterministic() -> list[str]:
    """The samplers that converge to the picture of guidance, and whose number of steps is a choice."""
    return [
        name
        for name, row in SAMPLERS.items()
        if not row.stochastic and row.guidance is None and name != "dpm_adaptive"
    ]


def converge(
    model: StableDiffusion, request: Request, samplers: Sequence[str], evaluations: Sequence[int]
) -> Iterator[Point]:
    """Errors of each sampler at about each number of evaluations, computed as they are iterated.

    request: prompt, seed, number of pictures and guidance; each sampler runs with its own spacing unless the
    request names one. `InputError` for a name that is not in `deterministic()`.
    """
    for name in samplers:
        if name not in deterministic():
            raise InputError(f"{name!r} does not converge to one picture", nearest(name, deterministic()))
    request = request.model_copy(update={"seed": complete(model, request).seed})
    reference, _ = _run(model, request.model_copy(update=REFERENCE))
    scale = reference.square().mean().sqrt()
    for name in samplers:
        for wanted in evaluations:
            steps = max(1, round(wanted / SAMPLERS[name].evaluations))
            given = request.model_copy(update={"sampler": name, "steps": steps})
            latents, used = _run(model, given)
            error = (latents - reference).square().mean().sqrt() / scale
            yield Point(name, steps, used, float(error))


def _run(model: StableDiffusion, request: Request) -> tuple[Tensor, int]:
    """The last latents, and how often the network was asked."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = model.unet.register_forward_hook(count)
    try:
        *_, last = stream(model, request)
    finally:
        hook.remove()
    return final_latents(last), calls

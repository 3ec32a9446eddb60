"""`sfumato plot schedule`: the noise levels that spacings visit, as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sfumato.cli.options import Offline

if TYPE_CHECKING:
    from sfumato.diffusion.schedule import Schedule

SHOWN = ("uniform", "karras", "exponential", "beta", "kl_optimal", "align_your_steps")


def plot_schedule(
    *,
    spacing: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            metavar="NAME",
            show_default=False,
            help=f"Spacings to draw, as `sfumato samplers` lists them. [default: {' '.join(SHOWN)}]",
        ),
    ] = None,
    steps: Annotated[int, Parameter(help="Number of sampling steps.")] = 20,
    model: Annotated[
        str | None,
        Parameter(help="Model whose noise schedule is taken; Stable Diffusion's if none is given."),
    ] = None,
    offline: Offline = False,
    output: Annotated[
        Path, Parameter(alias="-o", help="PNG file to write, or a folder for schedule.png.")
    ] = Path("schedule.png"),
) -> None:
    """Draw the noise levels of spacings over the steps.

    The axis of the levels is logarithmic: a last level of 0 has no place on it.
    """
    # These import torch, which a help text can do without.
    from sfumato.charts import Axis, Line, chart, save
    from sfumato.cli.outputs import place
    from sfumato.diffusion.names import AUTOMATIC, resolve_spacing, spacing_title
    from sfumato.diffusion.spacing import space
    from sfumato.errors import InputError

    folder, stem = place(output)
    names = [resolve_spacing(name) for name in spacing or SHOWN]
    if AUTOMATIC in names:
        raise InputError("automatic is the spacing of a sampler, not one of its own", "Name that spacing.")
    schedule = _schedule(model, offline)
    lines = [
        Line(spacing_title(name), list(enumerate(space(name, schedule, steps).sigmas)))
        for name in dict.fromkeys(names)
    ]
    title = f"Noise levels of {steps} steps" if steps > 1 else "Noise levels of 1 step"
    picture = chart(lines, Axis("step"), Axis("noise level sigma", log=True), title=title)
    path = folder / f"{stem or 'schedule'}.png"
    save(picture, path)
    print(path)


def _schedule(model: str | None, offline: bool) -> Schedule:
    from sfumato.checkpoints.open import open_anything
    from sfumato.diffusion.schedule import Schedule, ScheduleConfig

    config = ScheduleConfig() if model is None else open_anything(model, offline=offline).config.schedule
    return Schedule(config)

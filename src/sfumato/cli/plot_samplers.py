"""`sfumato plot samplers`: how fast samplers converge on a model, as a chart."""

from __future__ import annotations

import json as text
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.options import Offline, takes_request
from sfumato.request import Request

SHOWN = ("euler", "ddim", "heun", "dpm2", "lms", "dpmpp_2m", "deis", "plms", "unipc", "dpm_fast")
EVALUATIONS = (5, 7, 10, 14, 20, 28, 40, 57, 80)


@takes_request
def plot_samplers(
    request: Request,
    *,
    samplers: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            metavar="NAME",
            show_default=False,
            help=f"Deterministic samplers to compare. [default: {' '.join(SHOWN)}]",
        ),
    ] = None,
    evaluations: Annotated[
        list[int] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            metavar="N",
            show_default=False,
            help=f"Evaluations of the network to compare at. [default: {' '.join(map(str, EVALUATIONS))}]",
        ),
    ] = None,
    model: Annotated[str | None, Parameter(metavar="MODEL", help="As in `sfumato generate`.")] = None,
    offline: Offline = False,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print the numbers too.")] = False,
    output: Annotated[
        Path, Parameter(alias="-o", help="PNG file to write, or a folder for samplers.png.")
    ] = Path("samplers.png"),
) -> None:
    """Draw the error of samplers against a run of 1000 Heun steps, over evaluations of the network.

    Every sampler has its own spacing, unless --spacing names one for all.
    """
    # These import torch, which a help text can do without.
    from sfumato.charts import Axis, Line, chart, save
    from sfumato.cli.outputs import place
    from sfumato.cli.progress import progress_line
    from sfumato.diffusion.names import resolve, title
    from sfumato.generation.convergence import converge
    from sfumato.model import load

    folder, stem = place(output)
    names = list(dict.fromkeys(resolve(name)[0] for name in samplers or SHOWN))
    counts = sorted(set(evaluations or EVALUATIONS))
    loaded = load(model, offline=offline, device=device)
    show, points = progress_line("sampling"), []
    for point in converge(loaded, request, names, counts):
        points.append(point)
        show(len(points), len(names) * len(counts))
        if json:
            print(text.dumps(point.__dict__), flush=True)
    lines = [
        Line(title(name), [(point.evaluations, point.error) for point in points if point.sampler == name])
        for name in names
    ]
    axes = Axis("evaluations of the network", log=True), Axis("error relative to 1000 steps", log=True)
    path = folder / f"{stem or 'samplers'}.png"
    save(chart(lines, *axes, title=f"Samplers on {loaded.name}"), path)
    print(path, file=sys.stderr if json else sys.stdout)

"""`sfumato plot training`: the metrics of runs as charts, beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def plot_training(
    *runs: Annotated[Path, Parameter(help="Folders of training runs.")],
    output: Annotated[
        Path, Parameter(alias="-o", help="PNG file to write, or a folder for curves.png.")
    ] = Path("curves.png"),
) -> None:
    """Draw losses, held-out scores and speed of training runs over the images seen."""
    # These import PIL, which a help text can do without.
    from sfumato.charts import save
    from sfumato.cli.outputs import place
    from sfumato.errors import InputError
    from sfumato.training.curves import curves, read_metrics

    if not runs:
        raise InputError(
            "no run is named", "Give the folders of one or several: sfumato plot training runs/a"
        )
    folder, stem = place(output)
    picture = curves({str(run): read_metrics(run) for run in runs})
    path = folder / f"{stem or 'curves'}.png"
    save(picture, path)
    print(path)

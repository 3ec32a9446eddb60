"""The metrics of runs as charts: losses and scores over the images seen, held-out loss by noise level."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from sfumato.charts import Axis, Line, chart, save
from sfumato.errors import InputError

METRICS, CURVES = "metrics.jsonl", "curves.png"
MOST = 400  # points of a line: beyond it neighbours are averaged
BIN = re.compile(r"(held_out_loss)_(\d+)$")  # of ranges of timesteps, the one with the least noise first
# Charts by what their lines' names hold, in the order they stand below each other.
CHARTS = {
    "loss": re.compile(r"(?:raw_)?(?:held_out_)?(?:loss|l1|mse)$"),
    "held-out loss by timestep": BIN,
    "PSNR in dB": re.compile(r".*psnr$"),
    "share": re.compile(r".*(?:accuracy|ssim|use|usage|used|nearest|busy)(?:_.*)?$"),
    "images per second": re.compile(r"images_per_second$"),
}
WIDTH, HEIGHT = 960, 420  # pixels of a chart


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics; `InputError` where it has none. Half a line, of a kill, is left out."""
    path = run / METRICS if run.is_dir() else run
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Give the folder of a run.") from error
    found = [values for line in text.splitlines() if (values := _read(line))]
    if not found:
        raise InputError(f"{path} holds no metrics", "Give the folder of a run that has begun.")
    return found


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Image.Image:
    """Charts of the metrics of runs by name; `InputError` where there is nothing to draw."""
    parts = []
    for title, pattern in CHARTS.items():
        lines = [
            line for name, metrics in runs.items() for line in _lines(name, metrics, pattern, len(runs) > 1)
        ]
        if lines:
            log = title.endswith("loss") or title == "loss"
            y = Axis(title, log=log and all(value > 0 for line in lines for _, value in line.points))
            parts.append(chart(lines, Axis("images seen"), y, size=(WIDTH, HEIGHT)))
    if not parts:
        raise InputError("there is nothing to draw yet", "Wait for the first line of metrics.")
    whole = Image.new("RGB", (WIDTH, HEIGHT * len(parts)), "white")
    for index, part in enumerate(parts):
        whole.paste(part, (0, index * HEIGHT))
    return whole


def draw_curves(run: Path) -> None:
    """Write `curves.png` into the folder of a run that has metrics; nothing where no chart has a line yet."""
    metrics = read_metrics(run)
    if any(list(_lines("", metrics, pattern, False)) for pattern in CHARTS.values()):
        save(curves({run.name: metrics}), run / CURVES)


def _lines(
    run: str, metrics: Sequence[Mapping[str, float]], pattern: re.Pattern[str], several: bool
) -> Iterator[Line]:
    """A line for each value whose name fits."""
    names = dict.fromkeys(name for values in metrics for name in values if pattern.fullmatch(name))
    for name in names:
        if pattern is not BIN and BIN.fullmatch(name):
            continue
        points = [(line["seen"], line[name]) for line in metrics if name in line and "seen" in line]
        shown = name.replace("_", " ")
        if points:
            yield Line(f"{run}: {shown}" if several else shown, _thinned(points))


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST` points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MOST)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _read(line: str) -> dict[str, float]:
    """The numbers of a line of metrics; none of one that is no such line."""
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(values, dict) or not isinstance(values.get("seen"), int | float):
        return {}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}

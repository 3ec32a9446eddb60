"""Charts: ticks are round, every line is there in its colour, nothing overlaps the names."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.charts import COLOURS, Axis, Line, chart, save, ticks
from sfumato.errors import InputError, ResourceError

STEP, SIGMA = Axis("step"), Axis("sigma", log=True)


def pixels(image: Image.Image, colour: str) -> np.ndarray:
    """Where the chart has this colour, a little blurred: (n, 2) of row and column."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(np.asarray(image).astype(int) - wanted).max(-1) < 30)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (-0.3, 10.3, False, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (0.0, 50.0, False, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50]),
        (-1.0, 1.0, False, [-1, -0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.025, 17.0, True, [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]),
        (0.02, 5000.0, True, [0.1, 1, 10, 100, 1000]),
        (3.1, 3.9, True, [3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8, 3.9]),
        (1e-30, 1e30, True, [10.0**power for power in range(-30, 31, 6)]),
        (2.0, 2.0, False, [2.0]),
    ],
)
def test_ticks(low: float, high: float, log: bool, expected: list[float]) -> None:
    assert ticks(low, high, log=log, most=12) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e9), st.booleans())
def test_ticks_lie_within_and_are_not_too_many(low: float, factor: float, log: bool) -> None:
    found = ticks(low, low * factor, log=log, most=12)
    assert 1 <= len(found) <= 13 and found == sorted(set(found))
    assert all(low * (1 - 1e-9) <= tick <= low * factor * (1 + 1e-9) for tick in found)


def test_every_line_is_drawn_where_it_belongs() -> None:
    lines = [
        Line("falls", [(step, 10 / 2**step) for step in range(8)]),
        Line("stays", [(0, 1.0), (7, 1.0)]),
        Line("ends at 0", [(0, 5.0), (6, 2.0), (7, 0.0)]),
    ]
    image = chart(lines, STEP, SIGMA, title="Three", size=(640, 400))
    assert image.size == (640, 400) and image.mode == "RGB"
    falls, stays, ends = (pixels(image, colour) for colour in COLOURS[: len(lines)])
    assert np.ptp(falls[:, 0]) > 250 > 150 > np.ptp(stays[:, 0])  # down all the chart; the legend is up there
    box = stays[:, 1] < 480
    assert np.ptp(stays[box][:, 0]) <= 12 and np.ptp(stays[box][:, 1]) > 300
    left, right = ends[ends[:, 1] < 480][:, 1].min(), ends[ends[:, 1] < 480][:, 1].max()
    assert right - left < 0.9 * np.ptp(falls[falls[:, 1] < 480][:, 1])  # its last point has no place


def test_the_names_stand_beside_the_lines() -> None:
    lines = [Line("x" * 20 + str(index), [(0, 1.0 + index), (9, 2.0 + index)]) for index in range(25)]
    image = chart(lines, STEP, Axis("value"), size=(700, 700))
    columns = pixels(image, COLOURS[1])[:, 1]
    gaps = np.diff(np.unique(columns))
    assert gaps.max() >= 12  # between the box and the samples of the lines
    dark = np.argwhere(np.asarray(image).sum(-1) < 200)
    assert dark[:, 1].max() < 698  # no name is cut off


def test_refused() -> None:
    for points in ([], [(0, 0.0), (1, -1.0)], [(0, math.nan)]):
        with pytest.raises(InputError, match="nothing to draw"):
            chart([Line("a", points)], STEP, SIGMA)
    with pytest.raises(InputError, match="no room beside the names"):
        chart([Line("a", [(0, 1.0)])], STEP, SIGMA, size=(120, 600))
    with pytest.raises(InputError, match="no room"):
        chart([Line("a" * 200, [(0, 1.0)])], STEP, SIGMA)
    assert chart([Line("one point", [(3, 1.0)])], STEP, SIGMA, size=(400, 300)).size == (400, 300)


def test_saved_whole_and_the_same_each_time(tmp_path: Path) -> None:
    lines = [Line("a", [(0, 1.0), (1, 3.0)])]
    for name in ("one.png", "two.png"):
        save(chart(lines, STEP, SIGMA, size=(300, 300)), tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png", formats=["PNG"]) as image:
        assert image.size == (300, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
    with pytest.raises(ResourceError):
        save(Image.new("RGB", (3, 3)), tmp_path / "one.png" / "a.png")

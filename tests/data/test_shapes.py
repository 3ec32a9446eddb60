"""Procedural shapes: an ordinary folder of pictures with captions, equal every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.shapes import COLOURS, GROUND, shapes, write_shapes
from sfumato.errors import InputError


def test_a_folder_of_pictures_with_captions(tmp_path: Path) -> None:
    assert write_shapes(tmp_path / "shapes", size=16) == 120
    pictures = sorted((tmp_path / "shapes").glob("*.png"))
    assert len(pictures) == 120
    assert all(path.with_suffix(".txt").exists() for path in pictures)
    path = tmp_path / "shapes" / "orange-star-left-000.png"
    assert path.with_suffix(".txt").read_text() == "an orange star on the left\n"
    with Image.open(path) as opened:
        assert opened.size == (16, 16) and opened.mode == "RGB"


@pytest.mark.parametrize("place", ["left", "right", "top", "bottom", "middle"])
def test_shapes_are_where_and_what_the_caption_says(place: str) -> None:
    found = {name: picture for name, _, picture in shapes(32)}
    pixels = np.asarray(found[f"blue-circle-{place}-000"]).astype(int)
    inside = np.abs(pixels - GROUND).sum(-1) > 100
    y, x = (axis.mean() / 31 - 0.5 for axis in np.nonzero(inside))
    wanted = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}[place]
    assert (round(x / 0.22), round(y / 0.22)) == wanted
    assert np.median(pixels[inside], axis=0).tolist() == list(COLOURS["blue"])


def test_copies_differ_and_repeat() -> None:
    first = [(name, picture.tobytes()) for name, _, picture in shapes(16, copies=2)]
    assert first == [(name, picture.tobytes()) for name, _, picture in shapes(16, copies=2)]
    assert len({data for _, data in first}) > 200
    other = [picture.tobytes() for _, _, picture in shapes(16, copies=2, seed=1)]
    assert other != [data for _, data in first]


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size 4"):
        write_shapes(tmp_path, size=4)
    with pytest.raises(InputError, match="copies 0"):
        write_shapes(tmp_path, copies=0)

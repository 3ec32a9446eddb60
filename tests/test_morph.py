"""Frames written as moving pictures, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import InputError
from sfumato.morph import write_animation


def frames(count: int = 4, size: tuple[int, int] = (24, 16)) -> list[Image.Image]:
    width, height = size
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    return [Image.fromarray(np.roll(ramp, index, axis=1)) for index in range(count)]


def played(path: Path) -> tuple[list[Image.Image], Image.Image]:
    with Image.open(path, formats=["GIF", "WEBP", "PNG"]) as opened:
        found = []
        for index in range(getattr(opened, "n_frames", 1)):
            opened.seek(index)
            found.append(opened.convert("RGB"))
        return found, opened.copy()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_every_format_gives_its_frames_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"morph{suffix}"
    write_animation(frames(), path, milliseconds=120, quality=100)
    found, _ = played(path)
    assert len(found) == 4
    for given, wanted in zip(found, frames(), strict=True):
        difference = np.abs(np.array(given, dtype=int) - np.array(wanted, dtype=int))
        assert difference.mean() < (8 if suffix == ".gif" else 0.01)


def test_back_and_forth_leaves_out_both_ends(tmp_path: Path) -> None:
    write_animation(frames(), tmp_path / "a.webp", back_and_forth=True, quality=100)
    found, _ = played(tmp_path / "a.webp")
    assert len(found) == 6
    assert found[4].tobytes() == found[2].tobytes() and found[5].tobytes() == found[1].tobytes()


def test_a_gif_says_how_long_and_how_often(tmp_path: Path) -> None:
    def loop(repeats: int) -> object:
        write_animation(frames(), tmp_path / "a.gif", milliseconds=120, repeats=repeats)
        with Image.open(tmp_path / "a.gif", formats=["GIF"]) as opened:
            assert opened.info["duration"] == 120
            return opened.info.get("loop")

    assert [loop(repeats) for repeats in (0, 1, 3)] == [0, None, 2]


def test_one_frame_is_a_picture(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp", ".png"):
        write_animation(frames(1), tmp_path / f"a{suffix}", back_and_forth=True)
        assert len(played(tmp_path / f"a{suffix}")[0]) == 1


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    with pytest.raises(InputError, match="moving pictures are not written"):
        write_animation(frames(), tmp_path / "a.mp4")
    with pytest.raises(InputError, match="no frames"):
        write_animation([], path)
    with pytest.raises(InputError, match="different sizes"):
        write_animation([*frames(1), *frames(1, (8, 8))], path)
    with pytest.raises(InputError, match="0 ms"):
        write_animation(frames(), path, milliseconds=0)
    assert list(tmp_path.iterdir()) == []

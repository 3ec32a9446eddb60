"""Frames written as moving pictures, read back."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato import Request
from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.generation import generate
from sfumato.generation.morphing import morph
from sfumato.model import StableDiffusion
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
        write_animation(frames(), tmp_path / "a.avi")
    with pytest.raises(InputError, match="no frames"):
        write_animation([], path)
    with pytest.raises(InputError, match="different sizes"):
        write_animation([*frames(1), *frames(1, (8, 8))], path)
    with pytest.raises(InputError, match="0 ms"):
        write_animation(frames(), path, milliseconds=0)
    assert list(tmp_path.iterdir()) == []


def test_a_video_plays_its_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    odd = frames(count=5, size=(25, 17))
    write_animation(odd, tmp_path / "a.mp4", milliseconds=40, back_and_forth=True, quality=100)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.width, stream.height, float(stream.average_rate)) == (26, 18, 25)
    assert len(found) == 8
    for given, wanted in zip(found, odd, strict=False):
        difference = np.abs(given[:17, :25].astype(int) - np.array(wanted, dtype=int))
        assert difference.mean() < 12  # colours are stored for four pixels together


# Ways between prompts


def way(model: StableDiffusion, *prompts: str, **options: Any) -> list[Image.Image]:
    asked = Request(steps=2, seed=3, sampler="euler")
    return list(morph(model, asked, prompts, **{"frames": 3, **options}))


def test_a_way_goes_through_its_prompts(tiny_model: StableDiffusion) -> None:
    found = way(tiny_model, "a red apple", "a blue apple", seeds=[3, 8])
    assert len(found) == 4
    for picture, prompt, seed in ((found[0], "a red apple", 3), (found[-1], "a blue apple", 8)):
        alone = generate(tiny_model, Request(prompt=prompt, steps=2, seed=seed, sampler="euler")).images[0]
        difference = np.abs(np.array(alone, dtype=int) - np.array(picture, dtype=int))
        assert difference.max() <= 1  # drawn in a batch
    distances = [
        np.abs(np.array(a, dtype=int) - np.array(b, dtype=int)).mean() for a, b in itertools.pairwise(found)
    ]
    whole = np.abs(np.array(found[0], dtype=int) - np.array(found[-1], dtype=int)).mean()
    assert max(distances) < whole
    assert len(way(tiny_model, "a red apple", "a blue apple", loop=True)) == 6


def test_a_way_in_parts_is_the_same(tiny_model: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = way(tiny_model, "a red apple", "a fox")
    monkeypatch.setattr("sfumato.generation.morphing.BATCH", 3)
    for one, two in zip(whole, way(tiny_model, "a red apple", "a fox"), strict=True):
        assert np.abs(np.array(one, dtype=int) - np.array(two, dtype=int)).max() <= 1


def test_ways_that_are_none(tiny_model: StableDiffusion) -> None:
    with pytest.raises(InputError, match="1 stations"):
        way(tiny_model, "a fox")
    with pytest.raises(InputError, match="2 prompts have 3 seeds"):
        way(tiny_model, "a fox", "an apple", seeds=[1, 2, 3])
    with pytest.raises(InputError, match="hires is given"):
        list(morph(tiny_model, Request(hires=2), ["a", "b"], 2))


def test_the_command(tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["morph", "a red apple", "--model", str(tiny_model_file), "--steps", "1", "--frames", "2"]
    path = tmp_path / "way.webp"
    assert main([*asked, "--to", "a fox", "--to", "a blue apple", "--seeds", "1,2,3", "-o", str(path)]) == 0
    assert len(played(path)[0]) == 5 and capsys.readouterr().out == f"{path}\n"
    assert main([*asked, "-o", str(path)]) == 2 and "two prompts" in capsys.readouterr().err
    assert main([*asked, "--to", "a fox", "--seeds", "1;2"]) == 2 and "with commas" in capsys.readouterr().err
    assert main([*asked, "--to", "a fox", "-o", "way.avi"]) == 2

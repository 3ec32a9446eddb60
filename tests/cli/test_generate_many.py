"""`sfumato generate` in other formats, and of many prompts: from a file, and as a matrix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.recipes import read


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def draw(model: Path, *words: str) -> int:
    return main(["generate", *words, "--steps", "1", "--model", str(model)])


def test_formats_by_name_and_by_option(place: Path, tiny_model_file: Path) -> None:
    kinds = {"a.png": "PNG", "b.jpg": "JPEG", "c.JPEG": "JPEG", "d.webp": "WEBP"}
    for name in kinds:
        assert draw(tiny_model_file, "fox", "--seed", "1", "-o", name, "--quality", "80") == 0
    assert draw(tiny_model_file, "fox", "--seed", "1", "--format", "webp", "--grid") == 0
    kinds |= {"fox-1.webp": "WEBP", "fox-1-grid.webp": "WEBP"}
    assert sorted(os.listdir(place)) == sorted(kinds)
    for name, kind in kinds.items():
        with Image.open(name, formats=[kind]) as image:
            assert image.size == (16, 16)
        found = read(place / name)
        assert found.values["prompt"] == "fox" and found.values.get("quality") == (
            None if kind == "PNG" else 95 if name.startswith("fox") else 80
        )


def test_formats_that_are_refused(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["fox", "-o", "a.png", "--format", "jpg"], "a.png is no jpg file"),
        (["fox", "--quality", "0"], "quality is 0"),
        (["fox", "-o", "a.gif"], "a.gif is no name of a picture"),
        (["word " * 20_000, "-o", "a.jpg"], "too long for a JPEG"),
    ):
        assert draw(tiny_model_file, *words) == 2
        assert message in capsys.readouterr().err
    assert os.listdir(place) == []


def test_prompts_from_a_file(place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.txt").write_text('a fox --seed 3\n# no\n--prompt "a red apple" --n dark --steps 2 --l 2\n')
    assert draw(tiny_model_file, "--from-file", "prompts.txt", "--seed", "9", "--sampler", "euler") == 0
    assert capsys.readouterr().out.split() == ["a-fox-3.png", "a-red-apple-9.png"]
    request = read(place / "a-red-apple-9.png").request
    assert request is not None
    assert (request.steps, request.guidance, request.negative_prompt, request.sampler) == (
        2, 2, "dark", "euler",
    )  # fmt: skip
    assert draw(tiny_model_file, "--from-file", "prompts.txt", "-o", "out/x.jpg", "--grid") == 0
    assert sorted(os.listdir("out")) == ["x-0.jpg", "x-1.jpg", "x-grid.jpg"]


def test_a_line_that_is_wrong_is_told_before_anything_is_drawn(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("a fox\na cat --sedd 4\n")
    assert draw(tiny_model_file, "--from-file", "prompts.txt") == 2
    assert "line 2 of prompts.txt: there is no option 'sedd'" in capsys.readouterr().err
    assert draw(tiny_model_file, "fox", "--from-file", "prompts.txt") == 2
    assert draw(tiny_model_file, "--matrix") == 2
    assert draw(tiny_model_file, "a|b", "--matrix", "--from-file", "prompts.txt") == 2
    assert os.listdir(place) == ["prompts.txt"]


def test_a_matrix(place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tiny_model_file, "a fox|in snow", "--matrix", "--grid") == 0
    one, two, sheet = capsys.readouterr().out.split()
    requests = [read(place / name).request for name in (one, two)]
    assert [request.prompt for request in requests if request] == ["a fox", "a fox, in snow"]
    assert len({request.seed for request in requests if request}) == 1, "one seed for all"
    assert sheet.startswith("a-fox-in-snow-") and sheet.endswith("-grid.png")
    found = read(place / sheet)
    assert found.values["prompt"] == "a fox|in snow" and found.values["grid"] == 2

"""`sfumato grid`: labelled sheets, and everything that is refused before anything is drawn."""

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


def grid(model: Path, *words: str) -> int:
    return main(["grid", *words, "--steps", "1", "--model", str(model)])


def test_three_axes(place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a red apple", "--x", "sampler=euler,DPM++ 2M Karras", "--y", "guidance=1..3/2", "--z",
             "prompt:apple=fox,pear", "--seed", "4", "--cells-too"]  # fmt: skip
    assert grid(tiny_model_file, *words) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 9 and out.split()[-1] == "a-red-apple-4-grid.png"
    assert err.startswith("8 pictures in ") and err.endswith("seed 4, tiny\n")
    found = read(place / "a-red-apple-4-grid.png")
    assert found.values["prompt"] == "a red apple"
    assert found.values["grid"] == {
        "x": {"axis": "sampler=euler,DPM++ 2M Karras", "values": ["euler", "DPM++ 2M Karras"]},
        "y": {"axis": "guidance=1..3/2", "values": ["1", "3"]},
        "z": {"axis": "prompt:apple=fox,pear", "values": ["fox", "pear"]},
    }
    cells = [read(place / name).request for name in out.split()[:-1]]
    assert [(cell.prompt, cell.guidance, cell.sampler, cell.seed) for cell in cells if cell] == [
        (f"a red {word}", guidance, sampler, 4)
        for word in ("fox", "pear") for guidance in (1, 3) for sampler in ("euler", "dpmpp_2m")
    ]  # fmt: skip
    assert main(["replay", "a-red-apple-4-grid.png", "--model", str(tiny_model_file)]) == 2
    assert "a sheet of several" in capsys.readouterr().err


def test_cells_have_one_seed_unless_it_is_an_axis(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grid(tiny_model_file, "fox", "--y", "guidance=2,2", "-o", "a.png", "--cells-too") == 0
    one, two = (Path(name) for name in capsys.readouterr().out.split()[:-1])
    assert one.read_bytes() == two.read_bytes() and one.name == "a-0.png"
    assert grid(tiny_model_file, "fox", "--x", "seed=1..2", "-o", "b.webp") == 0
    with Image.open("b.webp", formats=["WEBP"]) as sheet:
        assert sheet.width > 2 * 128, "small pictures are shown larger"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fox"], "no axis is given"),
        (["fox", "--x", "steps=1,0"], "axis steps: steps is 0"),
        (
            ["fox", "--x", "sampler=euler,lms", "--y", "sampler_options.s_churn=1"],
            "lms has no option 's_churn'",
        ),
        (["fox", "--x", "width=16,18"], "cannot draw 18x16"),
        (["fox", "--x", "width=16,32"], "cells have different sizes"),
        (["fox", "--x", "spacing=karras,lcm", "--y", "spacing_options.rho=3"], "rho"),
        (["fox", "--x", "seed=1", "--num-images", "2"], "a cell holds one picture"),
        (["fox", "--x", "label=1"], "label"),
        (["fox", "--x", "seed=1", "-o", "a.gif"], "a.gif is no name of a picture"),
        (["fox", "--x", "seed=1..900"], "the sheet would have"),
    ],
)
def test_what_is_refused_before_anything_is_drawn(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert grid(tiny_model_file, *words) == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == "" and os.listdir(place) == []

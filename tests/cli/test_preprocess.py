"""`sfumato preprocess` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.preprocess import PREPROCESSORS, preprocess


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    return path


def test_a_control_picture_lies_beside_the_picture(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "canny", str(picture)]) == 0
    made = picture.with_name("photo-canny.png")
    assert capsys.readouterr().out == f"{made}: 40x30\n"
    with Image.open(made, formats=["PNG"]) as found, Image.open(picture, formats=["PNG"]) as given:
        assert found.tobytes() == preprocess("canny", given).tobytes()


def test_options_and_an_output_of_ones_own(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "edges.png"
    words = ["preprocess", "canny", str(picture), "-o", str(target), "--option", "low=20", "high=40"]
    assert main(words) == 0
    with Image.open(target, formats=["PNG"]) as found, Image.open(picture, formats=["PNG"]) as given:
        assert found.tobytes() == preprocess("canny", given, {"low": 20, "high": 40}).tobytes()
    assert main(["preprocess", "invert", str(picture), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "photo-invert.png").is_file()


def test_the_list_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(kind in listed for kind in PREPROCESSORS)
    assert "low=100 high=200" in listed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cany", "photo.png"], "canny"),
        (["canny", "missing.png"], "does not exist"),
        (["canny"], "--list"),
        (["canny", "photo.png", "--option", "low"], "NAME=NUMBER"),
        (["canny", "photo.png", "--option", "low=nan"], "NAME=NUMBER"),
        (["canny", "photo.png", "--option", "lwo=3"], "low"),
        (["canny", "photo.png", "-o", "edges.jpg"], "edges.png"),
    ],
)
def test_mistakes_are_told(
    picture: Path,
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(picture.parent)
    assert main(["preprocess", *words]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in picture.parent.iterdir()] == ["photo.png"]

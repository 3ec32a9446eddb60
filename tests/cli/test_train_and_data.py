"""`sfumato train` and `sfumato data build`: what they hand on, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfumato.cli import main
from sfumato.cli.progress import progress_line
from sfumato.cli.train import line, reporter


def test_a_recipe_and_its_overrides_reach_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def run(config: Path, overrides: list[str], report: Any) -> Path:
        seen.extend([config, overrides])
        report({"seen": 1000, "loss": 0.123456, "images_per_second": 51.0, "seconds_left": 3725.0})
        return Path("runs/model.safetensors")

    monkeypatch.setattr("sfumato.training.run", run)
    assert main(["train", "recipe.toml", "--loop.images=5", "--data.path", "my pictures", "--seed=-1"]) == 0
    assert seen == [Path("recipe.toml"), ["--loop.images=5", "--data.path=my pictures", "--seed=-1"]]
    out, err = capsys.readouterr()
    assert out == "runs/model.safetensors\n"
    assert err == "1,000 images  loss 0.1235  51.0 images/s  1:02:05 left\n"


def test_a_terminal_shows_one_line_and_gets_its_cursor_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), reporter() as report:
        report({"seen": 1000, "images_per_second": 51.0})
        report({"seen": 1000, "held_out_loss": 0.25})
        report({"warning": "state [red]3[/red] is damaged"})
        raise KeyboardInterrupt
    err = capsys.readouterr().err
    assert "1,000 images  held_out_loss 0.25\n" in err and "state [red]3[/red] is damaged\n" in err
    assert err.rindex("\x1b[?25h") > err.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_recipe_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "missing.toml")]) == 2
    assert "missing.toml" in capsys.readouterr().err


def test_warnings_are_lines_too() -> None:
    assert line({"warning": "state 3 is damaged"}) == "warning: state 3 is damaged"
    assert line({"seen": 2, "held_out_loss": 0.5}) == "2 images  held_out_loss 0.5"


def test_what_the_builder_of_illustrations_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def build(out: Path, **options: Any) -> None:
        seen.update(options, out=out)
        options["progress"]("drawings", 1, 2)

    monkeypatch.setattr("sfumato.data.illustrations.build", build)
    words = ["--out", "set", "--size", "32", "--domain", "full", "--styles", "noto", "--styles", "blob",
             "--npm-dir", "tarballs", "--seed", "4"]  # fmt: skip
    assert main(["data", "build", "illustrations", *words]) == 0
    del seen["progress"]
    assert seen == {
        "out": Path("set"), "size": 32, "domain": "full", "styles": ["noto", "blob"],
        "npm_dir": Path("tarballs"), "seed": 4,
    }  # fmt: skip
    assert capsys.readouterr() == ("set\n", "")


def test_shapes_are_pictures_with_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path / "set"), "--size", "16", "--copies", "1", "--seed", "4"]
    assert main(["data", "build", "shapes", *words]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set'}\n"
    pictures = sorted((tmp_path / "set").glob("*.png"))
    assert len(pictures) == 120 and all(path.with_suffix(".txt").read_text() for path in pictures)


def test_the_progress_line_is_for_terminals_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress_line("drawing")(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    show = progress_line("drawing")
    show(1, 4)
    show(2, 4)  # too soon after the first to be drawn again
    show(4, 4)
    err = capsys.readouterr().err
    assert err.count("\r") == 2 and "1/4" in err and "2/4" not in err and err.endswith("\x1b[K\n")

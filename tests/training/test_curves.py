"""Metrics as charts and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.training.board import Board
from sfumato.training.curves import (
    BIN,
    CHARTS,
    HEIGHT,
    MOST,
    _lines,
    _thinned,
    curves,
    draw_curves,
    read_metrics,
)


def run(folder: Path, lines: int = 30, **more: float) -> Path:
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for index in range(1, lines + 1):
            file.write(json.dumps({"seen": 10 * index, "loss": 1 / index, "images_per_second": 50.0}) + "\n")
            if index % 10 == 0:
                held_out = {"held_out_loss": 0.5, "held_out_loss_0": 0.9, "held_out_loss_3": 0.1, **more}
                file.write(json.dumps({"seen": 10 * index, **held_out}) + "\n")
        file.write('{"seen": 10000, "lo')
    return folder


def test_a_run_has_a_chart_for_every_kind_of_metric(tmp_path: Path) -> None:
    metrics = read_metrics(run(tmp_path / "a", held_out_psnr=26.0, nearest=0.5))
    assert len(metrics) == 33
    assert curves({"a": metrics}).size == (960, 5 * HEIGHT)
    plain = curves({"a": [{"seen": 1.0, "loss": 0.5}, {"seen": 2.0, "loss": 0.25}]})
    assert plain.size == (960, HEIGHT) and np.asarray(plain).std() > 0
    draw_curves(tmp_path / "a")
    with Image.open(tmp_path / "a" / "curves.png") as image:
        assert image.height == 5 * HEIGHT
    (tmp_path / "metrics.jsonl").write_text('{"seen": 1, "other": 2}\n')
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_lines_and_their_names(tmp_path: Path) -> None:
    metrics = read_metrics(run(tmp_path / "a"))
    assert [line.name for line in _lines("a", metrics, CHARTS["loss"], False)] == ["loss", "held out loss"]
    assert [line.name for line in _lines("a", metrics, BIN, True)] == [
        "a: held out loss 0",
        "a: held out loss 3",
    ]
    (loss, _) = _lines("a", metrics, CHARTS["loss"], False)
    assert loss.points[1] == (20, 0.5)


def test_long_runs_are_averaged() -> None:
    thin = _thinned([(float(x), float(x % 2)) for x in range(4 * MOST)])
    assert len(thin) == MOST and all(y == 0.5 for _, y in thin) and thin[0][0] == 1.5


def test_runs_beside_each_other_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = run(tmp_path / "a"), run(tmp_path / "b", 20)
    assert main(["plot", "training", str(one), str(two), "-o", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.png'}\n"
    assert main(["plot", "training"]) == 2 and "no run" in capsys.readouterr().err
    assert main(["plot", "training", str(tmp_path / "c")]) == 2


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\nx\n", '{"seen": "a"}\n'])
def test_what_holds_no_metrics(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match="holds no metrics"):
        read_metrics(tmp_path)
    with pytest.raises(InputError, match="nothing to draw"):
        curves({"a": [{"seen": 1.0}]})


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = Board(tmp_path, 0)
    board.write({"seen": 10, "loss": 0.5})
    board.write({"seen": 20, "loss": 0.25})
    Board(tmp_path, 20).write({"seen": 20, "loss": 0.125})  # resumed from image 20
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(10, 0.5), (20, 0.125)]

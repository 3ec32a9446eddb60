"""`sfumato samplers` and `sfumato plot schedule`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.charts import COLOURS
from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.cli import main
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacing import SPACINGS


def colours(path: Path) -> int:
    """How many of the palette's colours a chart has, but for its grey, which letters have too."""
    with Image.open(path, formats=["PNG"]) as image:
        found = np.asarray(image.convert("RGB")).astype(int)
    wanted = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS[:-1]]
    return sum(int((np.abs(found - np.array(one)).max(-1) < 3).sum()) > 20 for one in wanted)


def test_the_tables_have_a_line_for_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers"]) == 0
    out, err = capsys.readouterr()
    first, second = out.rstrip("\n").split("\n\n")
    assert err == ""
    assert [line.split()[0] for line in first.splitlines()] == ["sampler", *SAMPLERS]
    assert [line.split()[0] for line in second.splitlines()] == ["spacing", *SPACINGS]
    euler, heading = (next(line for line in first.splitlines() if line.startswith(word + " "))
                      for word in ("euler_a", "sampler"))  # fmt: skip
    assert euler[heading.index("noise") :].split()[:2] == ["yes", SAMPLERS["euler_a"].spacing]
    assert euler[heading.index("title") :].startswith("Euler a ") and "eta" in euler
    assert all(line == line.rstrip() for line in out.splitlines())
    karras = next(line for line in second.splitlines() if line.startswith("karras"))
    assert karras.endswith("rho=7.0, sigma_min, sigma_max")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in values["samplers"]] == list(SAMPLERS)
    assert [row["name"] for row in values["spacings"]] == list(SPACINGS)
    for row in values["samplers"]:
        known = SAMPLERS[row["name"]]
        assert row["order"] == known.order and row["stochastic"] is known.stochastic
        assert set(row["options"]) == set(known.options) - {"schedule"}
    rho = next(row for row in values["spacings"] if row["name"] == "karras")["options"]
    assert rho == {"rho": 7.0, "sigma_min": None, "sigma_max": None}


def test_a_chart_of_the_noise_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "levels.png"
    assert main(["plot", "schedule", "--spacing", "Karras", "ays", "SGM Uniform", "--steps", "8",
                 "-o", str(path)]) == 0  # fmt: skip
    assert capsys.readouterr().out == f"{path}\n"
    assert colours(path) == 3


def test_a_chart_into_a_folder(tmp_path: Path) -> None:
    assert main(["plot", "schedule", "--output", str(tmp_path)]) == 0
    assert colours(tmp_path / "schedule.png") == 6


def test_the_schedule_of_a_model(tiny_model_file: Path, tmp_path: Path) -> None:
    tensors, metadata = read_tensors(tiny_model_file)
    config = json.loads(metadata["sfumato"])
    config["schedule"]["beta_end"] = 0.02
    other = tmp_path / "other.safetensors"
    write_tensors(other, tensors, {**metadata, "sfumato": json.dumps(config)})
    charts = []
    for model in (tiny_model_file, other):
        path = tmp_path / f"{model.stem}.png"
        assert (
            main(["plot", "schedule", "--spacing", "trailing", "--model", str(model), "-o", str(path)]) == 0
        )
        charts.append(path.read_bytes())
    assert charts[0] != charts[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--spacing", "karas"], "Did you mean 'karras'?"),
        (["--spacing", "auto"], "automatic is the spacing of a sampler"),
        (["--spacing", "trailing", "--steps", "1001"], "allowed is 1 to 1000"),
        (["--steps", "0"], "steps is 0"),
        (["-o", "levels.gif"], "levels.png"),
    ],
)
def test_refused(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "schedule", *words]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

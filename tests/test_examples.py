"""The examples run as their pages say."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.cli import main

ROOT = Path(__file__).parents[1]
REPRODUCTION = ROOT / "examples" / "reproduction"
TINY = [
    "--epochs=1", "--batch_size=2", "--input_height=8", "--input_width=8", "--model_channels=4",
    "--channel_mult=[1,2]", "--num_heads=2", "--timesteps=4", "--samples=1", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Overrides: a folder of two pictures, and a save_path in it as the notes have."""
    (tmp_path / "pic").mkdir()
    for index in range(2):
        Image.fromarray(np.full((9, 9), 90 * index, np.uint8)).save(tmp_path / "pic" / f"{index}.png")
    return [f"--dataset_path={tmp_path / 'pic'}", f"--save_path={tmp_path / 'pic' / 'test_pic'}"]


def test_the_reproduction(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", *given, *TINY])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPRODUCTION / "main.py"), run_name="__main__")
    assert ended.value.code == 0
    run = tmp_path / "pic" / "test_pic"
    assert (run / "epoch-0001.png").exists()
    assert sfumato.generate(sfumato.load(run), sfumato.Request(seed=0)).images[0].size == (8, 8)


def test_it_runs_as_it_stands_on_its_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(
        REPRODUCTION, tmp_path / "reproduction", ignore=shutil.ignore_patterns("test_pic", "0[1-9]*", "1*")
    )
    monkeypatch.setattr(sys, "argv", ["main.py", *TINY])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(copy / "main.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "there is no folder /mnt/Unet/pic" in capsys.readouterr().err
    assert (copy / "pictures" / "test_pic" / "epoch-0001.png").exists()


def test_its_plan(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ini = str(REPRODUCTION / "config" / "config_SD.ini")
    assert main(["train", ini, *given, *TINY, "--epochs=3", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "for 3 steps" in printed.out and "abar_T" in printed.err
    assert not (tmp_path / "pic" / "test_pic").exists()


def test_a_key_that_is_not_there(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", *given, "--epoch=1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPRODUCTION / "main.py"), run_name="__main__")
    assert ended.value.code == 2


def test_both_pages_name_every_key() -> None:
    keys = [
        line.partition("=")[0].strip()
        for line in (REPRODUCTION / "config" / "config_SD.ini").read_text(encoding="utf-8").splitlines()
        if "=" in line and not line.startswith((" ", "["))
    ]
    assert len(keys) == 26
    for page in ("README.md", "README.zh.md"):
        text = (REPRODUCTION / page).read_text(encoding="utf-8")
        assert [key for key in keys if f"`{key}`" not in text] == [], page


@pytest.mark.slow
def test_the_command_of_the_page(given: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "main.py", *given, *TINY]
    done = subprocess.run(
        words, cwd=REPRODUCTION, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "abar_T" in done.stderr and "left out" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "pic" / "test_pic" / "model.safetensors")

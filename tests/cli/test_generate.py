"""`sfumato generate` from the words to the file, and everything that can stand in its way."""

from __future__ import annotations

import errno
import math
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli import main
from sfumato.errors import CheckpointError
from sfumato.model import StableDiffusion
from sfumato.recipes import read


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values_of(path: Path) -> dict[str, Any]:
    """What the file says."""
    return read(path).values


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_picture_with_its_parameters(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a red apple", "--seed", "3", "--model", str(tiny_model_file)]) == 0
    out, err = capsys.readouterr()
    assert out == "a-red-apple-3.png\n" and names(place) == ["a-red-apple-3.png"]
    assert err.startswith("1 picture in ") and err.endswith(" s, seed 3, tiny\n")
    values = values_of(place / "a-red-apple-3.png")
    assert (values["prompt"], values["seed"], values["steps"], values["model"]) == (
        "a red apple",
        3,
        4,
        "tiny",
    )
    assert len(values["model_digest"]) == 64
    with Image.open("a-red-apple-3.png") as image:
        assert image.size == (16, 16) and len(image.getcolors() or []) > 20


def test_every_option_reaches_the_request(place: Path, tiny_model_file: Path) -> None:
    np.save("start.npy", np.random.default_rng(0).standard_normal((2, 8, 4), dtype=np.float32))
    words = ["--prompt", "a fox", "--negative-prompt", "a red apple", "--steps", "3", "--sampler", "ddim",
             "--spacing", "uniform", "--eta", "0.5", "--guidance", "2", "--seed", "9", "--width", "8",
             "--height", "16", "--num-images", "2", "--deterministic", "--start-noise", "start.npy",
             "--shared-start", "--clip-skip", "1", "--zeros-for-empty", "--grid", "-o", "out/fox.png",
             "--guidance-stop", "0.9", "--rescale", "0.3", "--apg", "--apg-options", "eta=0.5 momentum=0",
             "--freeu", "1.1,1.1,0.9,0.9", "--attention-layers", "middle_block.1", "--pag", "1",
             "--noise-source", "philox", "--variation-seed", "4", "--variation-strength", "0.2",
             "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    assert main(["generate", *words, "--model", str(tiny_model_file)]) == 0
    assert names(place / "out") == ["fox-0.png", "fox-1.png", "fox-grid.png"]
    values = values_of(place / "out" / "fox-1.png")
    given = {
        "prompt": "a fox", "negative_prompt": "a red apple", "steps": 3, "sampler": "ddim",
        "spacing": "uniform", "eta": 0.5, "guidance": 2.0, "seed": 10, "width": 8, "height": 16,
        "deterministic": True, "shared_start": True, "batch_index": 1, "batch_size": 2, "dtype": "float32",
        "clip_skip": 1, "zeros_for_empty": True, "guidance_stop": 0.9, "rescale": 0.3, "apg": True,
        "apg_options": {"eta": 0.5, "momentum": 0}, "freeu": [1.1, 1.1, 0.9, 0.9], "pag": 1,
        "attention_layers": ["middle_block.1"], "noise_source": "philox", "variation_seed": 4,
        "variation_strength": 0.2,
    }  # fmt: skip
    assert {name: values[name] for name in given} == given and len(values["start_noise_sha256"]) == 64
    sizes = {"original_width", "original_height", "crop_left", "crop_top"}
    for option in sizes:  # which only SDXL reads
        assert (
            main(["generate", "fox", f"--{option.replace('_', '-')}", "3", "--model", str(tiny_model_file)])
            == 2
        )
    with Image.open("out/fox-grid.png") as sheet:
        assert sheet.size == (16, 16)


def test_files_made_of_prompt_and_seed_are_never_overwritten(place: Path, tiny_model_file: Path) -> None:
    for _ in range(2):
        assert main(["generate", "fox", "--seed", "1", "--model", str(tiny_model_file)]) == 0
    assert names(place) == ["fox-1-1.png", "fox-1.png"]
    assert (place / "fox-1.png").read_bytes() == (place / "fox-1-1.png").read_bytes()
    for seed in ("1", "2"):
        assert (
            main(["generate", "fox", "--seed", seed, "-o", "mine.png", "--model", str(tiny_model_file)]) == 0
        )
    assert values_of(place / "mine.png")["seed"] == 2
    assert main(["generate", "fox", "--seed", "1", "-o", "folder", "--model", str(tiny_model_file)]) == 0
    assert names(place / "folder") == ["fox-1.png"]


def test_two_processes_write_the_same_bytes(place: Path, tiny_model_file: Path) -> None:
    command = [sys.executable, "-m", "sfumato", "generate", "a red apple", "--seed", "7", "--num-images", "2"]
    for folder in ("one", "two"):
        words = [*command, "--sampler", "euler_a", "--model", str(tiny_model_file), "-o", folder]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    for name in ("a-red-apple-7.png", "a-red-apple-8.png"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()


def test_a_random_seed_is_told_and_recorded(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "fox", "-o", "a.png", "--model", str(tiny_model_file)]) == 0
    assert f"seed {values_of(place / 'a.png')['seed']}," in capsys.readouterr().err


def test_no_prompt_and_prompts_of_any_text(place: Path, tiny_model_file: Path) -> None:
    for words in ([], [""], ["🦊"], ["--", "-fox"]):
        tail = ["--seed", "1", "--steps", "1", "--model", str(tiny_model_file)]
        assert main(["generate", *tail, *words]) == 0
    assert names(place) == ["fox-1.png", "picture-1-1.png", "picture-1-2.png", "picture-1.png"]


def test_a_prompt_that_is_too_long_is_told(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a red apple " * 5 + "zebra"
    assert main(["generate", long, "--emphasis", "plain", "--model", str(tiny_model_file)]) == 0
    err = capsys.readouterr().err
    assert "warning: the prompt is longer than the model reads" in err and "zebra" in err


def test_samples_that_are_no_pictures(
    place: Path, pixel_model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = torch.nn.Conv2d(1, 2, 1)
    pixel_model.decode_latents = lambda latents, tiles: two(latents)  # type: ignore[method-assign]
    monkeypatch.setattr("sfumato.model.load", lambda *arguments, **options: pixel_model)
    assert main(["generate", "--seed", "1"]) == 0
    assert names(place) == ["picture-1-preview.png", "picture-1.npy"]
    assert np.load("picture-1.npy", allow_pickle=False).shape == (2, 8, 8)


# What can stand in the way


def refused(words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words]) == status
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and out == ""


def test_requests_the_model_cannot_take(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_model_file)]
    refused(["fox", "--width", "18", *model], 2, "nearest size is 16x16", capsys)
    refused(["fox", "--label", "1", *model], 2, "label is 1", capsys)
    refused(["fox", "--eta", "1", *model], 2, "no option 'eta'", capsys)
    refused(["fox", "--device", "cuda:77", *model], 5, "not there", capsys)
    refused(["fox", "--dtype", "float8", *model], 2, "no dtype 'float8'", capsys)
    refused(
        ["fox", "--model", "missing.safetensors"], CheckpointError.exit_status, "missing.safetensors", capsys
    )
    refused(["fox", "-o", "fox.gif", *model], 2, "fox.png", capsys)
    assert names(place) == []


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").touch()
    for target in ("file/fox.png", "file/inside"):
        refused(["fox", "--model", "never read", "-o", target], 5, "cannot write", capsys)


def test_a_disk_that_is_full_at_the_end(
    place: Path, tiny_model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(["fox", "--model", str(tiny_model_file)], 5, "No space left on device", capsys)
    assert names(place) == []


def test_values_that_are_not_finite(
    place: Path,
    tiny_model: StableDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def spoil(module: object, arguments: object, output: Any) -> Any:
        return output * math.nan

    tiny_model.unet.register_forward_hook(spoil)
    monkeypatch.setattr("sfumato.model.load", lambda *arguments, **options: tiny_model)
    refused(["fox"], 6, "the U-Net gave values that are not finite at step 1 of 4", capsys)
    assert names(place) == []


def test_interrupted_in_the_middle(
    place: Path,
    tiny_model: StableDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = 0

    def interrupt(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    tiny_model.unet.register_forward_hook(interrupt)
    monkeypatch.setattr("sfumato.model.load", lambda *arguments, **options: tiny_model)
    assert main(["generate", "fox"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n" and names(place) == []


INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
from sfumato.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_terminal(place: Path, tiny_model_file: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["generate", "fox", "--steps", "10000", "--spacing", "karras", "--model", str(tiny_model_file)]
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTIBLE, *words], stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while b"/10000" not in shown:  # the progress line: it is drawing
            shown += os.read(ours, 1024)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        while b"interrupted" not in shown:
            shown += os.read(ours, 1024)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"drawing" in shown and b"Traceback" not in shown
    assert names(place) == []


def test_pictures_can_be_watched_as_they_come_to_be(
    place: Path, tiny_model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bytes] = []
    kept = StableDiffusion.preview_latents

    def preview(self: StableDiffusion, latents: torch.Tensor) -> torch.Tensor:
        if (place / "watch.png").exists():
            shown.append((place / "watch.png").read_bytes())
        return kept(self, latents)

    monkeypatch.setattr(StableDiffusion, "preview_latents", preview)
    asked = ["generate", "a red apple", "--seed", "1", "--steps", "3", "--num-images", "2"]
    assert main([*asked, "--model", str(tiny_model_file), "--watch", "watch.png"]) == 0
    shown.append((place / "watch.png").read_bytes())
    assert len(set(shown)) == 3
    with Image.open(place / "watch.png") as image:
        assert image.width > image.height

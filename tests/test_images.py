"""Pictures: conversion both ways, names, files written whole, and parameters that survive the round trip."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato import images
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError, ResourceError

PARAMETERS: dict[str, Any] = {
    "prompt": "a fox, red\nin snow 🦊", "negative_prompt": "blurry: very", "steps": 20, "sampler": "euler_a",
    "spacing": "karras", "guidance": 7.5, "seed": 0, "width": 64, "height": 32, "model": "tiny, v1",
    "model_digest": "0123456789abcdef", "version": "0.1.0", "float32_retries": ["decoder"],
}  # fmt: skip


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_tensor_to_pil_and_back(channels: int, mode: str) -> None:
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(2, channels, 16, 16) / 127.5 - 1
    pictures = images.to_pil(levels)
    assert [picture.mode for picture in pictures] == [mode, mode]
    assert np.array(pictures[0]).reshape(256, -1)[:, 0].tolist() == list(range(256))
    assert torch.allclose(images.to_tensor(pictures, mode), levels, atol=1e-6)


def test_values_outside_are_clipped_and_those_not_finite_refused() -> None:
    assert np.array(images.to_pil(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2))[0]).tolist() == [[0, 255]]
    with pytest.raises(ValueError, match="not finite"):
        images.to_pil(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(InputError, match="5 channels"):
        images.to_pil(torch.zeros(1, 5, 2, 2))


def test_previews_of_other_shapes() -> None:
    curve = np.array(images.preview(torch.linspace(-1, 1, 10)[None]))
    assert curve.shape == (64, 10) and curve[63, 0] == 0 and curve[0, 9] == 0 and curve[0, 0] == 255
    volume = torch.zeros(2, 3, 4, 4)
    volume[0, 2] = 1
    sheet = np.array(images.preview(volume))
    assert sheet.shape == (8, 8) and (sheet[4:, :4] == 255).all() and (sheet[:4] == 128).all()


def test_grid() -> None:
    tiles = [Image.new("L", (2, 3), level) for level in (10, 20, 30, 40, 50)]
    sheet = np.array(images.grid(tiles))
    assert (
        sheet.shape == (6, 6)
        and sheet[0, ::2].tolist() == [10, 20, 30]
        and sheet[3, ::2].tolist() == [40, 50, 0]
    )
    assert images.grid(tiles, columns=1).size == (2, 15)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A fox in a snowy forest!", "a-fox-in-a-snowy-forest-7"),
        ("雪の中の狐", "雪の中の狐-7"),
        ("../../etc/passwd", "etc-passwd-7"),
        ("🦊❄", "picture-7"),
        ("", "picture-7"),
        (None, "picture-7"),
        ("a\0b\\c:d*e", "a-b-c-d-e-7"),
    ],
)
def test_file_names(prompt: str | None, expected: str) -> None:
    assert images.file_stem(prompt, 7) == expected


@given(st.text(max_size=300), st.integers(0, 2**53 - 1))
@settings(max_examples=150, deadline=None)
def test_any_prompt_gives_a_name_that_a_disk_takes(prompt: str, seed: int) -> None:
    stem = images.file_stem(prompt, seed)
    assert len(f".{stem}-preview-9999.png.4194304.tmp".encode()) <= 255
    assert not set(stem) & set('/\\:*?"<>|\0') and stem[0] not in ".-"


def test_names_are_never_taken_twice(tmp_path: Path) -> None:
    for expected in ("fox-1.png", "fox-1-1.png", "fox-1-2.png"):
        path = images.free_path(tmp_path, "fox-1", ".png")
        assert path.name == expected
        path.touch()


def test_parameters_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    images.save_png(Image.new("RGB", (4, 4)), path, PARAMETERS)
    assert images.read_parameters(path) == PARAMETERS
    with Image.open(path) as image:
        assert image.info["parameters"] == (
            "a fox, red\nin snow 🦊\nNegative prompt: blurry: very\nSteps: 20, Sampler: Euler a, "
            "Schedule type: Karras, CFG scale: 7.5, Seed: 0, Size: 64x32, Model hash: 0123456789, "
            'Model: "tiny, v1", Version: sfumato 0.1.0'
        )
    assert os.listdir(tmp_path) == ["fox.png"]


def test_equal_pictures_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        images.save_png(Image.new("RGB", (4, 4)), tmp_path / name, PARAMETERS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_text_form_is_read_back() -> None:
    read = images.from_text(images.to_text(PARAMETERS))
    kept = {name: PARAMETERS[name] for name in PARAMETERS if name not in ("float32_retries", "version")}
    assert read == {**kept, "model_digest": 123456789, "Version": "sfumato 0.1.0"} | {
        "model_digest": read["model_digest"]
    }
    assert set(images.SAMPLER_NAMES) == set(SAMPLERS)


def test_the_text_form_of_others_keeps_what_we_do_not_know() -> None:
    text = (
        'cat\nSteps: 5, Sampler: DPM++ 2M, Clip skip: 2, Lora hashes: "a: 1, b: 2", Denoising strength: 0.75'
    )
    assert images.from_text(text) == {
        "prompt": "cat", "steps": 5, "sampler": "dpmpp_2m", "Clip skip": 2, "Lora hashes": "a: 1, b: 2",
        "Denoising strength": 0.75,
    }  # fmt: skip


@given(st.text(max_size=200) | st.text('Steps: ,"\\\n0123456789x{}[]', max_size=200).map("Steps: ".__add__))
@settings(max_examples=300, deadline=None)
def test_reading_the_text_form_never_fails(text: str) -> None:
    assert isinstance(images.from_text(text), dict)


def test_files_without_parameters_and_files_that_are_no_png(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    assert images.read_parameters(tmp_path / "plain.png") == {}
    Image.new("L", (2, 2)).save(tmp_path / "photo.png", "JPEG")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:40])
    for name in ("photo.png", "cut.png", "missing.png"):
        with pytest.raises(InputError, match=name):
            images.read_parameters(tmp_path / name)


def test_json_that_is_damaged_falls_back_to_the_text(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("sfumato", "{not json")
    info.add_text("parameters", "cat\nSteps: 5")
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert images.read_parameters(tmp_path / "a.png") == {"prompt": "cat", "steps": 5}
    assert json.dumps(images.from_text("x\nSteps: " + "9" * 400))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    path = tmp_path / "fox.png"
    images.save_png(Image.new("L", (2, 2), 1), path, {"prompt": "old"})

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail) if call == "fsync" else patch.setattr(Path, "replace", fail)
        with pytest.raises(ResourceError, match=os.strerror(number)):
            images.save_png(Image.new("L", (2, 2), 2), path, {"prompt": "new"})
    assert images.read_parameters(path)["prompt"] == "old"
    assert os.listdir(tmp_path) == ["fox.png"], "nothing half written stays"


def test_arrays(tmp_path: Path) -> None:
    images.save_array(torch.arange(6.0).reshape(1, 6), tmp_path / "line.npy")
    assert np.load(tmp_path / "line.npy", allow_pickle=False).tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ResourceError):
        images.save_array(torch.zeros(1, 2), tmp_path / "line.npy" / "inside.npy")

"""Pictures: conversion both ways, previews, sheets, names, and samples that are no pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato import images
from sfumato.errors import InputError, ResourceError


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


def test_arrays(tmp_path: Path) -> None:
    images.save_array(torch.arange(6.0).reshape(1, 6), tmp_path / "line.npy")
    assert np.load(tmp_path / "line.npy", allow_pickle=False).tolist() == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ResourceError):
        images.save_array(torch.zeros(1, 2), tmp_path / "line.npy" / "inside.npy")

"""Drawings in turn: loopback, outpainting in windows, their recipes; and folders on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato import Request
from sfumato.cli import main
from sfumato.generation import complete, generate
from sfumato.generation.stages import continued, plan, windows
from sfumato.model import StableDiffusion

STEPS: dict[str, Any] = {"steps": 2, "seed": 1, "guidance": 1}


def picture(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_one_drawing_is_its_own_plan(tiny_model: StableDiffusion) -> None:
    request = complete(tiny_model, Request(init=picture()))
    assert plan(request) == [request]


def test_loopback_draws_each_from_the_last_and_tells_the_whole(tiny_model: StableDiffusion) -> None:
    asked = Request(init=picture(), strength=0.5, loopback=3, loopback_decay=0.8, **{**STEPS, "steps": 10})
    stages = plan(complete(tiny_model, asked))
    assert [stage.strength for stage in stages] == pytest.approx([0.5, 0.4, 0.32])
    assert len({stage.seed for stage in stages}) == 3 and all(stage.loopback == 1 for stage in stages)
    result = generate(tiny_model, asked)
    by_hand = generate(tiny_model, stages[0])
    for stage in stages[1:]:
        by_hand = generate(tiny_model, continued(stage, by_hand.images))
    assert result.images[0].tobytes() == by_hand.images[0].tobytes()
    values = result.parameters[0]
    assert (values["loopback"], values["strength"], values["seed"]) == (3, 0.5, 1)
    assert values["init_sha256"] == generate(tiny_model, stages[0]).parameters[0]["init_sha256"]


def test_a_picture_of_a_batch_can_be_drawn_alone(tiny_model: StableDiffusion) -> None:
    fields: dict[str, Any] = {"init": picture(), "loopback": 2, "deterministic": True, "strength": 0.5}
    both = generate(tiny_model, Request(num_images=2, **fields, **STEPS)).images
    alone = generate(tiny_model, Request(**fields, **{**STEPS, "seed": 2})).images
    assert both[1].tobytes() == alone[0].tobytes()


@pytest.mark.parametrize(
    ("known", "whole", "size"),
    [
        ((0, 0, 64, 64), (200, 64), (64, 64)),
        ((50, 20, 114, 84), (170, 160), (64, 64)),
        ((3, 0, 10, 7), (64, 64), (64, 64)),
        ((0, 90, 300, 100), (300, 500), (64, 32)),
        ((0, 0, 1, 1), (33, 1), (16, 1)),
    ],
)
def test_windows_fill_the_picture_from_what_is_known(
    known: tuple[int, int, int, int], whole: tuple[int, int], size: tuple[int, int]
) -> None:
    done = np.zeros(whole[::-1], dtype=bool)
    done[known[1] : known[3], known[0] : known[2]] = True
    for left, top, right, bottom in windows(known, whole, size):
        assert (right - left, bottom - top) == size
        assert left >= 0 and top >= 0 and right <= whole[0] and bottom <= whole[1]
        assert done[top:bottom, left:right].any(), "a window sees something"
        done[top:bottom, left:right] = True
    assert done.all()


@pytest.mark.parametrize(
    "margins", [{"right": 5}, {"left": 20, "bottom": 3}, {"top": 1, "left": 2, "right": 40}]
)
def test_outpainting_keeps_the_picture(tiny_model: StableDiffusion, margins: dict[str, int]) -> None:
    fields: dict[str, Any] = {f"outpaint_{side}": pixels for side, pixels in margins.items()}
    result = generate(tiny_model, Request(init=picture(), **fields, **STEPS))
    left, top = margins.get("left", 0), margins.get("top", 0)
    size = (16 + left + margins.get("right", 0), 16 + top + margins.get("bottom", 0))
    assert result.images[0].size == size
    assert result.images[0].crop((left, top, left + 16, top + 16)).tobytes() == picture().tobytes()
    assert {name: result.parameters[0][name] for name in fields} == fields
    assert "region" not in result.parameters[0] and "mask_sha256" not in result.parameters[0]


def test_a_large_margin_takes_several_drawings(tiny_model: StableDiffusion) -> None:
    stages = plan(complete(tiny_model, Request(init=picture(), outpaint_right=30, **STEPS)))
    assert len(stages) == 4 and all(stage.strength == 1 for stage in stages)
    small = plan(complete(tiny_model, Request(init=picture((6, 6)), outpaint_right=3, **STEPS)))
    assert [stage.region for stage in small] == [(3, 0, 6, 6)]


def test_a_folder_of_pictures_in_one_command(
    tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for index, name in enumerate(("b.png", "a.webp")):
        picture((16, 16), index).save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    command = ["generate", "a fox", "--init", str(folder), "--strength", "0.5", "--steps", "4", "--seed", "1",
               "--model", str(tiny_model_file), "-o", str(folder)]  # fmt: skip
    assert main(command) == 0
    told = capsys.readouterr()
    assert [Path(line).name for line in told.out.split()] == ["a.png", "b-1.png"]
    assert "2 steps from strength 0.5" in told.err
    with Image.open(folder / "b.png", formats=["PNG"]) as untouched:
        assert untouched.tobytes() == picture((16, 16), 0).tobytes()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["generate", "--init", str(empty), "--model", str(tiny_model_file)]) == 2


def test_masks_on_the_command_line_and_replay(
    tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, mask, drawn = (tmp_path / f"{name}.png" for name in ("init", "mask", "drawn"))
    picture().save(init)
    white = Image.new("L", (16, 16))
    white.paste(255, (4, 4, 12, 12))
    white.save(mask)
    model = ["--model", str(tiny_model_file)]
    command = [
        "generate",
        "a fox",
        "--init",
        str(init),
        "--mask",
        str(mask),
        "--mask-blur",
        "1",
        "--steps",
        "4",
    ]
    assert main([*command, "--seed", "3", "-o", str(drawn), *model]) == 0
    again = ["replay", str(drawn), "--check", *model]
    assert main(again) == 2
    assert "drawn with a file for init" in capsys.readouterr().err
    assert main([*again, "--init", str(init), "--mask", str(mask)]) == 0
    picture(seed=5).save(init)
    assert main([*again, "--init", str(init), "--mask", str(mask)]) == 1
    assert "another picture to start from" in capsys.readouterr().out

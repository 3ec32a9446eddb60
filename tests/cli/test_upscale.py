"""`sfumato upscale`: files and folders, networks and resampling, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sfumato.cli import main
from sfumato.intake import Limits
from sfumato.nn.esrgan import CompactConfig, CompactNet
from sfumato.recipes import embed
from sfumato.recipes.containers import read_container
from sfumato.recipes.read import read as read_recipe


def read(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as opened:
        opened.load()
        return opened.copy()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = CompactNet(CompactConfig(num_features=4, num_convs=1, scale=2))
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_a_file_by_a_network(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (20, 10), (200, 100, 50, 128)).save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    assert main(["upscale", str(tmp_path / "in.png"), "-o", str(out), "--model", str(model)]) == 0
    assert capsys.readouterr().out == f"{out}: 40x20\n"
    assert (read(out).size, read(out).mode) == ((40, 20), "RGBA")
    lanczos = ["--model", "lanczos", "--scale", "1.5"]
    assert main(["upscale", str(tmp_path / "in.png"), "-o", str(out), *lanczos]) == 0
    assert read(out).size == (30, 15)


def test_our_network_is_what_enlarges(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "teal").save(tmp_path / "in.bmp")
    out = tmp_path / "out.png"
    assert main(["upscale", str(tmp_path / "in.bmp"), "-o", str(out)]) == 0
    assert read(out).size == (80, 40)
    values = json.loads(read_container(out).texts["sfumato"])
    assert (values["upscaler"], values["upscale"], values["upscaled_from"]) == ("illustrations", 4, [20, 10])


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_the_recipe_of_a_drawing_stays(tmp_path: Path, suffix: str) -> None:
    given = {"prompt": "a fox", "seed": 7, "steps": 5, "sampler": "ddim", "model": "illustrations"}
    image = Image.new("RGB", (16, 16), "teal")
    embed.save(image, tmp_path / "fox.png", given)
    out = tmp_path / f"out.{suffix}"
    assert main(["upscale", str(tmp_path / "fox.png"), "-o", str(out), "--scale", "2"]) == 0
    recipe = read_recipe(out)
    assert recipe.request is not None and recipe.tool == "sfumato"
    assert (recipe.request.prompt, recipe.request.seed, recipe.request.steps) == ("a fox", 7, 5)
    assert (recipe.values["upscaler"], recipe.values["upscale"]) == ("illustrations", 2)
    assert recipe.values["upscaled_digest"] == embed.digest(image)
    if suffix == "png":
        assert recipe.values[embed.DIGEST] == embed.digest(read(out))


def test_texts_of_other_tools_stay_letter_by_letter(tmp_path: Path) -> None:
    text = (
        "a fox, höhle\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Foo: bar"
    )
    info = PngInfo()
    info.add_itxt("parameters", text)
    info.add_text("Software", "somebody's")
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "in.png", pnginfo=info)
    for _ in range(2):  # enlarging what was enlarged changes nothing of it
        out = tmp_path / "out.png"
        assert main(["upscale", str(tmp_path / "in.png"), "-o", str(out), "--scale", "2"]) == 0
        texts = read_container(out).texts
        assert texts["parameters"] == text and texts["Software"] == "somebody's"
        assert texts["postprocessing"] == "Postprocess upscale by: 2, Postprocess upscaler: illustrations"
        assert read_recipe(out).tool == "AUTOMATIC1111"
        out.replace(tmp_path / "in.png")


def test_a_folder_and_pictures_that_lie_on_their_side(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (12, 8), "teal").save(folder / name, exif=exif)
    (folder / "notes.txt").write_text("no picture")
    assert main(["upscale", str(folder), "-o", str(out), "--scale", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    assert main(["upscale", str(folder / "a.jpg"), "-o", str(out), "--scale", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a-1.png", "a.png", "b.png"]
    assert read(out / "a.png").size == (16, 24)
    assert ImageOps.exif_transpose(read(out / "a.png")).size == (16, 24)


def test_errors_say_what_to_do(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    Image.new("L", (4, 4)).save(tmp_path / "in.png")
    (tmp_path / "empty").mkdir()
    out = ["-o", str(tmp_path / "out.png")]

    def told(arguments: list[str], status: int) -> str:
        assert main(["upscale", *arguments]) == status
        return capsys.readouterr().err

    assert "cannot be read" in told([str(tmp_path / "text.png"), *out], 2)
    assert "does not exist" in told([str(tmp_path / "absent.png"), *out], 2)
    assert "holds no pictures" in told([str(tmp_path / "empty"), "-o", str(tmp_path)], 2)
    assert "the scale is 0" in told([str(tmp_path / "in.png"), *out, "--scale", "0"], 2)
    assert "no upscaler" in told([str(tmp_path / "in.png"), *out, "--model", str(_other(tmp_path))], 3)
    assert "cannot open" in told([str(tmp_path / "in.png"), *out, "--model", "absent.pth"], 3)
    assert "is no folder" in told([str(tmp_path), *out], 2)
    assert not (tmp_path / "out.png").exists()


def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sfumato.intake.open_picture.__defaults__", (Limits(pixels=100),))
    Image.new("L", (20, 20)).save(tmp_path / "in.png")
    assert main(["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]) == 2
    assert "20x20 pixels" in capsys.readouterr().err


def _other(folder: Path) -> Path:
    save_file({"weight": torch.zeros(3)}, folder / "other.safetensors")
    return folder / "other.safetensors"

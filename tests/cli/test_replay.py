"""`sfumato replay` and `sfumato info`: pictures drawn again, equal to the byte, or the reason why not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sfumato.cli import main
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.generation import complete, generate
from sfumato.model import StableDiffusion
from sfumato.recipes import embed, read
from sfumato.recipes.replay import again, compare
from sfumato.request import Request


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_repeats_its_picture(tmp_path: Path, tiny_model: StableDiffusion, sampler: str) -> None:
    """From the file to the bytes of a new file."""
    options: dict[str, float | str] = {"s_noise": 1.01} if "s_noise" in SAMPLERS[sampler].options else {}
    if sampler == "dpm_adaptive":
        options |= {"rtol": 1.0, "atol": 1.0}  # fewer evaluations
    request = Request(
        prompt="a (red:1.3) apple {one|two}", negative_prompt="fox", steps=3, sampler=sampler, seed=7,
        num_images=2, sampler_options=options, rescale=0.5, eta_seed_delta=3, variation_seed=4,
        variation_strength=0.2,
    )  # fmt: skip
    result = generate(tiny_model, request)
    path = tmp_path / "a.png"
    embed.save(result.images[1], path, result.parameters[1])
    recipe = read(path)
    plan = again(recipe)
    assert recipe.warnings == [] and plan.request == complete(tiny_model, request) and plan.index == 1
    drawn = generate(tiny_model, plan.request)
    assert embed.encode(drawn.images[1], "PNG", drawn.parameters[1]) == path.read_bytes()
    assert compare(path, recipe, drawn.images[1], drawn.parameters[1]).equal


def test_one_of_a_deterministic_batch_alone(tmp_path: Path, tiny_model: StableDiffusion) -> None:
    request = Request(
        prompt="a fox", steps=2, sampler="dpmpp_sde", seed=7, num_images=3, deterministic=True,
        variation_seed=4, variation_strength=0.3,
    )  # fmt: skip
    result = generate(tiny_model, request)
    embed.save(result.images[2], tmp_path / "a.png", result.parameters[2])
    plan = again(read(tmp_path / "a.png"))
    assert plan.request.num_images == 1
    assert embed.digest(generate(tiny_model, plan.request).images[0]) == embed.digest(result.images[2])


def draw(model: Path, *words: str) -> None:
    assert main(["generate", *words, "--steps", "2", "--model", str(model)]) == 0


def replay(model: Path, *words: str) -> int:
    return main(["replay", *words, "--model", str(model)])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_check_of_every_format(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    draw(tiny_model_file, "a fox", "--num-images", "2", "--sampler", "euler_a", "-o", f"a.{suffix}")
    capsys.readouterr()
    assert replay(tiny_model_file, f"a-1.{suffix}", "--check") == 0
    assert capsys.readouterr().out == "equal\n"
    assert sorted(os.listdir(place)) == [f"a-0.{suffix}", f"a-1.{suffix}"], "a check writes nothing"


def test_a_picture_drawn_again(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tiny_model_file, "a fox", "-o", "a.png")
    capsys.readouterr()
    for expected in ("a-replay.png", "a-replay-1.png"):
        assert replay(tiny_model_file, "a.png") == 0
        assert capsys.readouterr().out == f"{expected}\n"
        assert (place / expected).read_bytes() == (place / "a.png").read_bytes()
    assert replay(tiny_model_file, "a.png", "--check", "-o", "out/b.webp") == 0
    assert capsys.readouterr().out == "out/b.webp\nequal\n".replace("/", os.sep)


def test_what_differs_is_told(place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tiny_model_file, "a fox", "-o", "a.png")
    values = {**read(place / "a.png").values, "guidance": 9.0, "model_digest": "ef" * 32, "torch": "1.0"}
    del values["picture_sha256"]
    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", json.dumps(values))
    with Image.open("a.png", formats=["PNG"]) as image:
        image.save("b.png", pnginfo=info)
    capsys.readouterr()
    assert replay(tiny_model_file, "b.png", "--check") == 1
    out, err = capsys.readouterr()
    first, *reasons = out.splitlines()
    assert first.startswith("different: PSNR ") and first.endswith(" dB")
    assert [reason.split(":")[0].strip() for reason in reasons] == [
        "other weights",
        "another version of torch",
    ]
    assert "warning: the picture was drawn with tiny (efefefefef), not with tiny" in err
    assert main(["replay", "b.png"]) == 2, "nobody said which model"
    assert "Give its file or name with --model" in capsys.readouterr().err


def test_a_start_noise_is_asked_for(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("start.npy", "other.npy"):
        np.save(name, rng.standard_normal((2, 8, 8), dtype=np.float32))
    draw(tiny_model_file, "a fox", "-o", "a.png", "--start-noise", "start.npy")
    assert replay(tiny_model_file, "a.png", "--check") == 2
    assert "Give it with --start-noise" in capsys.readouterr().err
    assert replay(tiny_model_file, "a.png", "--check", "--start-noise", "start.npy") == 0
    assert replay(tiny_model_file, "a.png", "--check", "--start-noise", "other.npy") == 1
    out, err = capsys.readouterr()
    assert "another start noise" in out and "other.npy is not what the picture was drawn with" in err


def test_prompts_drawn_from_wildcards(place: Path, tiny_model_file: Path) -> None:
    (place / "words").mkdir()
    (place / "words" / "colour.txt").write_text("red\nblue\n")
    words = ["a __colour__ {apple|fox}", "--wildcards", "words", "-o", "a.png"]
    draw(tiny_model_file, *words, "--seed", "5")
    values = read(place / "a.png").values
    assert values["prompt"] == words[0] and values["drawn_prompt"].split()[1] in ("red", "blue")
    assert replay(tiny_model_file, "a.png", "--check") == 0, "its words are those that were drawn"
    assert replay(tiny_model_file, "a.png", "--check", "--wildcards", "words") == 0


def test_pictures_of_another_tool(
    place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngImagePlugin.PngInfo()
    text = "a fox\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3, Seed: 1, Size: 16x16, Model: sd, Odd: x"
    info.add_text("parameters", text)
    Image.new("RGB", (16, 16)).save("a.png", pnginfo=info)
    assert replay(tiny_model_file, "a.png", "--check", "-o", "b.png") == 1
    out, err = capsys.readouterr()
    assert "it was drawn by AUTOMATIC1111" in out and "not with tiny" in err and "generator of noise" in err
    request = read(place / "b.png").request
    assert request is not None
    assert (request.sampler, request.spacing, request.noise_source) == ("dpmpp_2m", "karras", "philox")
    assert main(["replay", "a.png"]) == 2


def test_pictures_without_a_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (16, 8)).save("a.png")
    assert main(["replay", "a.png"]) == 2
    assert "holds no recipe" in capsys.readouterr().err
    assert main(["info", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png: PNG, 16x8\nno recipe in it\n"
    for command in ("info", "replay"):
        assert main([command, "missing.png"]) == 2


def test_info(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a\x1b[2J fox\nSteps: 2, Sampler: Nobody's, CFG scale: 3, Odd: x, RNG: CPU")
    Image.new("RGB", (4, 4)).save("a.png", pnginfo=info)
    assert main(["info", "a.png"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "a.png: PNG, 4x4\nwritten by AUTOMATIC1111\n\nrequest:\n  prompt: a [2J fox\n  steps: 2\n"
        "  guidance: 3.0\n  noise_source: cpu\n\nnot taken:\n  sampler: Nobody's\n  Odd: x\n\n"
        'warning: there is no sampler "Nobody\'s"\n'
    )
    assert main(["info", "a.png", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tool"] == "AUTOMATIC1111" and values["ignored"] == ["sampler", "Odd"]
    assert values["request"] == {
        "prompt": "a\x1b[2J fox", "steps": 2, "guidance": 3.0, "noise_source": "cpu",
    }  # fmt: skip


def test_info_of_our_own(place: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tiny_model_file, "a fox", "-o", "a.jpg", "--seed", "4")
    capsys.readouterr()
    assert main(["info", "a.jpg"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a.jpg: JPEG, 16x16\nwritten by sfumato\n") and "not taken" not in out
    for line in ("  prompt: a fox", "  seed: 4", "  model: tiny", "  quality: 95", "  dtype: float32"):
        assert f"{line}\n" in out

"""`sfumato convert` and the options by which every command takes models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.checkpoints.load import open_model
from sfumato.cli import main


def test_there_and_back(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny_model_file), "folder"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("folder: diffusers, 0.00 GB, ") and "  unet: " in out
    assert err == "prediction eps: the file describes itself\n"
    assert main(["convert", "folder", "back.safetensors"]) == 0
    before, after = load_file(tiny_model_file), load_file("back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["convert", "folder", "half.safetensors", "--dtype", "float16", "--prediction", "v"]) == 0
    half = open_model("half.safetensors")
    assert half.config.prediction == "v"
    assert half.modules["unet"].get_parameter("out.2.bias").dtype == torch.float16


def test_what_is_left_out_is_listed(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = read_tensors(tiny_model_file)
    ema = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    write_tensors(tmp_path / "a.safetensors", {**tensors, **ema, "betas": torch.zeros(3)}, metadata)
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "folder"), "--ema"]) == 0
    out = capsys.readouterr().out
    assert "left out, schedule buffers: 1 tensors (betas)" in out
    assert f"left out, weights without EMA: {len(ema)} tensors" in out
    file = open_model(tmp_path / "folder")
    name = "out.2.bias"
    assert torch.equal(file.modules["unet"].get_parameter(name), tensors[f"model.diffusion_model.{name}"] + 1)


def test_one_part_and_another_autoencoder(tmp_path: Path, tiny_model_file: Path) -> None:
    vae = str(tmp_path / "vae.safetensors")
    assert main(["convert", str(tiny_model_file), vae, "--only", "vae"]) == 0
    assert "encoder.conv_in.weight" in load_file(vae)
    both = str(tmp_path / "both.safetensors")
    assert main(["convert", str(tiny_model_file), both, "--vae", vae]) == 0
    assert main(["convert", str(tiny_model_file), both, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["a.ckpt"], 2, "is written as .safetensors, not as 'a.ckpt'"),
        (["there"], 2, "is there already"),
        (["b", "--layout", "kohya"], 2, "--layout"),
        (["b", "--dtype", "int8"], 2, "--dtype"),
        (["b", "--vae", "none.safetensors"], 3, "cannot open none.safetensors"),
        (["b", "--ema"], 2, "holds no averaged weights"),
        (
            ["b", "--offline", "--vae", "org/name"],
            5,
            "org/name is neither a path here nor in the hub's cache",
        ),
    ],
)
def test_what_is_refused(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str], status: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("mine")
    assert main(["convert", str(tiny_model_file), *words]) == status
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_generate_takes_any_model(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny_model_file), "folder"]) == 0
    common = ["generate", "a red apple", "--seed", "1", "--steps", "2", "--device", "cpu", "--width", "16"]
    common += ["--height", "16", "--guidance", "3", "--sampler", "euler", "--spacing", "uniform"]
    assert main([*common, "--model", str(tiny_model_file), "-o", "a.png"]) == 0
    assert main([*common, "--model", "folder", "-o", "b.png"]) == 0
    assert (
        main([*common, "--model", "folder", "--vae", "folder/vae", "--prediction", "v", "-o", "c.png"]) == 0
    )
    from PIL import Image

    a, b, c = (Image.open(name, formats=["PNG"]).tobytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b and a != c
    assert main([*common, "--model", "org/none", "--offline"]) == 5
    assert "org/none is neither a path here nor in the hub's cache" in capsys.readouterr().err

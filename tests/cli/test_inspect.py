"""`sfumato inspect`: what a file is, told without reading a tensor, whatever it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.checkpoints.load import open_model
from sfumato.checkpoints.source import Source
from sfumato.cli import main


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, in which nothing may read a tensor."""

    def read(self: Source, name: str) -> None:
        raise AssertionError(f"{name} was read")

    def run(*words: str | Path) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(Source, "tensor", read)
            return main(["inspect", *map(str, words)])

    return run


def test_a_file_is_described(
    tiny_model_file: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int]
) -> None:
    assert inspect(tiny_model_file) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert err == "" and lines[0] == str(tiny_model_file)
    assert "format safetensors" in lines and "layout ldm" in lines
    assert "prediction eps: the file describes itself" in lines
    assert any(line.startswith("unet ") and "parameters in" in line and "float32" in line for line in lines)
    assert any(line.startswith("metadata sfumato: {") and line.endswith("characters)") for line in lines)
    assert "sha256" not in out


def test_json_and_digest(
    tiny_model_file: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int]
) -> None:
    assert inspect(tiny_model_file, "--json", "--digest") == 0
    values = json.loads(capsys.readouterr().out)
    tensors, metadata = read_tensors(tiny_model_file)
    assert values["keys"] == {"used": len(tensors), "ignored": {}, "unknown": []}
    assert values["parts"].keys() == {"unet", "autoencoder", "text"}
    assert sum(part["parameters"] for part in values["parts"].values()) == sum(
        tensor.numel() for tensor in tensors.values()
    )
    assert values["metadata"] == metadata and values["prediction"] == "eps"
    digest = hashlib.sha256(tiny_model_file.read_bytes()).hexdigest()
    assert values["sha256"] == {str(tiny_model_file): digest}
    assert inspect(tiny_model_file, "--digest") == 0
    assert f"sha256      {digest} (AUTOV2 {digest[:10].upper()})" in capsys.readouterr().out


def test_what_is_left_out_and_by_which_rule(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int]
) -> None:
    tensors, metadata = read_tensors(tiny_model_file)
    more = {f"model_ema.x{index}": torch.zeros(1) for index in range(5)} | {"betas": torch.zeros(2)}
    write_tensors(tmp_path / "more.safetensors", {**tensors, **more}, metadata)
    assert inspect(tmp_path / "more.safetensors") == 0
    out = capsys.readouterr().out
    assert "ignored   5: ema (model_ema.x0, model_ema.x1, model_ema.x2, ...)" in out
    assert "ignored   1: schedule buffers (betas)" in out


def test_tensors_that_no_rule_knows(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int]
) -> None:
    tensors, metadata = read_tensors(tiny_model_file)
    write_tensors(tmp_path / "odd.safetensors", {**tensors, "stray": torch.zeros(1)}, metadata)
    assert inspect(tmp_path / "odd.safetensors") == 3
    out, err = capsys.readouterr()
    assert "unknown   1: stray" in out and "unet" in out and err.startswith("error: ") and "stray" in err


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_file_of_another_kind_is_described_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int], json_wanted: bool
) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {f"lora_unet_{index}.lora_up.weight": torch.zeros(4, 2).half() for index in range(12)}
    save_file(tensors, path, {"ss_network_dim": "2"})
    assert inspect(path, *(["--json"] if json_wanted else [])) == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "LoRA" in err
    if json_wanted:
        values = json.loads(out)
        assert values["family"] is None and values["tensors"] == 12 and values["parameters"] == 96
        assert values["dtypes"] == ["float16"] and values["metadata"] == {"ss_network_dim": "2"}
    else:
        assert "family      unknown" in out and "12, 96 numbers, float16" in out
        assert "lora_unet_0.lora_up.weight (4, 2)" in out and "ss_network_dim: 2" in out


def test_a_pickle_with_more_than_tensors(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int]
) -> None:
    tensors, _ = read_tensors(tiny_model_file)
    torch.save(
        {"state_dict": tensors, "global_step": 470000, "optimizer_states": [1, 2]}, tmp_path / "m.ckpt"
    )
    inspect(tmp_path / "m.ckpt")
    out = capsys.readouterr().out
    assert "format      ckpt, zip" in out and "global_step: 470000" in out


def test_folders_and_autoencoders_alone(
    tmp_path: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int]
) -> None:
    convert(open_model(tiny_model_file).opened, tmp_path / "folder")
    assert inspect(tmp_path / "folder") == 0
    assert "format      diffusers folder (safetensors)" in capsys.readouterr().out
    assert inspect(tmp_path / "folder" / "vae") == 0
    out = capsys.readouterr().out
    assert "autoencoder" in out and "unet" not in out


@pytest.mark.parametrize("content", [None, b"", b"no model", b"<!doctype html><html>404</html>"])
def test_what_cannot_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inspect: Callable[..., int], content: bytes | None
) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert inspect(path) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "x.safetensors" in err

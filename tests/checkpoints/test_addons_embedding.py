"""Textual inversions in the files of every trainer, and what is no such file."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.addons.apply import read_embedding
from sfumato.checkpoints.files import write_tensors
from sfumato.errors import CheckpointError
from sfumato.families import FAMILIES

SD1, SD2, SDXL = (FAMILIES[name] for name in ("sd1", "sd2-base", "sdxl"))


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def a1111(tensor: Tensor) -> dict[str, object]:
    """What AUTOMATIC1111's training writes."""
    return {
        "string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": "cat", "step": 4999,
        "sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5",
    }  # fmt: skip


PICKLES: Mapping[str, tuple[object, Tensor]] = {
    "A1111": (a1111(vectors(3, 768)), vectors(3, 768)),
    "its first trainer": (
        {"string_to_token": {"*": torch.tensor(265)},
         "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors(2, 768))})},
        vectors(2, 768),
    ),
    "diffusers": ({"<cat-toy>": vectors(768)}, vectors(768)[None]),
    "diffusers, several": ({"<cat-toy>": vectors(4, 768)}, vectors(4, 768)),
    "ordered": (OrderedDict({"<cat>": vectors(768).half()}), vectors(768)[None].half().float()),
    "a parameter": ({"<cat>": nn.Parameter(vectors(1, 768))}, vectors(1, 768)),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_pickled_files(kind: str, ending: str, tmp_path: Path) -> None:
    content, expected = PICKLES[kind]
    path = tmp_path / f"cat{ending}"
    torch.save(content, path)
    found = read_embedding(path, SD1)
    assert found.name == "cat" and found.length == len(expected)
    assert found.vectors.keys() == {"text"}
    assert torch.equal(found.vectors["text"], expected) and found.vectors["text"].dtype == torch.float32


def test_safetensors_files(tmp_path: Path) -> None:
    for name in ("emb_params", "<cat>", "anything"):
        write_tensors(tmp_path / "a.safetensors", {name: vectors(2, 1024)}, {})
        assert torch.equal(read_embedding(tmp_path / "a.safetensors", SD2).vectors["text"], vectors(2, 1024))


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_both_towers_of_sdxl(names: tuple[str, str], tmp_path: Path) -> None:
    own = {names[0]: vectors(5, 768), names[1]: vectors(5, 1280)}
    write_tensors(tmp_path / "a.safetensors", own, {})
    found = read_embedding(tmp_path / "a.safetensors", SDXL)
    assert torch.equal(found.vectors["text"], own[names[0]])
    assert torch.equal(found.vectors["text2"], own[names[1]])
    assert found.length == 5


@pytest.mark.parametrize(
    ("width", "base"),
    [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (1280, "second text encoder")],
)
@pytest.mark.parametrize("model", [SD1, SD2, SDXL], ids=lambda model: model.name)
def test_another_width_is_refused_with_its_base(width: int, base: str, model: object, tmp_path: Path) -> None:
    assert isinstance(model, type(SD1)) and model.text is not None
    path = tmp_path / "cat.safetensors"
    write_tensors(path, {"emb_params": vectors(1, width)}, {})
    if model.text2 is None and model.text.hidden_size == width:
        assert read_embedding(path, model).length == 1
        return
    with pytest.raises(CheckpointError, match=f"width {width}.*made for .*{base}"):
        read_embedding(path, model)


def test_sdxls_on_a_model_of_one_tower(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    write_tensors(path, {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)}, {})
    with pytest.raises(CheckpointError, match="width 768 and 1280, 'sd1' takes 768; it was made for SDXL"):
        read_embedding(path, SD1)
    with pytest.raises(CheckpointError, match="takes no vectors at all"):
        read_embedding(path, replace(SD1, text=None, tokenizer=None))


REFUSED: Mapping[str, dict[str, Tensor]] = {
    "a LoRA": {"lora_unet_x.lora_up.weight": vectors(4, 4), "lora_unet_x.lora_down.weight": vectors(4, 4)},
    "two words": {"<cat>": vectors(768), "<dog>": vectors(768)},
    "two parameters": {"string_to_param.*": vectors(768), "string_to_param.cat": vectors(768)},
    "a picture": {"emb_params": vectors(3, 4, 768)},
    "too many": {"emb_params": vectors(76, 768)},
    "none": {"emb_params": torch.zeros(0, 768)},
    "one number": {"emb_params": torch.zeros(())},
    "whole numbers": {"emb_params": torch.zeros(1, 768, dtype=torch.int64)},
    "no number": {"emb_params": torch.full((1, 768), math.nan)},
    "another tensor": {"clip_l": vectors(1, 768), "other": vectors(1, 768)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_embedding_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    write_tensors(path, REFUSED[case], {})
    with pytest.raises(CheckpointError, match=str(path)):
        read_embedding(path, SD1)


def test_towers_of_different_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    write_tensors(path, {"clip_l": vectors(2, 768), "clip_g": vectors(3, 1280)}, {})
    with pytest.raises(CheckpointError, match="different numbers"):
        read_embedding(path, SDXL)

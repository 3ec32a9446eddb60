"""Anything that holds a model opens: every format, half precision, EMA, other autoencoders, parts alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sfumato
from sfumato.checkpoints import load as loading
from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.load import ModelFile, open_model
from sfumato.checkpoints.metadata import METADATA_KEY
from sfumato.checkpoints.open import vocabulary_file
from sfumato.checkpoints.probe import probe_prediction
from sfumato.checkpoints.source import Source
from sfumato.errors import CheckpointError, InputError
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig

State = dict[str, Tensor]
Equal = Callable[[torch.nn.Module, State], bool]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"


def all_equal(file: ModelFile, states: dict[str, State], equal: Equal) -> bool:
    return file.modules.keys() == states.keys() and all(
        equal(file.modules[part], state) for part, state in states.items()
    )


def written(path: Path, tensors: State, kind: str) -> Path:
    """The tensors as a file of a kind: safetensors, zip, legacy."""
    if kind == "safetensors":
        write_tensors(path, tensors, {})
    else:
        content = {"state_dict": tensors, "global_step": 5, "epoch": 1, "callbacks": {}}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("mmap", [True, False])
def test_every_format_gives_the_same_networks(
    tmp_path: Path, sd_config: ModelConfig, sd_states: dict[str, State], sd_tensors: State, equal: Equal,
    kind: str, mmap: bool,
) -> None:  # fmt: skip
    # The extension says nothing.
    file = open_model(written(tmp_path / "model.bin", sd_tensors, kind), mmap=mmap)
    assert all_equal(file, sd_states, equal)
    assert file.config == dataclasses.replace(sd_config, name="model")
    assert file.opened.layout == "ldm" and file.opened.unknown == ()
    assert not any(module.training for module in file.modules.values())


def test_parts_are_loaded_when_they_are_asked_for(sd_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tensor = Source.tensor
    monkeypatch.setattr(Source, "tensor", lambda self, name: (read.append(name), tensor(self, name))[1])
    model = sfumato.load(sd_file, device="cpu")
    assert model.image_size == (512, 512) and model.latent_shape(64, 64) == (4, 32, 32) and read == []
    assert model.autoencoder is not None
    assert read and all(name.startswith(VAE) for name in read)
    count = len(read)
    assert model.autoencoder is model.autoencoder and len(read) == count
    assert model.digest == model.digest and len(str(model.digest)) == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(tmp_path: Path, sd_tensors: State, dtype: torch.dtype) -> None:
    half = {name: tensor.to(dtype) for name, tensor in sd_tensors.items()}
    write_tensors(tmp_path / "half.safetensors", half, {})
    model = sfumato.load(tmp_path / "half.safetensors", device="cpu")
    assert model.dtype == torch.float32 == model.unet.out[2].weight.dtype
    assert torch.equal(model.unet.state_dict()["out.2.weight"], half[UNET + "out.2.weight"].float())
    kept = open_model(tmp_path / "half.safetensors").modules["unet"].state_dict()
    assert torch.equal(kept["out.2.weight"], half[UNET + "out.2.weight"])


def test_averaged_weights_where_they_are_asked_for(
    tmp_path: Path, sd_tensors: State, sd_states: dict[str, State], equal: Equal
) -> None:
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in sd_tensors.items()
        if name.startswith(UNET)
    }
    path = written(tmp_path / "ema.ckpt", {**sd_tensors, **averaged}, "zip")
    plain = open_model(path)
    assert all_equal(plain, sd_states, equal)
    assert len(plain.opened.ignored["ema"]) == len(averaged)
    file = open_model(path, ema=True)
    assert equal(file.modules["unet"], {name: value + 1 for name, value in sd_states["unet"].items()})
    assert equal(file.modules["text"], sd_states["text"])
    with pytest.raises(InputError, match="holds no averaged weights"):
        open_model(written(tmp_path / "plain.ckpt", sd_tensors, "zip"), ema=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_when_their_part_is_used(
    tmp_path: Path, sd_tensors: State, value: float
) -> None:
    bad = sd_tensors[FIRST].clone()
    bad[3, 1, 2, 2] = value
    write_tensors(tmp_path / "bad.safetensors", {**sd_tensors, FIRST: bad}, {})
    model = sfumato.load(tmp_path / "bad.safetensors", device="cpu")
    assert model.encode_prompt(["a"]).context is not None
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: {FIRST} holds values that are not finite"):
        model.unet  # noqa: B018


def test_a_sum_beyond_the_numbers_is_no_damage() -> None:
    assert loading.is_finite(torch.full((4,), 3e38))
    assert loading.is_finite(torch.full((4000,), 6e4, dtype=torch.float16))
    assert loading.is_finite(torch.ones(4).to(torch.float8_e4m3fn))
    assert not loading.is_finite(torch.tensor([1.0, math.nan]).to(torch.float8_e5m2))
    assert not loading.is_finite(torch.tensor([math.inf, -math.inf]))
    assert not loading.is_finite(torch.tensor([1.0, math.nan], dtype=torch.bfloat16))


def test_weights_too_large_for_the_wanted_format(tmp_path: Path, sd_tensors: State) -> None:
    write_tensors(tmp_path / "m.safetensors", {**sd_tensors, FIRST: sd_tensors[FIRST] + 1e6}, {})
    model = sfumato.load(tmp_path / "m.safetensors", device="cpu", dtype="float16")
    with pytest.raises(CheckpointError, match=r"too large for torch\.float16"):
        model.unet  # noqa: B018


def test_another_autoencoder(
    tmp_path: Path, sd_file: Path, sd_tensors: State, sd_states: dict[str, State], equal: Equal
) -> None:
    other = {name.removeprefix(VAE): value + 1 for name, value in sd_tensors.items() if name.startswith(VAE)}
    write_tensors(tmp_path / "vae.safetensors", other, {})
    file = open_model(sd_file, vae=tmp_path / "vae.safetensors")
    assert equal(file.modules["autoencoder"], {k: v + 1 for k, v in sd_states["autoencoder"].items()})
    assert equal(file.modules["unet"], sd_states["unet"])
    assert file.config.latent_scale == 0.18215 and file.digest is None and len(file.identity) == 64
    assert file.opened.notes[-1].startswith("the autoencoder is that of")
    model = sfumato.load(sd_file, device="cpu", vae=tmp_path / "vae.safetensors")
    assert model.autoencoder is not None


def test_an_autoencoder_that_does_not_fit(
    tmp_path: Path, sd_file: Path, sd_tensors: State, tiny_model_file: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"makes latents of 2 channels.*the model's have 4"):
        open_model(sd_file, vae=tiny_model_file)
    unet = {name: tensor for name, tensor in sd_tensors.items() if name.startswith(UNET)}
    write_tensors(tmp_path / "unet.safetensors", unet, {})
    with pytest.raises(CheckpointError, match="holds no autoencoder, only unet"):
        open_model(sd_file, vae=tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match=r"makes latents of 2 channels, the U-Net's have 4"):
        open_model(tmp_path / "unet.safetensors", vae=tiny_model_file)
    with_one = open_model(tmp_path / "unet.safetensors", vae=sd_file)
    assert set(with_one.modules) == {"unet", "autoencoder"} and with_one.config.latent_scale == 0.18215


@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_part_alone(
    tmp_path: Path, sd_tensors: State, sd_states: dict[str, State], equal: Equal, prefix: str
) -> None:
    alone = {
        prefix + name.removeprefix(VAE): value for name, value in sd_tensors.items() if name.startswith(VAE)
    }
    write_tensors(tmp_path / "vae.safetensors", alone, {})
    file = open_model(tmp_path / "vae.safetensors")
    assert list(file.modules) == ["autoencoder"]
    assert equal(file.module("autoencoder"), sd_states["autoencoder"])
    with pytest.raises(CheckpointError, match="has no unet, only autoencoder"):
        file.module("unet")
    with pytest.raises(CheckpointError, match="has no U-Net"):
        sfumato.load(tmp_path / "vae.safetensors", device="cpu")


def test_a_model_stays_usable_when_the_next_does_not_load(tmp_path: Path, sd_file: Path) -> None:
    model = sfumato.load(sd_file, device="cpu")
    (tmp_path / "bad.ckpt").write_bytes(sd_file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        sfumato.load(tmp_path / "bad.ckpt", device="cpu")
    assert model.encode_prompt(["still there"]).context is not None
    assert model.unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 3, 64)).isfinite().all()


def test_predictions_by_option_and_by_metadata(tmp_path: Path, sd_file: Path, sd_tensors: State) -> None:
    assert open_model(sd_file).config.prediction == "eps"
    asked = open_model(sd_file, prediction="v")
    assert (asked.config.prediction, asked.opened.evidence) == ("v", "it was asked for")
    with pytest.raises(InputError, match="there is no prediction 'w'"):
        open_model(sd_file, prediction="w")
    write_tensors(tmp_path / "v.safetensors", sd_tensors, {"modelspec.prediction_type": "v"})
    said = open_model(tmp_path / "v.safetensors")
    assert said.config.prediction == "v" and "modelspec.prediction_type" in said.opened.evidence


YAML = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: v
    linear_start: 0.0015
    linear_end: 0.0205
    scale_factor: 0.5
    unet_config: {target: ldm.modules.diffusionmodules.openaimodel.UNetModel, params: {in_channels: 4}}
    unknown_option: [1, 2]
"""


def test_settings_in_the_yaml_beside(tmp_path: Path, sd_tensors: State) -> None:
    path = written(tmp_path / "m.ckpt", sd_tensors, "zip")
    path.with_suffix(".yaml").write_text(YAML)
    file = open_model(path)
    assert (file.config.prediction, file.config.latent_scale) == ("v", 0.5)
    assert (file.config.schedule.beta_start, file.config.schedule.beta_end) == (0.0015, 0.0205)
    assert file.opened.evidence == "parameterization in m.yaml"
    assert open_model(path, prediction="eps").config.prediction == "eps"


BOMB = (
    "\n      a: &a [a, a]\n"
    + "".join(f"      {new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi"))
    + "      target: *i"
)
DEEP = "0.5" + BOMB.replace("target", "linear_end").replace("      ", "    ")  # beside the other numbers


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ldm.models.diffusion.ddpm.LatentDiffusion", "os.system", "asks for 'os.system'"),
        ("ldm.modules.diffusionmodules.openaimodel.UNetModel", "builtins.eval", "asks for 'builtins.eval'"),
        ("[1, 2]", "!!python/object/apply:os.system ['touch canary']", "cannot be read"),
        ("[1, 2]", "[" * 400, "cannot be read"),
        ("[1, 2]", "[" * 600, "too long to describe a model"),
        ("[1, 2]", "x" * 100_000, "too long to describe a model"),
        ("[1, 2]", BOMB, "asks for a list"),
        ("0.5", "-1", "scale_factor is -1"),
        ("0.5", ".nan", "scale_factor is nan"),
        (
            "0.5",
            "0.5" + BOMB.replace("target", "linear_end").replace("      ", "    "),
            "linear_end is a list",
        ),
        ("v\n", "w\n", "no parameterization 'w'"),
    ],
)
def test_a_hostile_yaml_is_refused(
    tmp_path: Path, sd_tensors: State, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "m.ckpt", sd_tensors, "zip")
    path.with_suffix(".yaml").write_text(YAML.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        open_model(path)
    assert not (tmp_path / "canary").exists()


class Answering(UNet):
    """A U-Net whose answer is known."""

    def answer(self, value: float) -> Answering:
        for parameter in self.parameters():
            parameter.data.zero_()
        self.get_parameter("out.2.bias").data.fill_(value)
        return self


@pytest.mark.parametrize(("value", "found"), [(0.5, "eps"), (0.3, "eps"), (-1.0, "v")])
def test_the_probe_tells_noise_from_pictures(sd_config: ModelConfig, value: float, found: str) -> None:
    assert sd_config.unet is not None
    prediction, evidence = probe_prediction(Answering(sd_config.unet).answer(value))
    assert prediction == found and "timestep 999" in evidence


def test_a_model_without_evidence_is_probed(sd_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = loading.open_anything
    monkeypatch.setattr(
        loading, "open_anything", lambda *a, **k: dataclasses.replace(opened(*a, **k), uncertain=True)
    )
    monkeypatch.setattr(loading, "probe_prediction", lambda unet: ("v", f"{type(unet).__name__} was asked"))
    file = open_model(sd_file)
    assert (file.config.prediction, file.opened.evidence) == ("v", "UNet was asked")
    assert not file.opened.uncertain and file.report["prediction"] == "v"


def test_a_description_that_builds_no_network_is_refused_at_once(
    tmp_path: Path, tiny_model_file: Path
) -> None:
    from sfumato.checkpoints.files import read_tensors

    tensors, metadata = read_tensors(tiny_model_file)
    values = json.loads(metadata[METADATA_KEY])
    values["unet"]["num_heads"] = 3
    write_tensors(tmp_path / "m.safetensors", tensors, {METADATA_KEY: json.dumps(values)})
    with pytest.raises(CheckpointError):
        open_model(tmp_path / "m.safetensors")


def test_a_vocabulary_is_for_bert_alone(tmp_path: Path, sd_file: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    assert vocabulary_file(tmp_path) == vocabulary_file(tmp_path / "vocab.txt") == tmp_path / "vocab.txt"
    with pytest.raises(InputError, match="reads no WordPiece vocabulary"):
        open_model(sd_file, vocab=tmp_path / "vocab.txt")


@pytest.mark.parametrize("name", ["", "\0", "x" * 5000, "nothing.safetensors", "../nothing", "/dev/null"])
def test_what_is_no_model_is_one_kind_of_error(name: str) -> None:
    with pytest.raises(CheckpointError):
        open_model(name)

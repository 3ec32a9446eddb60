"""Model files: the way there and back, and that whatever else a file holds is one kind of error."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato
from sfumato.checkpoints.files import read_tensors, write_tensors
from sfumato.checkpoints.load import METADATA_KEY, check_fit, copy_into, load_file
from sfumato.checkpoints.save import save_file
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import CheckpointError, InputError, NumericalError
from sfumato.model import StableDiffusion, load
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import MAX_NUMBER, ModelConfig

FEW_EXAMPLES = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def parts_of(model: StableDiffusion) -> dict[str, nn.Module]:
    parts = {"unet": model.unet, "autoencoder": model.autoencoder, "text": model.text_encoder}
    return {part: module for part, module in parts.items() if module is not None}


def save(path: Path, model: StableDiffusion, dtype: torch.dtype = torch.float32) -> Path:
    save_file(path, model.config, {part: m.state_dict() for part, m in parts_of(model).items()}, dtype)
    return path


def rewritten(source: Path, path: Path, **changes: Any) -> Path:
    """The model file with other values in its description; keys with "__" between them lead into a table."""
    tensors, metadata = read_tensors(source)
    values = json.loads(metadata[METADATA_KEY])
    for key, value in changes.items():
        *tables, last = key.split("__")
        table = values
        for name in tables:
            table = table[name]
        table[last] = value
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(values)})
    return path


def test_every_weight_comes_back_under_stable_diffusions_names(
    tmp_path: Path, tiny_model: StableDiffusion
) -> None:
    path = save(tmp_path / "m.safetensors", tiny_model)
    file = load_file(path)
    assert file.config == tiny_model.config
    for part, module in parts_of(tiny_model).items():
        state = file.modules[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        assert not file.modules[part].training
        assert not any(parameter.requires_grad for parameter in file.modules[part].parameters())
    names = read_tensors(path)[0].keys()
    assert "model.diffusion_model.input_blocks.0.0.weight" in names
    assert "first_stage_model.decoder.conv_in.weight" in names
    assert "cond_stage_model.transformer.text_model.final_layer_norm.weight" in names
    again = save(tmp_path / "again.safetensors", tiny_model)
    assert again.read_bytes() == path.read_bytes()


def test_half_precision_rounds_once(tmp_path: Path, tiny_model: StableDiffusion) -> None:
    first = load_file(save(tmp_path / "a.safetensors", tiny_model, torch.float16))
    weight = tiny_model.unet.state_dict()["input_blocks.0.0.weight"]
    assert torch.equal(first.modules["unet"].state_dict()["input_blocks.0.0.weight"], weight.half())
    wide = load(tmp_path / "a.safetensors", device="cpu")
    assert wide.dtype == torch.float32
    second = save(tmp_path / "b.safetensors", wide, torch.float16)
    assert second.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_folder_means_the_model_file_in_it(tmp_path: Path, tiny_model: StableDiffusion) -> None:
    save(tmp_path / "model.safetensors", tiny_model)
    assert load(tmp_path, device="cpu").digest == load_file(tmp_path / "model.safetensors").digest


FULL = ModelConfig(
    name="all of it, ünicode",
    unet=UNetConfig(
        in_channels=4, out_channels=4, model_channels=32, num_res_blocks=(1, 2), attention_resolutions=(1, 2),
        channel_mult=(1, 2), num_heads=4, use_spatial_transformer=True, transformer_depth=(1, 0),
        context_dim=8,
    ),
    autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 2), attn_resolutions=(16,)),
    text=CLIPTextConfig(hidden_size=8, num_attention_heads=2),
    tokenizer='{"kind": "..."}',
    schedule=ScheduleConfig(kind="betas", betas=(0.1, 0.2, 0.3), num_timesteps=3),
    prediction="v",
    latent_scale=0.18215,
    image_size=(32, 64),
    defaults={"steps": 5, "guidance": 2.5, "sampler": "ddim"},
    notices="who made it",
)  # fmt: skip


@pytest.mark.parametrize("config", [ModelConfig(name="empty"), FULL], ids=["empty", "full"])
def test_a_configuration_is_the_same_after_json(config: ModelConfig) -> None:
    again = ModelConfig.from_json(config.to_json())
    assert again == config
    hash((again.unet, again.autoencoder, again.text, again.schedule, again.image_size))  # tuples, not lists


WRONG = {
    "another version": ({"version": 2}, "has format 2, this program reads 1"),
    "no version": ({"version": None}, "has format None"),
    "an unknown key": ({"sheduler": 1}, "unknown key 'sheduler'. Did you mean 'schedule'"),
    "an unknown key of a part": ({"unet__model_chanels": 8}, "unet.*'model_chanels'.*'model_channels'"),
    "a missing key": ({"unet": {"in_channels": 4}}, "unet.out_channels"),
    "text for a number": ({"unet__in_channels": "many"}, "unet.in_channels"),
    "a part that is no table": ({"autoencoder": [1]}, "autoencoder"),
    "parts that contradict": ({"unet__context_dim": None, "unet__dims": 5}, "dims=5 must be"),
    "too many layers": ({"unet__num_res_blocks": 10**9}, "the number 1e"),
    "a number beyond floats": ({"latent_scale": 10**400}, "too large"),
    "no scale": ({"latent_scale": 0.0}, "latent_scale is 0.0"),
    "not a number": ({"latent_scale": math.nan}, "the number nan"),
    "infinite": ({"schedule__beta_end": math.inf}, "the number inf"),
    "a picture without sides": ({"image_size": []}, "image_size"),
    "an unknown prediction": ({"prediction": "epsilon"}, "there is no prediction 'epsilon'"),
    "an unknown schedule": ({"schedule__kind": "linea"}, "Did you mean 'linear'"),
    "a default that reads a file": ({"defaults": {"start_noise": "/etc/passwd"}}, "no default 'start_noise'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_description_is_refused(
    tmp_path: Path, tiny_model_file: Path, changes: dict[str, Any], message: str
) -> None:
    path = rewritten(tiny_model_file, tmp_path / "bad.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, device="cpu")
    assert "bad.safetensors" in caught.value.message


DISAGREEING = {
    "layers without weights": {"text__num_hidden_layers": 100_000},
    "more blocks than the file holds": {"autoencoder__num_res_blocks": 100_000},
    "a width of nothing": {"unet__model_channels": 0},
    "a negative width": {"text__hidden_size": -16},
    "no levels": {"unet__channel_mult": []},
    "no groups": {"unet__num_groups": 0},
    "another vocabulary": {"text__vocab_size": 10, "text__eos_token_id": 1},
    "another autoencoder": {"autoencoder__embed_dim": 3},
    "another text width": {"unet__context_dim": 8},
    "no text at all": {"text": None},
    "a tokenizer that is none": {"tokenizer": "{}"},
    "no tokenizer": {"tokenizer": None},
    "a schedule that falls": {"schedule__beta_start": -1.0},
    "eps without an end": {"schedule__zero_terminal_snr": True},
    "an autoencoder alone": {"unet": None},
}


@pytest.mark.parametrize("changes", DISAGREEING.values(), ids=list(DISAGREEING))
def test_a_description_of_other_weights_is_refused(
    tmp_path: Path, tiny_model_file: Path, changes: dict[str, Any]
) -> None:
    path = rewritten(tiny_model_file, tmp_path / "bad.safetensors", **changes)
    with pytest.raises(CheckpointError):
        load(path, device="cpu")


NAMES = [f"model.diffusion_model.more.{index:02}" for index in range(12)]
UNET, FIRST = "model.diffusion_model.", "input_blocks.0.0.weight"


def with_tensors(source: Path, path: Path, changes: dict[str, Tensor | None]) -> Path:
    tensors, metadata = read_tensors(source)
    changed = {**tensors, **changes}
    write_tensors(path, {n: t for n, t in changed.items() if t is not None}, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UNET + FIRST: None}, f"{FIRST}: missing"),
        ({UNET + "extra": torch.zeros(1)}, f"1 tensors beside its unet.* no rule accounts for: {UNET}extra"),
        ({UNET + FIRST: torch.zeros(1, 2)}, rf"{FIRST}: shape \(1, 2\) for \(16, 2, 3, 3\)"),
        ({UNET + FIRST: torch.zeros(16, 2, 3, 3).long()}, f"{FIRST}: .*is not floating-point"),
        ({"stray": torch.zeros(1)}, "no rule accounts for: stray"),
        ({name: torch.zeros(1) for name in NAMES}, r"12 tensors .*more\.00, .*more\.09\n"),
    ],
    ids=["missing", "unexpected", "shape", "integers", "stray", "first ten"],
)
def test_keys_that_do_not_fit_are_named(
    tmp_path: Path, tiny_model_file: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    path = with_tensors(tiny_model_file, tmp_path / "bad.safetensors", changes)
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    assert caught.match(message) or pytest.fail(caught.value.message)
    assert "more.10" not in caught.value.message


def test_a_module_is_left_alone_where_the_weights_do_not_fit() -> None:
    module = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="the other one, 1 tensors differ: bias: missing"):
        copy_into(module, {"weight": torch.zeros(2, 2)}, "the other one")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    check_fit(before, before, "never")


def test_a_file_that_describes_no_model(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    write_tensors(path, {"weight": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="holds no network that is known here"):
        sfumato.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6], ids=["nan", "inf", "beyond float16"])
def test_weights_that_are_not_finite_are_not_written(
    tmp_path: Path, pixel_model: StableDiffusion, value: float
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    state = pixel_model.unet.state_dict()
    state["out.2.bias"] = torch.full_like(state["out.2.bias"], value)
    with pytest.raises(NumericalError, match=r"out\.2\.bias is not finite as .*float16; nothing was"):
        save_file(path, pixel_model.config, {"unet": state}, torch.float16)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_parts_that_do_not_fit_together_in_memory(tiny_model: StableDiffusion) -> None:
    config = dataclasses.replace(tiny_model.config, tokenizer=None)
    with pytest.raises(InputError, match="the tokenizer has no tokens"):
        StableDiffusion(config, parts_of(tiny_model))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


def places(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a table, and of the tables in it."""
    if not isinstance(value, dict):
        return []
    return [found for key, inner in value.items() for found in [(*path, key), *places(inner, (*path, key))]]


@FEW_EXAMPLES
@given(data=st.data())
def test_no_description_gives_another_exception(
    tmp_path: Path, tiny_model_file: Path, data: st.DataObject
) -> None:
    tensors, metadata = read_tensors(tiny_model_file)
    values = json.loads(metadata[METADATA_KEY])
    for place in data.draw(st.lists(st.sampled_from(places(values)), min_size=1, max_size=2)):
        table = values
        for key in place[:-1]:
            table = table.get(key) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table[place[-1]] = data.draw(JSON | st.integers(-1, 40))
    content = safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(values)})
    (tmp_path / "m.safetensors").write_bytes(content)
    try:
        model = load(tmp_path / "m.safetensors", device="cpu")
    except CheckpointError:
        return
    assert model.unet.config.in_channels == 2  # what still loads is a whole model


@settings(max_examples=200, deadline=None)
@given(text=st.text() | JSON.map(json.dumps) | st.just("[" * 100_000))
def test_no_text_for_a_description_gives_another_exception(text: str) -> None:
    with pytest.raises(CheckpointError, match="the model file"):
        ModelConfig.from_json(text)


def test_the_limit_is_far_from_real_models() -> None:
    assert max(49_408, 1280 * 10, 1000, 4096) * 10 < MAX_NUMBER

"""Diffusers folders: read by schema, nothing outside is opened, what is unknown is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import sfumato
from sfumato.checkpoints.clip import load_text_tower
from sfumato.checkpoints.detect.families import AUTOENCODERS, UNETS
from sfumato.checkpoints.layouts.diffusers_rest import read_scheduler, scheduler_values
from sfumato.checkpoints.layouts.diffusers_stages import (
    autoencoder_config,
    autoencoder_values,
    text_config,
    text_values,
)
from sfumato.checkpoints.layouts.diffusers_unet import unet_config, unet_values
from sfumato.checkpoints.layouts.naming import weight_file, weight_files
from sfumato.checkpoints.load import open_model
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import CheckpointError
from sfumato.nn.clip import CLIPTextConfig
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import Tokenizer, clip_json

State = dict[str, Tensor]
Equal = Callable[[torch.nn.Module, State], bool]
PLACE = Path("config.json")
INDEX, UNET, TEXT = "model_index.json", "unet/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, sd_folder: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def changed(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def all_equal(path: Path, states: dict[str, State], equal: Equal, **options: Any) -> bool:
    file = open_model(path, **options)
    return all(equal(file.modules[part], state) for part, state in states.items())


def test_a_folder_is_the_file_it_was_made_of(
    sd_folder: Path, sd_config: ModelConfig, sd_states: dict[str, State], equal: Equal
) -> None:
    file = open_model(sd_folder)
    assert all_equal(sd_folder, sd_states, equal) and set(file.modules) == set(sd_states)
    assert file.config == dataclasses.replace(
        sd_config, name=sd_folder.name, defaults={"sampler": "ddim", "spacing": "leading"}
    )
    assert file.opened.layout == "diffusers" and file.opened.unknown == () and file.opened.ignored == {}
    assert len(file.opened.files) == 3 and file.digest is None
    model = sfumato.load(sd_folder, device="cpu")
    assert model.encode_prompt(["a red apple"]).context is not None


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_component_alone(sd_folder: Path, sd_states: dict[str, State], equal: Equal, part: str) -> None:
    name = {"vae": "autoencoder", "text_encoder": "text"}.get(part, part)
    file = open_model(sd_folder / part)
    assert list(file.modules) == [name] and equal(file.modules[name], sd_states[name])
    assert file.config.latent_scale == (0.18215 if part == "vae" else 1.0)


def test_shards(folder: Path, sd_states: dict[str, State], equal: Equal) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / "unet" / name)
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert all_equal(folder, sd_states, equal)
    assert len(open_model(folder).opened.files) == 4
    (folder / "unet" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks its part '{names[1]}'"):
        open_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors",
        "C:x.safetensors", "link.safetensors", "a\0b", "x" * 300, "fifo.safetensors",
    ],
)  # fmt: skip
def test_shards_outside_of_the_folder_are_never_opened(folder: Path, name: str) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "unet" / WEIGHTS, outside)
    (folder / "unet" / "link.safetensors").symlink_to(outside)
    os.mkfifo(folder / "unet" / "fifo.safetensors")
    index = folder / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(outside), name)}))
    opened: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.checkpoints.folder.open_file", lambda path, **_: opened.append(path))
        with pytest.raises((CheckpointError, AttributeError)):
            open_model(folder)
    assert all(path.resolve().is_relative_to(folder) for path in opened)
    with pytest.raises(CheckpointError):
        open_model(folder)


@pytest.mark.parametrize(
    "place", ["unet", "unet/config.json", f"unet/{WEIGHTS}", "model_index.json", "tokenizer"]
)
def test_links_out_of_the_folder(folder: Path, place: str) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / place, outside)
    (folder / place).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        open_model(folder)


def test_links_of_the_hubs_cache(folder: Path, sd_states: dict[str, State], equal: Equal) -> None:
    cache = folder.parent / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("a" * 40)
    shutil.move(folder, snapshot)
    for index, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        blob = cache / "blobs" / str(index)
        shutil.move(path, blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert all_equal(snapshot, sd_states, equal)
    assert list(open_model(snapshot / "vae").modules) == ["autoencoder"]


def test_variants_and_other_formats(folder: Path, sd_states: dict[str, State], equal: Equal) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert open_model(folder).modules["unet"].get_parameter("out.2.weight").dtype == torch.float32
    assert (
        open_model(folder, variant="fp16").modules["unet"].get_parameter("out.2.weight").dtype
        == torch.float16
    )
    with pytest.raises(CheckpointError, match="no weights of the variant 'bf16'"):
        open_model(folder, variant="bf16")
    assert any(
        "text_encoder has no weights of the variant" in note
        for note in open_model(folder, variant="fp16").opened.notes
    )
    (folder / "unet" / WEIGHTS).unlink()
    assert open_model(folder).modules["unet"].get_parameter("out.2.weight").dtype == torch.float16
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    assert all_equal(folder, sd_states, equal)
    for path in (folder / "unet").glob("diffusion*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="unet holds no weights"):
        open_model(folder)


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], None, ["model.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (["diffusion_pytorch_model.non_ema.safetensors", WEIGHTS], None, [WEIGHTS]),
        (
            [f"{WEIGHTS}.index.json", "diffusion_pytorch_model-00001-of-00002.safetensors",
             "diffusion_pytorch_model-00002-of-00002.safetensors",
             "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"],
            None,
            [f"{WEIGHTS}.index.json", "diffusion_pytorch_model-00001-of-00002.safetensors",
             "diffusion_pytorch_model-00002-of-00002.safetensors"],
        ),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
            None,
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
        ),
        (["flax_model.msgpack", "model.onnx", "openvino_model.bin", "config.json"], None, []),
    ],
)  # fmt: skip
def test_which_weights_are_taken(names: list[str], variant: str | None, chosen: list[str]) -> None:
    assert weight_files(names, variant) == chosen
    assert weight_file(names, variant) == (chosen[0] if chosen else None)


def test_names_of_attention_before_0_17(folder: Path, sd_states: dict[str, State], equal: Equal) -> None:
    path = folder / "vae" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    save_file(tensors, path)
    assert all_equal(folder, sd_states, equal)


def test_position_ids_and_a_projection_are_ignored_by_rule(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    more = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.zeros(4, 64),
    }
    save_file({**load_file(path), **more}, path)
    opened = open_model(folder).opened
    assert set(opened.ignored) == {"position ids", "unused projection"} and not opened.unknown
    save_file({**load_file(path), "stray": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="stray"):
        open_model(folder)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a pipeline": (INDEX, {"_class_name": "os.system"}, "class 'os.system', which is not known"),
    "a pipeline of another kind": (INDEX, {"_class_name": "FluxPipeline"}, "not known here"),
    "a class": (UNET, {"_class_name": "subprocess.Popen"}, "not known here"),
    "a part of another kind": (UNET, {"_class_name": "AutoencoderKL"}, "describes a autoencoder"),
    "a width": (UNET, {"block_out_channels": [32, 48]}, "multiples of the first"),
    "widths that do not fit": (UNET, {"block_out_channels": [64, 128]}, "does not hold a whole unet"),
    "endless widths": (UNET, {"block_out_channels": [10**9]}, "block_out_channels.0 is 1000000000"),
    "many levels": (UNET, {"block_out_channels": [32] * 99}, "block_out_channels is a list"),
    "text for a number": (UNET, {"in_channels": "many"}, "in_channels is 'many'"),
    "layers": (TEXT, {"num_hidden_layers": 999_999}, "more layers of its text"),
    "heads": (UNET, {"attention_head_dim": [3, 5]}, "heads must be equal"),
    "heads that do not divide": (TEXT, {"num_attention_heads": 7}, "describes no network"),
    "an activation": (TEXT, {"hidden_act": "relu"}, "describes no network"),
    "an option": (UNET, {"time_embedding_type": "fourier"}, "supported is 'positional'"),
    "a normalisation": (UNET, {"norm_eps": 0.1}, "norm_eps is '0.1'"),
    "a block": (UNET, {"down_block_types": ["K", "K"]}, "no block 'K'"),
    "halves": (UNET, {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not mirror"),
    "a scale": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
    "a shift": ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is '0.1'"),
    "a scheduler": (SCHEDULER, {"_class_name": "FlowMatch"}, "not known here"),
    "a schedule": (SCHEDULER, {"beta_schedule": "x"}, "beta_schedule is 'x'"),
    "a prediction": (SCHEDULER, {"prediction_type": "x"}, "prediction_type is 'x'"),
    "betas": (SCHEDULER, {"trained_betas": [0.1] * 200_000}, "trained_betas is a list"),
    "a tokenizer": ("tokenizer/vocab.json", {"a": 1}, "not CLIP's kind"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "values", "message"), WRONG.values(), ids=list(WRONG))
def test_a_config_that_is_wrong(folder: Path, file: str, values: dict[str, Any], message: str) -> None:
    changed(folder / file, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(folder)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"[1]", b"\xff\xfe", b"{", b"nul\0", b'{"a": NaN'])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/vocab.json"])
def test_what_is_no_json(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError):
        open_model(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
FILES = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
         "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_config_gives_another_exception(sd_folder: Path, data: st.DataObject) -> None:
    path = sd_folder / data.draw(st.sampled_from(FILES))
    before = path.read_text()
    values = json.loads(before)
    for key in data.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=2)):
        values[key] = data.draw(JSON)
    path.write_text(json.dumps(values))
    try:
        open_model(sd_folder)
    except CheckpointError:
        pass
    finally:
        path.write_text(before)


@pytest.mark.parametrize("name", list(UNETS))
def test_the_configs_of_every_family_come_back(name: str) -> None:
    config = UNETS[name]
    try:
        values = json.loads(json.dumps(unet_values(config, 64)))
    except CheckpointError as error:
        assert "diffusers layout cannot hold" in error.message
        return
    again = unet_config(values, PLACE)
    assert unet_values(again, 64) == values
    spread = dataclasses.replace(
        again, num_heads=config.num_heads, num_head_channels=config.num_head_channels
    )
    assert spread == config or name in ("ldm-cin256", "ssd-1b", "segmind-vega", "koala-1b", "koala-700m")
    attended = [level for level in range(len(config.channel_mult)) if config.attended(level)]
    for factor in (config.channel_mult[level] for level in (*attended, -1)):
        width = factor * config.model_channels
        assert again.heads(width) == config.heads(width)


@pytest.mark.parametrize("name", list(AUTOENCODERS))
def test_the_configs_of_every_autoencoder_come_back(name: str) -> None:
    try:
        values = json.loads(json.dumps(autoencoder_values(AUTOENCODERS[name], 0.25)))
    except CheckpointError:
        assert name == "vq-f4-noattn"
        return
    assert autoencoder_config(values, PLACE) == (AUTOENCODERS[name], 0.25)


def test_text_configs_come_back() -> None:
    towers = [
        CLIPTextConfig(),
        CLIPTextConfig(
            hidden_size=1280, num_attention_heads=20, hidden_act="gelu", pad_token_id=0, projection_dim=1280
        ),
    ]
    for config in towers:
        assert text_config(json.loads(json.dumps(text_values(config))), PLACE, config.pad_id) == config
    released = {**text_values(CLIPTextConfig()), "eos_token_id": 2, "pad_token_id": 1}
    assert text_config(released, PLACE, 49407) == CLIPTextConfig()


SCHEDULES = [
    (ScheduleConfig(), "eps"),
    (ScheduleConfig(kind="linear", beta_start=0.0015, beta_end=0.0195), "v"),
    (ScheduleConfig(zero_terminal_snr=True), "v"),
    (ScheduleConfig(kind="betas", betas=(0.1, 0.2, 0.3), num_timesteps=3), "x0"),
    (ScheduleConfig(kind="cosine"), "eps"),
    (ScheduleConfig(kind="sigmoid"), "eps"),
    (ScheduleConfig(kind="sigmoid", zero_terminal_snr=True), "v"),
]


@pytest.mark.parametrize(("schedule", "prediction"), SCHEDULES)
def test_schedules_come_back(tmp_path: Path, schedule: ScheduleConfig, prediction: str) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(scheduler_values(schedule, prediction)))
    found = read_scheduler(path)
    listed = schedule.kind in ("betas", "sigmoid")  # the latter has no name in this class of theirs
    assert (found.prediction, found.schedule.kind) == (prediction, "betas" if listed else schedule.kind)
    torch.testing.assert_close(Schedule(found.schedule).sigmas, Schedule(schedule).sigmas)
    if not listed:
        assert found.schedule == schedule
    assert found.defaults["spacing"] == ("trailing" if schedule.zero_terminal_snr else "leading")


def test_the_scheduler_says_what_is_drawn_best_with(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    changed(
        path,
        _class_name="EulerDiscreteScheduler",
        timestep_spacing="linspace",
        prediction_type="v_prediction",
    )
    config = open_model(folder).config
    assert config.defaults == {"sampler": "euler", "spacing": "uniform"} and config.prediction == "v"
    changed(path, _class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True)
    assert open_model(folder).config.defaults == {"sampler": "dpmpp_2m", "spacing": "karras"}
    changed(path, _class_name="PNDMScheduler")
    assert open_model(folder).config.defaults == {}
    path.unlink()
    assert "no scheduler" in open_model(folder).opened.evidence


def test_a_tokenizer_of_ones_own(folder: Path) -> None:
    own = Tokenizer.train(["a red apple", "a blue apple"], 520, 77)
    merges = "\n".join(f"{left} {right}" for left, right in own.merges)
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    from sfumato.text.tokenizer import vocabulary

    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary(own.merges)))
    config = open_model(folder).config
    assert config.tokenizer is not None
    assert Tokenizer.from_json(config.tokenizer).encode("a red apple") == own.encode("a red apple")
    whole = {
        "model": {
            "type": "BPE",
            "vocab": vocabulary(own.merges),
            "merges": [list(pair) for pair in own.merges],
        }
    }
    for name in ("merges.txt", "vocab.json"):
        (folder / "tokenizer" / name).unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    assert open_model(folder).config.tokenizer == config.tokenizer


def test_what_is_not_read_is_said(folder: Path) -> None:
    changed(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert open_model(folder).opened.notes == ("safety_checker is not read",)
    shutil.rmtree(folder / "tokenizer")
    assert "the folder has no tokenizer; CLIP's is taken" in open_model(folder).opened.notes


def test_a_folder_of_both_towers_of_clip_gives_its_text_tower(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision = {**text, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    theirs.save_pretrained(tmp_path)
    tower = load_text_tower(tmp_path)
    tokens = torch.randint(0, 49406, (2, 77))
    tokens[:, -1] = 49407
    with torch.no_grad():
        wanted = theirs.text_model(tokens).last_hidden_state
        assert torch.equal(tower.encoder(tokens).last_hidden_state, wanted)
    assert tower.tokenizer == clip_json() and tower.config.projection_dim is None

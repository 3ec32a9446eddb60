"""Control networks and adapters out of files in the layouts they are released in, strictly."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.controls.adapters_layouts import ip_pairs, t2i_pairs
from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.controls.load import find_control, load_control
from sfumato.checkpoints.files import open_file, write_tensors
from sfumato.checkpoints.layouts.tables import to_foreign
from sfumato.checkpoints.source import Source, TensorInfo
from sfumato.errors import CheckpointError
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.ip_adapter import IPAdapter, IPAdapterConfig
from sfumato.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.nn.unet_config import UNetConfig

State = Mapping[str, Tensor]
ENCODER = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, num_res_blocks=2, attention_resolutions=(1, 2),
    channel_mult=(1, 2, 2), num_heads=8, use_spatial_transformer=True, context_dim=768, legacy=False,
)  # fmt: skip
SD1 = ControlNetConfig(ENCODER, hint_widths=(4, 6, 8))
XL = replace(
    ENCODER, attention_resolutions=(2, 4), transformer_depth=(1, 1, 2), use_linear_in_transformer=True,
    num_classes="sequential", adm_in_channels=24, num_heads=-1, num_head_channels=64, context_dim=40,
)  # fmt: skip
CONTROLS = {
    "sd1": SD1,
    "one block, four widths, grey": replace(
        SD1, encoder=replace(ENCODER, num_res_blocks=1), hint_channels=1, hint_widths=(4, 6, 8, 12)
    ),
    "sdxl": replace(SD1, encoder=XL),
    "deeper middle": replace(SD1, encoder=replace(XL, transformer_depth_middle=3)),
    "no attention": replace(
        SD1, encoder=replace(XL, attention_resolutions=(), middle="residual", context_dim=None,
                             use_spatial_transformer=False, use_linear_in_transformer=False,
                             transformer_depth=1, num_heads=-1, num_head_channels=32),
    ),
}  # fmt: skip
PLAIN = IPAdapterConfig((32, 64, 64, 32), context_dim=24, image_dim=20)
IPS = {
    "plain": PLAIN,
    "16 tokens": replace(PLAIN, num_tokens=16),
    "plus": replace(PLAIN, kind="plus", num_tokens=6, resampler_dim=32, num_heads=2, depth=3),
    "full": replace(PLAIN, kind="full"),
}
# Neither their numbers nor their heads are read from "full" and "plain" files, so the options stay unset.
T2I = T2IAdapterConfig(channels=(16, 32, 64, 64))
T2IS = {
    "full": T2I,
    "grey": replace(T2I, in_channels=1, num_res_blocks=3),
    "xl": replace(T2I, kind="full-xl", unshuffle=16),
    "light": replace(T2I, kind="light", num_res_blocks=4),
}
VISION = CLIPVisionConfig(
    hidden_size=128, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28,
    patch_size=7, projection_dim=12,
)  # fmt: skip


def state_of(network: nn.Module) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) for name, value in network.state_dict().items()
    }


def written(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> Path:
    write_tensors(path, dict(tensors), metadata or {})
    return path


def loaded_equal(found: nn.Module, state: State) -> bool:
    own = found.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("name", CONTROLS)
def test_controlnets_in_their_authors_layout(tmp_path: Path, name: str, prefix: str) -> None:
    config = CONTROLS[name]
    state = state_of(ControlNet(config))
    path = written(tmp_path / "control.safetensors", {prefix + key: value for key, value in state.items()})
    found = load_control(path)
    assert isinstance(found, ControlNet) and loaded_equal(found, state)
    if name != "no attention":
        assert found.config == config
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("name", CONTROLS)
def test_controlnets_in_diffusers_layout(tmp_path: Path, name: str) -> None:
    config = CONTROLS[name]
    state = state_of(ControlNet(config))
    found = load_control(written(tmp_path / "a.safetensors", to_foreign(control_pairs(config), state)))
    assert isinstance(found, ControlNet) and loaded_equal(found, state)
    assert find_control(open_file(tmp_path / "a.safetensors")).ignored == ()


def test_a_folder_that_diffusers_wrote(tmp_path: Path) -> None:
    theirs = diffusers.ControlNetModel(
        block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=(2, 4, 4), use_linear_projection=True, global_pool_conditions=True,
        conditioning_embedding_out_channels=(4, 6, 8, 10),
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    found = load_control(tmp_path)
    assert isinstance(found, ControlNet) and found.config.global_average
    assert (found.config.encoder.num_heads, found.config.encoder.num_head_channels) == (-1, 16)
    assert len(found.state_dict()) == len(theirs.state_dict())


def test_the_model_that_an_early_file_holds_too_is_left_out(tmp_path: Path) -> None:
    state = state_of(ControlNet(SD1))
    whole = {f"control_model.{name}": value for name, value in state.items()}
    beside = ["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias", "betas"]
    beside += ["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    torch.save({"state_dict": whole | dict.fromkeys(beside, torch.zeros(3))}, tmp_path / "control.pth")
    found = load_control(tmp_path / "control.pth")
    assert loaded_equal(found, state)
    assert set(find_control(open_file(tmp_path / "control.pth")).ignored) == set(beside)


@pytest.mark.parametrize("name", IPS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_ip_adapters(tmp_path: Path, name: str, suffix: str) -> None:
    state = state_of(IPAdapter(IPS[name]))
    tensors = to_foreign(ip_pairs(IPS[name]), state)
    path = tmp_path / f"ip{suffix}"
    if suffix == ".bin":
        tables: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in tensors.items():
            tables[key.partition(".")[0]][key.partition(".")[2]] = value
        torch.save(tables, path)
    else:
        written(path, tensors)
    found = load_control(path)
    assert isinstance(found, IPAdapter) and loaded_equal(found, state)
    assert found.config == IPS[name]


@pytest.mark.parametrize("name", T2IS)
@pytest.mark.parametrize("layout", ["authors", "diffusers"])
def test_t2i_adapters(tmp_path: Path, name: str, layout: str) -> None:
    state = state_of(T2IAdapter(T2IS[name]))
    path = tmp_path / "t2i.pth"
    torch.save(state if layout == "authors" else to_foreign(t2i_pairs(T2IS[name]), state), path)
    found = load_control(path)
    assert isinstance(found, T2IAdapter) and loaded_equal(found, state)
    assert found.config == T2IS[name]


def test_image_towers_alone_in_a_whole_clip_and_in_a_folder(tmp_path: Path) -> None:
    state = dict(state_of(CLIPVisionEncoder(VISION)))
    alone = load_control(written(tmp_path / "alone.safetensors", state))
    assert isinstance(alone, CLIPVisionEncoder) and loaded_equal(alone, state)
    assert alone.config == VISION
    more = ["text_model.final_layer_norm.bias", "text_projection.weight", "logit_scale"]
    more += ["vision_model.embeddings.position_ids"]
    whole = written(tmp_path / "whole.safetensors", state | {name: torch.zeros(2, 2) for name in more})
    assert loaded_equal(load_control(whole), state)
    folder = tmp_path / "image_encoder"
    folder.mkdir()
    values = {"num_attention_heads": 4, "hidden_act": "quick_gelu"}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    written(folder / "model.safetensors", state)
    described: Any = load_control(folder)
    assert described.config == replace(VISION, num_attention_heads=4, hidden_act="quick_gelu")


def test_weights_are_converted(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", state_of(T2IAdapter(T2I)))
    assert next(load_control(path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


FILES: dict[str, tuple[nn.Module, str]] = {
    "ControlNet": (ControlNet(SD1), "zero_convs.3.0.weight"),
    "IP-Adapter": (IPAdapter(PLAIN), "ip_adapter.1.to_k_ip.weight"),
    "T2I-Adapter": (T2IAdapter(T2I), "body.3.block2.bias"),
    "CLIP image tower": (CLIPVisionEncoder(VISION), "vision_model.encoder.layers.1.mlp.fc2.bias"),
}


def in_file(kind: str) -> dict[str, Tensor]:
    network, _ = FILES[kind]
    state = state_of(network)
    return dict(to_foreign(ip_pairs(PLAIN), state) if kind == "IP-Adapter" else state)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "number"])
def test_files_that_are_not_whole_are_refused(tmp_path: Path, kind: str, damage: str) -> None:
    tensors, name = in_file(kind), FILES[kind][1]
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        name = "a_strange_tensor_of_another_network_altogether.weight"
        tensors[name] = torch.zeros(3)
    elif damage == "shape":
        tensors[name] = torch.zeros(3, 5)
    else:
        tensors[name] = tensors[name].clone().fill_(float("nan"))
    path = written(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_control(path)
    assert str(path) in caught.value.message and name in caught.value.message
    if damage in ("missing", "unexpected"):
        assert damage in caught.value.message and kind in caught.value.message


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"down_blocks.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no network that controls"):
        load_control(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        load_control(tmp_path / "empty")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"controlnet_conditioning_channel_order": "bgr"}, "bgr"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"attention_head_dim": [1, 2, 0]}, "positive"),
        ({"attention_head_dim": [2, 8, 2]}, "not built here"),
    ],
)
def test_folders_of_networks_that_are_not_built_here_are_refused(
    tmp_path: Path, values: dict[str, Any], word: str
) -> None:
    written(tmp_path / "model.safetensors", state_of(ControlNet(SD1)))
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=word):
        load_control(tmp_path)


def test_adapters_of_faces_are_refused(tmp_path: Path) -> None:
    tensors = in_file("IP-Adapter") | {"ip_adapter.1.to_q_lora.down.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="faces"):
        load_control(written(tmp_path / "face.safetensors", tensors))


def test_heads_are_read_from_metadata(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", state_of(ControlNet(SD1)), {"num_heads": "4"})
    found: Any = load_control(path)
    assert found.config.encoder.num_heads == 4


@pytest.mark.parametrize("kind", FILES)
def test_damaged_shapes_end_in_errors_for_people(kind: str) -> None:
    """Some tensors have other shapes, are gone, or are there twice over: nothing is built of such a file."""
    random, whole = Random(0), {name: tuple(value.shape) for name, value in in_file(kind).items()}
    refused = 0
    for _ in range(60):
        shapes = dict(whole)
        for name in random.sample(sorted(shapes), random.randint(1, 4)):
            damage = random.randrange(4)
            if damage == 0:
                del shapes[name]
            elif damage == 1:
                shapes[name] = tuple(random.choice((0, 1, 3, 2**40)) for _ in range(random.randint(0, 5)))
            elif damage == 2:
                shapes[name.replace("0", "77777")] = shapes.pop(name)
            else:
                shapes[name + ".1.transformer_blocks.5.x"] = (1,)
        infos = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
        source = Source(Path("damaged.safetensors"), "safetensors", infos, lambda name: torch.zeros(1))
        if shapes == whole:
            continue
        refused += 1
        with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
            find_control(source)
    assert refused > 50


def test_names_that_would_make_more_layers_than_there_are_tensors_are_refused() -> None:
    names = ["input_hint_block.0.weight", "input_hint_block.2.weight", "input_blocks.0.0.weight"]
    names += [f"input_blocks.{i}.0.out_layers.3.weight" for i in range(1, 1500)]
    names += [f"input_blocks.1.1.transformer_blocks.{i}.attn2.to_k.weight" for i in range(1500)]
    infos = {name: TensorInfo(torch.float32, (32, 32, 3, 3)) for name in names}
    source = Source(Path("large.safetensors"), "safetensors", infos, lambda name: torch.zeros(1))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="no whole ControlNet"):
        find_control(source)
    assert time.perf_counter() - started < 60

"""LoRA against the reference library: its networks, its reading of the names, factors beside the layers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from addon_files import Factors, dotted, draw, hooked, kohya, layers, write
from torch import Tensor, nn

from sfumato.checkpoints.addons.apply import Weighted, apply_addons, fit, read_lora
from sfumato.checkpoints.load import ModelFile, open_model
from sfumato.nn.clip import CLIPTextEncoder
from sfumato.nn.unet import UNet

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
naming = pytest.importorskip("diffusers.utils.state_dict_utils")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(sd_file: Path) -> ModelFile:
    return open_model(sd_file)


@pytest.fixture(scope="module")
def reference_unet(sd_folder: Path) -> nn.Module:
    return diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet").eval()


@pytest.fixture(scope="module")
def reference_text(sd_folder: Path) -> nn.Module:
    return transformers.CLIPTextModel.from_pretrained(sd_folder / "text_encoder").eval()


def unet_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 64)))
    return x, torch.tensor([10, 700]), context


@torch.no_grad()
def reference_drawn(unet: nn.Module, factors: Mapping[str, Factors]) -> Tensor:
    remove = hooked(unet, factors)
    try:
        x, t, context = unet_inputs()
        return unet(x, t, encoder_hidden_states=context).sample
    finally:
        remove()


@torch.no_grad()
def drawn(model: ModelFile, path: Path | None) -> Tensor:
    loras = [] if path is None else [Weighted(read_lora(path))]
    with apply_addons(model.config, model.modules, loras):
        unet = model.module("unet")
        assert isinstance(unet, UNet)
        x, t, context = unet_inputs()
        return unet(x, t, context=context)


TOKENS = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407]])


@torch.no_grad()
def encoded(model: ModelFile, path: Path | None) -> Tensor:
    loras = [] if path is None else [Weighted(read_lora(path))]
    with apply_addons(model.config, model.modules, loras):
        text = model.module("text")
        assert isinstance(text, CLIPTextEncoder)
        return text(TOKENS).last_hidden_state


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def read_by_reference(tensors: Mapping[str, Tensor], unet: Any) -> dict[str, dict[str, Factors]]:
    """ "unet", "text_encoder" -> layer -> factors: what the reference makes of the names in a kohya file."""
    config = argparse.Namespace(layers_per_block=unet.config["layers_per_block"])
    state = conversion._maybe_map_sgm_blocks_to_diffusers(dict(tensors), config)
    state, alphas = conversion._convert_non_diffusers_lora_to_diffusers(state)
    found: dict[str, dict[str, Factors]] = {}
    for part, rename in (
        ("unet", naming.convert_unet_state_dict_to_peft),
        ("text_encoder", naming.convert_state_dict_to_peft),
    ):
        own = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if part in name[:12]}
        factors = rename(own) if own else {}
        numbers = {alpha for name, alpha in alphas.items() if name.startswith(part)}
        assert len(numbers) <= 1, "the tests give every layer the same alpha"
        for name, tensor in factors.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                up = factors[f"{layer}.lora_B.weight"]
                found.setdefault(part, {})[layer] = Factors(tensor, up.flatten(1), numbers.copy().pop())
    return found


def onetrainer(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """kohya's tensors behind names with dots."""
    slots = ("lora_down.weight", "lora_up.weight", "alpha")
    return {
        f"lora_unet.{name}.{slot}": tensor
        for name, each in factors.items()
        for slot, tensor in zip(slots, kohya("", {name: each}).values(), strict=True)
    }


NAMED = ("lora_A.default.weight", "lora_B.default.weight")
DIALECTS: Mapping[str, Callable[[Mapping[str, Factors]], dict[str, Tensor]]] = {
    "kohya": lambda factors: kohya("lora_unet_", factors),
    "OneTrainer": onetrainer,
    "PEFT": lambda factors: dotted("unet.", factors),
    "PEFT, a network alone": lambda factors: dotted("base_model.model.", factors, *NAMED),
    "diffusers": lambda factors: dotted("unet.", factors, "lora.down.weight", "lora.up.weight"),
}


def test_the_networks_agree_without_lora(
    model: ModelFile, reference_unet: nn.Module, reference_text: nn.Module
) -> None:
    assert difference(drawn(model, None), reference_drawn(reference_unet, {})) < 1e-5
    assert difference(encoded(model, None), reference_text(TOKENS).last_hidden_state) < 1e-5


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_layer_of_a_unet(
    dialect: str, model: ModelFile, reference_unet: nn.Module, tmp_path: Path
) -> None:
    """Linear layers and convolutions of all kinds, in each dialect: the same picture."""
    factors = draw(layers(reference_unet))
    path = write(tmp_path / "all.safetensors", DIALECTS[dialect](factors))
    theirs = reference_drawn(reference_unet, factors)
    assert difference(drawn(model, path), theirs) < TOLERANCE
    assert difference(drawn(model, None), theirs) > 0.1, "the LoRA must change the picture"


def test_attention_under_the_names_of_its_processors(
    model: ModelFile, reference_unet: nn.Module, tmp_path: Path
) -> None:
    factors = {
        name: each
        for name, each in draw(layers(reference_unet)).items()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    }
    old = {
        f"{name.removesuffix('.0').replace('.to_', '.processor.to_')}_lora": each
        for name, each in factors.items()
    }
    path = write(tmp_path / "old.safetensors", dotted("", old, "down.weight", "up.weight"))
    assert difference(drawn(model, path), reference_drawn(reference_unet, factors)) < TOLERANCE


@pytest.mark.parametrize("names", ["diffusers", "ldm"])
def test_the_reference_reads_the_same_layers_from_a_kohya_file(
    names: str, model: ModelFile, reference_unet: nn.Module, tmp_path: Path
) -> None:
    """Its own rules turn the file's names into layers: not our tables."""
    network = reference_unet if names == "diffusers" else model.module("unet")
    wanted = (".to_q", ".to_v", ".to_out.0", "proj_in", "ff.net.2", "conv1", "in_layers.2", "emb_layers.1")
    factors = {name: each for name, each in draw(layers(network)).items() if name.endswith(wanted)}
    tensors = kohya("lora_unet_", factors)
    read = read_by_reference(tensors, reference_unet)["unet"]
    assert len(read) == len(factors) > 20
    path = write(tmp_path / "kohya.safetensors", tensors)
    assert difference(drawn(model, path), reference_drawn(reference_unet, read)) < TOLERANCE


@pytest.mark.parametrize("dialect", ["kohya", "PEFT", "diffusers", "processors"])
@torch.no_grad()
def test_every_layer_of_a_text_encoder(
    dialect: str, model: ModelFile, reference_text: nn.Module, reference_unet: nn.Module, tmp_path: Path
) -> None:
    bare = {
        name: each for name, each in draw(layers(reference_text)).items() if "proj" in name or "fc" in name
    }
    factors = {
        name if name.startswith("text_model.") else f"text_model.{name}": each for name, each in bare.items()
    }
    read = bare
    if dialect == "kohya":
        tensors = kohya("lora_te_", factors)
        own = read_by_reference(tensors, reference_unet)["text_encoder"]
        assert {name.removeprefix("text_model.") for name in own} == {
            name.removeprefix("text_model.") for name in bare
        }
    elif dialect == "PEFT":
        tensors = dotted("text_encoder.", factors)
    elif dialect == "diffusers":
        tensors = dotted(
            "text_encoder.", factors, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"
        )
    else:
        read = {name: each for name, each in bare.items() if "self_attn" in name}
        old = {
            name.replace("out_proj", "to_out_lora").replace("q_proj", "to_q_lora")
            .replace("k_proj", "to_k_lora").replace("v_proj", "to_v_lora"): each
            for name, each in factors.items() if "self_attn" in name
        }  # fmt: skip
        tensors = dotted("text_encoder.", old, "down.weight", "up.weight")
    path = write(tmp_path / "text.safetensors", tensors)
    remove = hooked(reference_text, read)
    theirs = reference_text(TOKENS).last_hidden_state
    remove()
    assert difference(encoded(model, path), theirs) < TOLERANCE
    assert difference(encoded(model, None), theirs) > 0.03
    assert not fit(read_lora(path), model.config).unknown

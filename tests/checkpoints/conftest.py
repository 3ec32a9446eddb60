"""A small Stable Diffusion as strangers' files hold it: LDM's names, no description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.checkpoints.build import NETWORKS
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.files import write_tensors
from sfumato.checkpoints.layouts.tables import generate, prefix, to_foreign
from sfumato.checkpoints.load import open_model
from sfumato.nn.autoencoder import AutoencoderConfig
from sfumato.nn.clip import CLIPTextConfig
from sfumato.nn.unet import UNetConfig
from sfumato.presets import PARTS, ModelConfig
from sfumato.text.tokenizer import clip_json

State = dict[str, Tensor]


def stable_diffusion(**changes: object) -> ModelConfig:
    """Shapes that are told like the real ones: 32 groups, heads of SD 1, CLIP's vocabulary."""
    unet: dict[str, object] = {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1,
        "attention_resolutions": (1, 2), "channel_mult": (1, 2), "num_heads": 8, "legacy": False,
        "use_spatial_transformer": True, "context_dim": 64,
    }  # fmt: skip
    return ModelConfig(
        name="sd",
        unet=UNetConfig(**unet | changes),  # type: ignore[arg-type]
        autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1),
        text=CLIPTextConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1
        ),
        tokenizer=clip_json(),
        latent_scale=0.18215,
        image_size=(512, 512),
    )


def weights(config: ModelConfig, seed: int = 0) -> dict[str, State]:
    """Random weights for every part, as state dicts."""
    generator = torch.Generator().manual_seed(seed)
    states: dict[str, State] = {}
    for part in PARTS:
        if (part_config := getattr(config, part)) is not None:
            module = NETWORKS[part](part_config)
            states[part] = {
                name: torch.randn(value.shape, generator=generator) * 0.05
                for name, value in module.state_dict().items()
            }
    return states


def in_ldm(config: ModelConfig, states: Mapping[str, State]) -> State:
    """All parts under the names that single files have."""
    return {
        prefix(part, "ldm", config) + name: value
        for part, state in states.items()
        for name, value in to_foreign(generate(part, getattr(config, part), "ldm"), state).items()
    }


def same(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether a network has exactly these weights."""
    own = module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.fixture(scope="session")
def sd_config() -> ModelConfig:
    return stable_diffusion()


@pytest.fixture(scope="session")
def sd_states(sd_config: ModelConfig) -> dict[str, State]:
    return weights(sd_config)


@pytest.fixture(scope="session")
def sd_tensors(sd_config: ModelConfig, sd_states: dict[str, State]) -> State:
    """The tensors of a single file, under LDM's names."""
    return in_ldm(sd_config, sd_states)


@pytest.fixture(scope="session")
def sd_file(tmp_path_factory: pytest.TempPathFactory, sd_tensors: State) -> Path:
    """A safetensors file in LDM layout that says nothing of itself."""
    path = tmp_path_factory.mktemp("sd") / "sd.safetensors"
    write_tensors(path, sd_tensors, {})
    return path


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory, sd_file: Path) -> Path:
    """The same as a diffusers folder; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("sd") / "folder"
    convert(open_model(sd_file).opened, path)
    return path


@pytest.fixture
def equal() -> Callable[[nn.Module, Mapping[str, Tensor]], bool]:
    return same

"""Models small enough to draw with in milliseconds; their weights are random but the same in every run."""

from __future__ import annotations

import os
import shutil

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker, in processes that tests start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from sfumato.checkpoints.save import save_file
from sfumato.model import StableDiffusion
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.bert import BERTConfig, BERTEmbedder
from sfumato.nn.classes import ClassEmbedder, ClassEmbedderConfig
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.nn.vq import VQModel
from sfumato.presets import ModelConfig
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.wordpiece import WordPiece

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")  # a busy machine is not a failure

CAPTIONS = ["a red apple", "a blue apple", "a fox in a snowy forest", "two green pears on a table"]
CONTEXT = 8  # tokens


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Give every weight a small random value, those that start at zero too; ready to draw with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
        parameter.data = values if parameter.ndim > 1 else 1 + 0.1 * values
    return module.requires_grad_(False).eval()


def tiny_config() -> ModelConfig:
    tokenizer = Tokenizer.train(CAPTIONS, 540, CONTEXT)
    return ModelConfig(
        name="tiny",
        unet=UNetConfig(
            in_channels=2, out_channels=2, model_channels=16, num_res_blocks=1, attention_resolutions=(2,),
            channel_mult=(1, 2), num_heads=2, use_spatial_transformer=True, context_dim=16, num_groups=8,
        ),
        autoencoder=AutoencoderConfig(
            z_channels=2, resolution=16, ch=8, ch_mult=(1, 2), num_res_blocks=1, embed_dim=2, num_groups=8,
        ),
        text=CLIPTextConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=CONTEXT, eos_token_id=tokenizer.end_id,
        ),
        tokenizer=tokenizer.to_json(),
        image_size=(16, 16),
        defaults={"steps": 4, "guidance": 3.0, "sampler": "dpmpp_2m"},
    )  # fmt: skip


def networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The parts of a configuration, with random weights."""
    assert config.unet is not None
    parts = {"unet": randomised(UNet(config.unet), 1)}
    if config.autoencoder is not None:
        kind = AutoencoderKL if config.autoencoder.n_embed is None else VQModel
        parts["autoencoder"] = randomised(kind(config.autoencoder), 2)
    if config.text is not None:
        parts["text"] = randomised(CLIPTextEncoder(config.text), 3)
    if config.text2 is not None:
        parts["text2"] = randomised(CLIPTextEncoder(config.text2), 4)
    if config.bert is not None:
        parts["bert"] = randomised(BERTEmbedder(config.bert), 5)
    if config.classes is not None:
        parts["classes"] = randomised(ClassEmbedder(config.classes), 6)
    return parts


@pytest.fixture
def tiny_model() -> StableDiffusion:
    """A latent text-to-image model of 16x16 pictures: f = 2, two latent channels, eight tokens."""
    config = tiny_config()
    return StableDiffusion(config, networks(config))


def tiny_xl_config() -> ModelConfig:
    """The same with SDXL's two text encoders, of three layers each, and its vector."""
    config = tiny_config()
    assert config.unet is not None and config.text is not None
    text = replace(config.text, num_hidden_layers=3)
    return replace(
        config,
        name="tiny-xl",
        unet=replace(config.unet, context_dim=40, num_classes="sequential", adm_in_channels=12 + 6 * 256),
        text=text,
        text2=replace(text, hidden_size=24, hidden_act="gelu", projection_dim=12, pad_token_id=0),
        clip_skip=2,
        text_normed=False,
        zeros_for_empty=True,
    )


@pytest.fixture
def tiny_xl_model() -> StableDiffusion:
    """A model with SDXL's conditions: two text encoders side by side, a pooled vector and sizes."""
    config = tiny_xl_config()
    return StableDiffusion(config, networks(config))


@pytest.fixture
def tiny_bert_model() -> StableDiffusion:
    """A model with the text transformer of LDM's 1.45 B model and a vocabulary of a few words."""
    config = tiny_config()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    config = replace(
        config,
        name="tiny-bert",
        text=None,
        bert=BERTConfig(n_embed=16, n_layer=1, vocab_size=40, max_seq_len=CONTEXT, heads=2, dim_head=8),
        tokenizer=WordPiece([*marks, *dict.fromkeys(" ".join(CAPTIONS).split())]).to_json(),
    )
    return StableDiffusion(config, networks(config))


@pytest.fixture
def tiny_class_model() -> StableDiffusion:
    """A model of four numbered classes, the last of which is none, with a codebook in its autoencoder."""
    config = tiny_config()
    assert config.autoencoder is not None
    config = replace(
        config,
        name="tiny-classes",
        text=None,
        tokenizer=None,
        classes=ClassEmbedderConfig(n_classes=4, embed_dim=16),
        autoencoder=replace(config.autoencoder, double_z=False, n_embed=30),
    )
    return StableDiffusion(config, networks(config))


@pytest.fixture(scope="session")
def tiny_file() -> Callable[..., Path]:
    """A function of (path, what is otherwise in the configuration) that writes such a model, and its path."""

    def write(path: Path, **otherwise: Any) -> Path:
        config = replace(tiny_config(), **otherwise)
        parts = {part: module.state_dict() for part, module in networks(config).items()}
        save_file(path, config, parts, torch.float32)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model_file(tiny_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a file."""
    return tiny_file(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def pixel_model() -> StableDiffusion:
    """An unconditional model of grey 8x8 pictures: neither autoencoder nor text encoder."""
    config = ModelConfig(
        name="pixels",
        unet=UNetConfig(
            in_channels=1, out_channels=1, model_channels=8, num_res_blocks=1, attention_resolutions=(),
            channel_mult=(1, 2), num_heads=1, num_groups=4,
        ),
        image_size=(8, 8),
        defaults={"steps": 3},
    )  # fmt: skip
    return StableDiffusion(config, networks(config))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents' commands read, as in a clone; the working folder."""
    shutil.copytree(Path(__file__).parent.parent / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where illustration sets would have been built, which takes minutes and the network."""
    built: list[Path] = []

    def instead(out: Path, **options: object) -> SimpleNamespace:
        built.append(out)
        return SimpleNamespace(root=str(out), pictures=0, rows={})

    monkeypatch.setattr("sfumato.data.illustrations.build", instead)
    return built

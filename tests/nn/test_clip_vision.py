"""The image transformer against transformers' CLIPVisionModelWithProjection and its preprocessing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig as ReferenceConfig
from transformers import CLIPVisionModelWithProjection

from sfumato.checkpoints.controls.adapters_layouts import vision_pairs
from sfumato.errors import InputError
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.runtime import shapes_only

TINY = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28,
    patch_size=7, projection_dim=12,
)  # fmt: skip


def reference(config: CLIPVisionConfig) -> ReferenceConfig:
    return ReferenceConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        image_size=config.image_size, patch_size=config.patch_size, hidden_act=config.hidden_act,
        projection_dim=config.projection_dim or 0,
    )  # fmt: skip


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_equal_to_transformers(act: str) -> None:
    config = replace(TINY, hidden_act=act)
    ours = CLIPVisionEncoder(config).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    theirs = CLIPVisionModelWithProjection(reference(config)).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found, expected = ours(pixels), theirs(pixels, output_hidden_states=True)
    assert len(found.hidden_states) == 4
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert (a - b).abs().max() <= 1e-5
    assert (found.embeds - expected.image_embeds).abs().max() <= 1e-5
    assert found.embeds.std() > 0.1


def test_the_released_towers_have_their_size() -> None:
    """OpenCLIP's ViT-H/14, of which h94/IP-Adapter holds the image tower: 632,076,800 with its projection."""
    with shapes_only():
        ours = CLIPVisionEncoder(CLIPVisionConfig())
    with torch.device("meta"):
        theirs = CLIPVisionModelWithProjection(reference(CLIPVisionConfig()))
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert shapes == {pair.native: pair.shape for pair in vision_pairs(CLIPVisionConfig())}
    assert sum(parameter.numel() for parameter in ours.parameters()) == 632_076_800


def test_pictures_of_other_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(b, 3, 28, 28\)"):
        CLIPVisionEncoder(TINY)(torch.zeros(1, 3, 28, 35))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"patch_size": 0}, "patch"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        replace(TINY, **options)  # type: ignore[arg-type]

"""The classifier of noised samples: names, shapes, pools."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.classifier import AttentionPool, Classifier, ClassifierConfig, MeanPool
from sfumato.nn.unet import UNet
from sfumato.nn.unet_config import UNetConfig

ENCODER: dict[str, Any] = {
    "in_channels": 3, "out_channels": 5, "model_channels": 8, "num_res_blocks": 1, "channel_mult": (1, 2),
    "attention_resolutions": (2,), "num_head_channels": 8, "num_groups": 4, "use_scale_shift_norm": True,
    "resblock_updown": True, "use_new_attention_order": True,
}  # fmt: skip
POOLS: dict[str, dict[str, Any]] = {"mean": {}, "attention": {"pool": "attention", "size": (8, 12)}}
T = torch.tensor([0.0, 900.5])


def made(encoder: dict[str, Any] | None = None, **options: Any) -> Classifier:
    """A classifier with values in every layer, those that start at zero too."""
    network = Classifier(ClassifierConfig(UNetConfig(**{**ENCODER, **(encoder or {})}), **options)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return network


def samples(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", POOLS.values(), ids=list(POOLS))
def test_logits_and_their_gradient(options: dict[str, Any]) -> None:
    network, x = made(**options), samples(2, 3, 8, 12).requires_grad_()
    logits = network(x, T)
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    (gradient,) = torch.autograd.grad(logits[0, 2], x)
    assert gradient[0].abs().min() > 0 and not gradient[1].any(), "an image depends on itself alone"
    assert not torch.allclose(logits, network(x, T.flip(0))), "it reads the timestep"
    for row in (0, 1):
        torch.testing.assert_close(network(x[row : row + 1], T[row : row + 1])[0], logits[row])


def test_the_encoder_is_the_unets() -> None:
    """The same names, and the same function of the same weights."""
    network, unet = made(), UNet(UNetConfig(**ENCODER)).eval()
    shared = {name: value for name, value in network.state_dict().items() if not name.startswith("out.")}
    own = unet.state_dict()
    assert shared.keys() == {name for name in own if not name.startswith(("output_blocks.", "out."))}
    unet.load_state_dict(own | shared)
    x, seen = samples(2, 3, 8, 12), []
    unet.middle_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    unet(x, T)
    last = network.out[3]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    normed = network.out[0](seen[0])
    expected = (normed * normed.sigmoid()).mean(dim=(2, 3)) @ last.weight[:, :, 0, 0].T + last.bias
    torch.testing.assert_close(network(x, T), expected)


def test_state_dict_names_are_the_original_codes() -> None:
    names = {pool: set(made(**options).state_dict()) for pool, options in POOLS.items()}
    heads = {pool: {name for name in each if name.startswith("out.")} for pool, each in names.items()}
    norm = {"out.0.weight", "out.0.bias"}
    assert heads["mean"] == norm | {"out.3.weight", "out.3.bias"}
    pool = ("positional_embedding", "qkv_proj.weight", "qkv_proj.bias", "c_proj.weight", "c_proj.bias")
    assert heads["attention"] == norm | {f"out.2.{name}" for name in pool}
    assert names["mean"] - heads["mean"] == names["attention"] - heads["attention"]


def test_attention_pool_is_multi_head_attention_of_the_mean() -> None:
    pool, h = AttentionPool(8, 6, 2, 3), samples(4, 8, 2, 3)
    tokens = h.flatten(2)
    tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) + pool.positional_embedding
    tokens = tokens.permute(2, 0, 1)  # (n, b, c)
    expected, _ = nn.functional.multi_head_attention_forward(
        tokens[:1], tokens, tokens, 8, 2, pool.qkv_proj.weight[:, :, 0], pool.qkv_proj.bias, None, None,
        False, 0.0, pool.c_proj.weight[:, :, 0] @ torch.eye(8), pool.c_proj.bias, need_weights=False,
    )  # fmt: skip
    torch.testing.assert_close(pool(h), expected[0])


@pytest.mark.parametrize(("dims", "shape"), [(1, (8,)), (2, (4, 8)), (3, (3, 4, 4))])
def test_samples_of_any_number_of_axes(dims: int, shape: tuple[int, ...]) -> None:
    x = samples(2, 3, *shape)
    assert made({"dims": dims})(x, T).shape == (2, 5)
    assert made({"dims": dims}, pool="attention", size=shape)(x, T).shape == (2, 5)
    assert MeanPool()(x).shape == (2, 3, *[1] * dims)
    torch.testing.assert_close(MeanPool()(x).flatten(1), x.flatten(2).mean(2))


def test_mean_pool_takes_any_size() -> None:
    network = made()
    assert network(samples(1, 3, 4, 4), T[:1]).shape == network(samples(1, 3, 16, 8), T[:1]).shape


def test_a_new_classifier_holds_every_class_equally_likely() -> None:
    logits = Classifier(ClassifierConfig(UNetConfig(**ENCODER)))(samples(2, 3, 8, 8), T)
    assert torch.equal(logits, torch.zeros(2, 5))


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "context": ({"context_dim": 8, "use_spatial_transformer": True}, {}, "context_dim=8"),
    "labels": ({"num_classes": 3}, {}, "num_classes=3"),
    "pool": ({}, {"pool": "max"}, "there is no pool 'max'"),
    "no size": ({}, {"pool": "attention"}, "size is None"),
    "one side": ({}, {"pool": "attention", "size": (8,)}, r"2 sides; size is \(8,\)"),
}


@pytest.mark.parametrize(("encoder", "options", "message"), WRONG.values(), ids=list(WRONG))
def test_contradictory_configs(encoder: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassifierConfig(UNetConfig(**{**ENCODER, **encoder}), **options)


def test_samples_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="must be a multiple of"):
        made()(samples(2, 3, 7, 8), T)
    with pytest.raises(InputError, match=re.escape("samples of size (8, 12); got (8, 8)")):
        made(**POOLS["attention"])(samples(2, 3, 8, 8), T)

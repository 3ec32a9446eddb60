"""Options of sampling, guidance and noise on their way from a request to the pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato import Request
from sfumato.checkpoints.classifier import ClassifierDescription, LoadedClassifier
from sfumato.diffusion.noise import ImageNoise, NoiseConfig
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError
from sfumato.generation import complete, generate, stream
from sfumato.model import StableDiffusion
from sfumato.nn.classifier import Classifier
from sfumato.nn.unet_config import UNetConfig

APPLE = Request(prompt="a red apple", negative_prompt="a fox", seed=0, steps=6, sampler="euler")


def latents(model: StableDiffusion, **changes: Any) -> Tensor:
    return generate(model, Request.model_validate({**APPLE.model_dump(), **changes})).latents


def calls(model: StableDiffusion, **changes: Any) -> list[int]:
    """The batch size of each pass of the U-Net."""
    sizes: list[int] = []
    hook = model.unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    latents(model, **changes)
    hook.remove()
    return sizes


# Sampling


def test_community_names_say_sampler_spacing_and_options(tiny_model: StableDiffusion) -> None:
    asked = complete(tiny_model, Request(sampler="DPM++ 2M SDE Exponential"))
    assert (asked.sampler, asked.spacing) == ("dpmpp_2m_sde", "exponential")
    assert Request(sampler="k_dpmpp_2m_ka").spacing == "karras"
    assert Request(sampler="DPM++ 2M Karras", spacing="beta").spacing == "beta"
    assert Request(sampler="uni_pc_bh1", sampler_options={"order": 3}).sampler_options == {
        "variant": "bh1",
        "order": 3,
    }
    assert Request(sampler="dpmpp_2s").eta == 0


def test_options_reach_sampler_and_spacing(tiny_model: StableDiffusion) -> None:
    plain = latents(tiny_model)
    assert not torch.allclose(latents(tiny_model, sampler_options="s_churn=3"), plain, atol=1e-3)
    assert torch.allclose(latents(tiny_model, sampler_options="s_churn=3 s_tmax=0"), plain)
    with pytest.raises(InputError, match="no option 's_chrn'"):
        latents(tiny_model, sampler_options="s_chrn=3")
    levels = [
        step.sigma
        for step in stream(tiny_model, Request(steps=3, spacing="karras", spacing_options={"sigma_max": 9}))
    ]
    assert levels[0] == pytest.approx(9)
    with pytest.raises(InputError, match="no option 'roh'"):
        latents(tiny_model, spacing="karras", spacing_options="roh=3")


def test_noise_levels_of_ones_own(tiny_model: StableDiffusion) -> None:
    steps = list(stream(tiny_model, Request(prompt="x", sampler="euler", sigmas=(14, 3, 0.5, 0))))
    assert [(step.sigma, step.target) for step in steps] == [(14, 3), (3, 0.5), (0.5, 0)]
    assert complete(tiny_model, Request(sigmas=(14, 3, 0))).steps == 2
    with pytest.raises(InputError, match="descend"):
        generate(tiny_model, Request(sigmas=(1, 3, 0)))


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.noise == "brownian"])
def test_brownian_noise_belongs_to_the_picture(tiny_model: StableDiffusion, name: str) -> None:
    """The same alone and in a batch: the third picture of seed 0 is the first of seed 2."""
    options = {"sampler": name, "eta": 1.0, "deterministic": True}
    batch = latents(tiny_model, num_images=3, **options)
    assert torch.equal(batch[2:], latents(tiny_model, seed=2, **options))
    assert not torch.allclose(latents(tiny_model, seed=2, eta_seed_delta=7, **options), batch[2:], atol=1e-2)


# Guidance


@pytest.mark.parametrize(
    "method",
    [
        {"rescale": 0.7},
        {"dynamic_threshold": 0.9, "threshold_limit": 0.5},
        {"mimic": 1.5},
        {"apg": True},
        {"perp_neg": 1.0},
        {"pag": 3.0},
        {"seg": 3.0},
        {"sag": 0.75},
        {"freeu": "1.5,1.6,0.9,0.2"},
        {"guidance_start": 0.5},
        {"guidance_low": 1.0},
    ],
    ids=str,
)
def test_each_method_changes_the_picture_alike_in_any_batch(
    tiny_model: StableDiffusion, method: dict[str, Any]
) -> None:
    options = {"guidance": 5.0, "num_images": 2, **method}
    changed = latents(tiny_model, **options)
    assert (changed - latents(tiny_model, guidance=5.0, num_images=2)).abs().max() > 1e-3
    assert torch.allclose(
        changed[1:], latents(tiny_model, **{**options, "num_images": 1, "seed": 1}), rtol=1e-4, atol=1e-3
    )
    alone = latents(tiny_model, **{**options, "num_images": 1, "seed": 1, "deterministic": True})
    assert torch.equal(latents(tiny_model, **options, deterministic=True)[1:], alone)


def test_passes_of_the_network(tiny_model: StableDiffusion) -> None:
    assert calls(tiny_model, guidance=5.0) == [2] * 6
    assert calls(tiny_model, guidance=5.0, guidance_start=0.5) == [1] * 3 + [2] * 3
    assert calls(tiny_model, guidance=5.0, guidance_stop=0.5) == [2] * 3 + [1] * 3
    assert calls(tiny_model, guidance=5.0, guidance_high=3.0) == [1, 1, 2, 2, 2, 2]
    assert calls(tiny_model, guidance=1.0) == [1] * 6
    assert calls(tiny_model, guidance=5.0, perp_neg=1.0) == [3] * 6
    assert calls(tiny_model, guidance=5.0, pag=3.0) == [2, 1] * 6
    assert calls(tiny_model, guidance=5.0, sag=0.75) == [1, 1, 1] * 6


def test_a_weaker_model_guides(tiny_model: StableDiffusion, pixel_model: StableDiffusion) -> None:
    plain = latents(tiny_model, guidance=1.0)
    same = latents(tiny_model, guidance=1.0, weak_model=tiny_model)
    assert torch.allclose(plain, same, atol=1e-4), "the model is no weaker than itself"
    with pytest.raises(InputError, match="1 latent channels, 'tiny' has 2"):
        latents(tiny_model, weak_model=pixel_model)


def classifier() -> LoadedClassifier:
    config = UNetConfig(
        in_channels=2, out_channels=2, model_channels=8, num_res_blocks=1, channel_mult=(1, 2),
        attention_resolutions=(), num_heads=1, num_groups=4, context_dim=None, use_spatial_transformer=False,
    )  # fmt: skip
    description = ClassifierDescription("fruit", ("apple", "pear"), config)
    torch.manual_seed(0)
    network = Classifier(description.network).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.3)
    return LoadedClassifier(description, network)


@pytest.mark.parametrize("form", ["eps", "mean"])
def test_a_classifier_steers_to_its_classes(tiny_model: StableDiffusion, form: str) -> None:
    given = classifier()
    options = {"classifier": given, "classifier_form": form, "classifier_scale": 30.0, "sampler": "ddpm"}
    found = {name: latents(tiny_model, classifier_label=name, **options) for name in ("apple", "pear")}
    logits = {name: given.network(value, torch.zeros(1))[0] for name, value in found.items()}
    assert logits["apple"][0] - logits["apple"][1] > logits["pear"][0] - logits["pear"][1]
    assert torch.equal(found["pear"], latents(tiny_model, classifier_label="1", **options))
    with pytest.raises(InputError, match="no class 'aple'"):
        latents(tiny_model, classifier_label="aple", **options)
    with pytest.raises(InputError, match="the class is 2; 'fruit' has 0 to 1"):
        latents(tiny_model, classifier_label="2", **options)


# Noise


def test_where_the_noise_comes_from(tiny_model: StableDiffusion) -> None:
    plain = latents(tiny_model)
    assert not torch.allclose(latents(tiny_model, noise_source="philox"), plain, atol=1e-2)
    assert torch.allclose(latents(tiny_model, variation_seed=5, variation_strength=0.0), plain)
    whole = latents(tiny_model, variation_seed=5, variation_strength=1.0)
    assert torch.allclose(whole, latents(tiny_model, seed=5), atol=1e-4)
    with pytest.raises(InputError, match="no variation_seed"):
        latents(tiny_model, variation_strength=0.5)
    ancestral = latents(tiny_model, sampler="euler_a")
    assert not torch.allclose(
        latents(tiny_model, sampler="euler_a", eta_seed_delta=31337), ancestral, atol=1e-2
    )
    assert torch.allclose(latents(tiny_model, eta_seed_delta=31337), plain), "no later noise, no change"


def test_a_seed_of_another_size(tiny_model: StableDiffusion) -> None:
    small = ImageNoise([0], (2, 8, 8), device=torch.device("cpu")).initial()
    config = NoiseConfig(seed_resize=(8, 8))
    wide = ImageNoise([0], (2, 8, 16), device=torch.device("cpu"), config=config).initial()
    assert torch.equal(wide[..., 4:12], small)
    asked: dict[str, Any] = {"width": 32, "height": 16, "seed_resize_width": 16}
    plan = next(iter(stream(tiny_model, Request(prompt="x", seed=0, steps=1, sampler="euler", **asked))))
    given = generate(
        tiny_model, Request(prompt="x", seed=0, steps=1, sampler="euler", width=32, start_noise=wide)
    )
    assert torch.allclose(given.latents, plan.x / math.sqrt(1 + plan.target**2), atol=1e-4)


def test_a_recipe_names_what_was_given(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    asked = APPLE.model_copy(update={"weak_model": tiny_model, "sampler_options": {"s_churn": 1.0}})
    values = generate(tiny_model, asked).parameters[0]
    assert values["sampler_options"] == {"s_churn": 1.0} and values["weak_model"] == "tiny"

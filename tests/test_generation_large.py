"""Windows, regions, seamless edges, tiles, deep shrink and the second pass, as requests ask for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import Request
from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.generation import complete, generate, stream
from sfumato.generation.large import region_masks
from sfumato.generation.stages import continued, plan
from sfumato.model import StableDiffusion
from sfumato.nn.unet import UNet

STEPS: dict[str, Any] = {"prompt": "a red apple", "steps": 3, "seed": 1, "sampler": "euler"}


def drawn(model: StableDiffusion, **fields: Any) -> torch.Tensor:
    return generate(model, Request(**{**STEPS, **fields})).samples


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


# Tiles and edges


@pytest.mark.parametrize("init", [False, True])
def test_the_autoencoder_in_bands_draws_the_same(tiny_model: StableDiffusion, init: bool) -> None:
    more: dict[str, Any] = {"width": 32, "height": 24}
    if init:
        more |= {"init": Image.effect_noise((32, 24), 60), "strength": 0.5}
    whole, exact = drawn(tiny_model, **more), drawn(tiny_model, tiled="exact", **more)
    assert 0 < difference(whole, exact) < 1e-4
    assert difference(whole, drawn(tiny_model, tiled="fast", **more)) < 1e-4  # smaller than a tile


@pytest.mark.parametrize(("sides", "axes"), [("x", (3,)), ("y", (2,)), ("xy", (2, 3))])
@pytest.mark.parametrize("tiled", ["none", "exact"])
def test_a_seamless_picture_has_no_place_where_it_begins(
    tiny_model: StableDiffusion, sides: str, axes: tuple[int, ...], tiled: str
) -> None:
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    shifts = [2] * len(axes)  # latents: one place of the U-Net's coarsest map
    asked: dict[str, Any] = {"guidance": 1, "tiled": tiled}
    one = drawn(tiny_model, start_noise=noise, seamless=sides, **asked)
    two = drawn(tiny_model, start_noise=noise.roll(shifts, axes), seamless=sides, **asked)
    assert difference(one.roll([4] * len(axes), axes), two) < 1e-4
    plain = [drawn(tiny_model, start_noise=each, **asked) for each in (noise, noise.roll(shifts, axes))]
    assert difference(plain[0].roll([4] * len(axes), axes), plain[1]) > 1e-2  # edges are felt


def test_edges_are_as_they_were_after_a_run_that_was_given_up(tiny_model: StableDiffusion) -> None:
    before = drawn(tiny_model)
    steps = stream(tiny_model, Request(**STEPS, seamless="xy"))
    next(steps)
    del steps  # given up: the generator ends
    assert torch.equal(drawn(tiny_model), before)


# Windows and regions


def test_one_window_is_the_whole(tiny_model: StableDiffusion) -> None:
    assert torch.equal(drawn(tiny_model), drawn(tiny_model, window=16))
    wide = drawn(tiny_model, width=32)
    assert torch.equal(wide, drawn(tiny_model, width=32, window=64))
    assert difference(wide, drawn(tiny_model, width=32, window=16)) > 1e-3


def test_windows_without_overlap_know_nothing_of_each_other(tiny_model: StableDiffusion) -> None:
    noise = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(3))
    asked: dict[str, Any] = {"width": 32, "window": 16, "window_overlap": 0, "window_weights": "uniform"}
    changed = noise.clone()
    changed[..., 8:] += 1
    one, two = (
        generate(tiny_model, Request(**STEPS, **asked, start_noise=each)) for each in (noise, changed)
    )
    assert torch.equal(one.latents[..., :8], two.latents[..., :8])
    assert difference(one.latents[..., 8:], two.latents[..., 8:]) > 0.1
    alone = generate(tiny_model, Request(**STEPS, start_noise=noise[..., :8].contiguous()))
    assert difference(one.latents[..., :8], alone.latents) < 1e-5


def test_windows_are_no_smaller_than_the_network_can_draw(tiny_model: StableDiffusion) -> None:
    assert tiny_model.config.unet is not None
    config = replace(tiny_model.config.unet, channel_mult=(1, 1, 1, 1))  # 16 pixels at its coarsest
    parts = {name: tiny_model.part(name) for name in ("autoencoder", "text")}
    modules = {name: part for name, part in parts.items() if part is not None}
    deep = StableDiffusion(replace(tiny_model.config, unet=config), {**modules, "unet": UNet(config).eval()})
    with pytest.raises(InputError, match="windows have 8 pixels"):
        drawn(deep, window=8)


def test_a_region_over_all_is_its_own_prompt(tiny_model: StableDiffusion) -> None:
    other = drawn(tiny_model, prompt="a blue apple")
    assert torch.equal(other, drawn(tiny_model, regions="0,0,16,16: a blue apple", region_base=0))
    mixed = drawn(tiny_model, regions="0,0,16,16: a blue apple", region_base=0.5)
    assert difference(mixed, other) > 1e-4 and difference(mixed, drawn(tiny_model)) > 1e-4


def test_the_first_step_of_regions_is_each_ones_own(tiny_model: StableDiffusion) -> None:
    asked: dict[str, Any] = {"steps": 1, "width": 32}
    both = generate(
        tiny_model, Request(**{**STEPS, **asked}, regions=("16,0,16,16: a blue apple",), region_base=0)
    ).latents
    red, blue = (
        generate(tiny_model, Request(**{**STEPS, **asked, "prompt": f"a {colour} apple"})).latents
        for colour in ("red", "blue")
    )
    assert difference(both[..., :8], red[..., :8]) < 1e-5 < difference(red, blue)
    assert difference(both[..., 8:], blue[..., 8:]) < 1e-5


def test_masks_of_regions(tiny_model: StableDiffusion) -> None:
    mask = Image.new("L", (32, 16), 0)
    mask.paste(255, (16, 0, 32, 16))
    by_mask = Request(**STEPS, width=32, regions=("mask: a blue apple",), region_masks=mask)
    by_box = Request(**STEPS, width=32, regions=("16,0,16,16: a blue apple",))
    assert torch.equal(generate(tiny_model, by_mask).samples, generate(tiny_model, by_box).samples)
    request = complete(tiny_model, by_box.model_copy(update={"region_feather": 4}))
    (soft,) = region_masks(request, (8, 16), 2)
    assert soft[0].tolist() == pytest.approx([0] * 6 + [1 / 3, 2 / 3] + [1] * 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regions": "0,0,4: a"}, "cannot be read"),
        ({"regions": "0,0,4,0: a"}, "no box"),
        ({"regions": "0,0,4,4"}, "no box"),
        ({"regions": "8,8,16,16: a"}, "is not in the picture"),
        ({"regions": "mask: a"}, "1 regions are called mask, and 0 masks"),
        ({"region_masks": Image.new("L", (4, 4))}, "0 regions"),
        ({"hires": 2, "hires_upscaler": "lanzos"}, "lanzos"),
        ({"hires": 2, "init": Image.new("RGB", (16, 16)), "hires_upscaler": "latent"}, "no latents"),
        ({"hires": 2, "init": Image.new("RGB", (16, 16)), "loopback": 2}, "loopback"),
        ({"deep_shrink": 2, "deep_shrink_block": 50}, "no block 50"),
    ],
)
def test_what_does_not_fit(tiny_model: StableDiffusion, fields: dict[str, Any], words: str) -> None:
    with pytest.raises((InputError, ValueError), match=words):
        drawn(tiny_model, **fields)


# Deep shrink


def test_deep_shrink_counts_in_its_steps_alone(tiny_model: StableDiffusion) -> None:
    plain = drawn(tiny_model, width=32)
    small = {"deep_shrink": 2, "deep_shrink_block": 1, "width": 32}
    assert difference(plain, drawn(tiny_model, **small)) > 1e-4
    assert torch.equal(plain, drawn(tiny_model, **small, deep_shrink_end=0.2))  # no whole step
    assert difference(drawn(tiny_model, **{**small, "deep_shrink": 1}), plain) < 1e-6


# The second pass


def test_a_second_pass_of_no_strength_enlarges(tiny_model: StableDiffusion) -> None:
    first = generate(tiny_model, Request(**STEPS))
    result = generate(tiny_model, Request(**STEPS, hires=2, hires_strength=0))
    larger = first.images[0].resize((32, 32), Image.Resampling.LANCZOS)
    trip = generate(tiny_model, Request(init=larger, strength=0, seed=0)).images[0]
    assert result.images[0].tobytes() == trip.tobytes()
    assert (result.parameters[0]["hires"], result.parameters[0]["width"]) == (2, 16)


def test_the_second_pass_has_its_own_fields(tiny_model: StableDiffusion) -> None:
    asked = Request(
        **STEPS, hires=1.6, hires_steps=5, hires_sampler="heun", hires_prompt="a blue apple",
        hires_negative_prompt="a fox", hires_strength=0.4, regions=("0,0,8,16: a fox",), region_feather=4,
    )  # fmt: skip
    first, second = plan(complete(tiny_model, asked), 4)
    assert (first.hires, first.width, first.sampler) == (None, 16, "euler")
    assert (second.width, second.height, second.steps, second.steps_mode) == (24, 24, 5, "exact")
    assert (second.sampler, second.prompt, second.negative_prompt) == ("heun", "a blue apple", "a fox")
    assert (second.strength, second.regions, second.region_feather) == (0.4, ("0,0,12,24: a fox",), 6)
    result = generate(tiny_model, asked)
    by_hand = generate(tiny_model, first)
    last = generate(tiny_model, continued(second, by_hand.images, by_hand.latents))
    assert result.images[0].size == (24, 24) and result.images[0].tobytes() == last.images[0].tobytes()


@pytest.mark.parametrize("mode", ["latent", "latent-nearest-exact", "latent-bicubic-antialiased"])
def test_latents_are_handed_on_as_they_are(tiny_model: StableDiffusion, mode: str) -> None:
    asked: dict[str, Any] = {"hires": 2, "hires_upscaler": mode}
    nothing = generate(tiny_model, Request(**STEPS, **asked, hires_strength=0))
    first = generate(tiny_model, Request(**STEPS)).latents
    assert nothing.latents.shape == (1, 2, 16, 16)
    if mode == "latent-nearest-exact":
        assert torch.equal(nothing.latents[..., ::2, ::2], first)
    again = generate(tiny_model, Request(**STEPS, **asked, num_images=2, deterministic=True))
    alone = generate(tiny_model, Request(**STEPS, **asked, deterministic=True))
    assert again.images[0].tobytes() == alone.images[0].tobytes()


def test_a_given_picture_is_enlarged_in_windows(tiny_model: StableDiffusion) -> None:
    given = Image.effect_noise((16, 16), 60).convert("RGB")
    asked: dict[str, Any] = {"init": given, "hires": 3, "window": 16, "tiled": "exact", "hires_strength": 0.5}
    result = generate(tiny_model, Request(**STEPS, **asked))
    assert result.images[0].size == (48, 48)
    values = result.parameters[0]
    assert values["init_sha256"] and values["hires"] == 3 and values["steps_run"] == 1


def test_all_of_it_on_the_command_line_and_again(tiny_model_file: Path, tmp_path: Path, capsys: Any) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (16, 16), 255).save(mask)
    asked = [
        "generate", "a red apple", "--model", str(tiny_model_file), "--steps", "2", "--seed", "1",
        "--hires", "2",
        "--regions", "0,0,8,16: a blue apple", "--regions", "mask: a fox", "--region-masks", str(mask),
        "--window", "16", "--seamless", "x", "--tiled", "exact", "--deep-shrink", "2", "--deep-shrink-block",
        "1", "-o", str(tmp_path / "one.png"),
    ]  # fmt: skip
    assert main(asked) == 0
    image = Image.open(tmp_path / "one.png")
    assert image.size == (32, 32)
    capsys.readouterr()
    replay = ["replay", str(tmp_path / "one.png"), "--check", "--model", str(tiny_model_file)]
    assert main(replay) == 2 and "--region-masks" in capsys.readouterr().err
    assert main([*replay, "--region-masks", str(mask)]) == 0
    assert capsys.readouterr().out == "equal\n"
    assert np.asarray(image).std() > 0

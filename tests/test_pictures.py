"""Image-to-image and inpainting: strength, masks, regions, what stays byte for byte, recipes, errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import Request
from sfumato.errors import InputError
from sfumato.generation import Notes, complete, finish, generate, stream
from sfumato.generation.canvas import grown, resized_mask
from sfumato.generation.levels import levels
from sfumato.generation.pictures import filled
from sfumato.generation.seam import feathered, matched_at_seam, matched_colours
from sfumato.images import to_tensor
from sfumato.model import StableDiffusion
from sfumato.nn.unet import UNet

STEPS: dict[str, Any] = {"steps": 4, "seed": 1, "guidance": 1}


def picture(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(value, box)
    return mask


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# Strength and steps


def run_steps(model: StableDiffusion, **fields: Any) -> int:
    notes = Notes()
    request = complete(model, Request(init=picture(), seed=0, guidance=1, **fields))
    taken = len(list(stream(model, request, notes)))
    assert notes.steps is not None and taken == max(1, notes.steps)  # where there is none, its start is given
    return notes.steps


@pytest.mark.parametrize(
    ("steps", "strength", "mode", "run"),
    [(25, 0.75, "strength", 18), (100, 0.29, "strength", 29), (10, 1.0, "strength", 10),
     (25, 0.75, "exact", 25), (4, 0.01, "exact", 4), (25, 0.0, "strength", 0), (25, 0.0, "exact", 0)],
)  # fmt: skip
def test_steps_of_a_strength(
    tiny_model: StableDiffusion, steps: int, strength: float, mode: Any, run: int
) -> None:
    asked = Request(init=picture(), steps=steps, strength=strength, steps_mode=mode, sampler="euler")
    plan = levels(tiny_model, complete(tiny_model, asked))
    assert len(plan.sigmas) == run + 1
    if 0 < strength < 1:
        assert plan.start_scale == plan.sigmas[0] < tiny_model.schedule.sigma_max


def test_both_rules_start_at_the_same_noise(tiny_model: StableDiffusion) -> None:
    asked = Request(init=picture(), steps=10, strength=0.5, sampler="euler", spacing="uniform")
    plans = [
        levels(tiny_model, complete(tiny_model, asked.model_copy(update=changes)))
        for changes in ({}, {"steps": 5, "steps_mode": "exact"}, {"steps": 20})
    ]
    assert plans[0] == plans[1] and len(plans[2].sigmas) == 11
    assert plans[2].sigmas[0] == pytest.approx(plans[0].sigmas[0], rel=0.15)


def test_the_real_number_of_steps_is_told(tiny_model: StableDiffusion) -> None:
    assert run_steps(tiny_model, steps=8, strength=0.5) == 4
    assert run_steps(tiny_model, steps=8, strength=0) == 0
    result = generate(tiny_model, Request(init=picture(), strength=0.1, **STEPS))
    assert result.parameters[0]["steps_run"] == 0 and "is none: nothing is drawn" in result.warnings[0]
    with pytest.raises(InputError, match="are the end of 4000 steps"):
        generate(
            tiny_model,
            Request(init=picture(), strength=0.001, steps_mode="exact", spacing="trailing", **STEPS),
        )


def test_own_sigmas_are_cut_or_taken_whole(tiny_model: StableDiffusion) -> None:
    asked = Request(init=picture(), sigmas=(4, 3, 2, 1, 0), strength=0.5)
    assert levels(tiny_model, complete(tiny_model, asked)).sigmas == [2, 1, 0]
    exact = complete(tiny_model, asked.model_copy(update={"steps_mode": "exact"}))
    assert levels(tiny_model, exact).sigmas == [4, 3, 2, 1, 0] and levels(tiny_model, exact).start_scale == 4


def test_strength_0_is_the_picture_up_to_the_autoencoder(tiny_model: StableDiffusion) -> None:
    result = generate(tiny_model, Request(init=picture(), strength=0, **STEPS))
    expected = tiny_model.decode_latents(tiny_model.encode_image(to_tensor([picture()])))
    torch.testing.assert_close(result.samples, expected)


def test_strength_1_ignores_the_picture(tiny_model: StableDiffusion) -> None:
    drawn = [
        generate(tiny_model, Request(init=init, strength=1, **STEPS)).latents
        for init in (picture(), picture(seed=9))
    ]
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0], generate(tiny_model, Request(**STEPS)).latents)


def test_one_picture_for_each(tiny_model: StableDiffusion) -> None:
    inits = [picture(seed=1), picture(seed=2)]
    both = generate(tiny_model, Request(init=inits, num_images=2, strength=0.5, **STEPS))
    for index, init in enumerate(inits):
        alone = Request(init=init, strength=0.5, **{**STEPS, "seed": 1 + index})
        torch.testing.assert_close(both.latents[index], generate(tiny_model, alone).latents[0])


# Sizes


@pytest.mark.parametrize(
    ("size", "drawn"), [((18, 13), (16, 12)), ((32, 16), (32, 16)), ((160, 80), (24, 12)), ((3, 3), (16, 16))]
)
def test_the_drawing_has_the_pictures_shape(
    tiny_model: StableDiffusion, size: tuple[int, int], drawn: tuple[int, int]
) -> None:
    request = complete(tiny_model, Request(init=picture(size)))
    assert (request.width, request.height) == drawn
    assert complete(tiny_model, Request(init=picture((20, 10)), width=40)).height == 20


@pytest.mark.parametrize("how", ["stretch", "crop", "pad", "latent"])
def test_resizing(tiny_model: StableDiffusion, how: Any) -> None:
    wide = Image.new("RGB", (32, 16), "white")
    wide.paste("black", (8, 0, 24, 16))
    begin = Notes()
    request = complete(tiny_model, Request(init=wide, width=16, height=16, resize=how, **STEPS))
    list(stream(tiny_model, request, begin))
    assert begin.start is not None
    (shown,) = begin.start.canvas.whole  # type: ignore[attr-defined]
    middle = array(shown)[8, :, 0]
    if how == "crop":
        assert middle.max() == 0
    else:
        assert middle[[0, 15]].min() > 200 and middle[8] == 0
    if how == "pad":
        assert np.array_equal(array(shown)[0], array(shown)[4])  # its first row goes on to the edge


# Masks


def test_what_is_outside_the_mask_stays_byte_for_byte(tiny_model: StableDiffusion) -> None:
    chance = random.Random(0)
    for index in range(12):
        size = (chance.choice([16, 20]), chance.choice([16, 24]))
        mask = Image.new("L", size, 0)
        for _ in range(chance.randint(1, 3)):
            left, top = chance.randrange(size[0]), chance.randrange(size[1])
            right, bottom = left + chance.randint(1, 9), top + chance.randint(1, 9)
            mask.paste(255, (left, top, right, bottom))
        init = picture(size, index)
        fields: dict[str, Any] = {"only_masked": True} if index % 3 == 2 else {}
        result = generate(tiny_model, Request(init=init, mask=mask, strength=0.8, **fields, **STEPS))
        outside = np.asarray(mask) == 0
        assert result.images[0].size == size
        assert np.array_equal(array(result.images[0])[outside], array(init)[outside])
        assert not np.array_equal(array(result.images[0]), array(init))


def drawn_share(model: StableDiffusion, **fields: Any) -> np.ndarray:
    """Which pixels are other ones."""
    result = generate(model, Request(init=fields.pop("init", picture()), strength=1, **fields, **STEPS))
    return (array(result.images[0]) != array(picture())).any(axis=-1)


def test_masks_are_turned_blurred_and_taken_from_alpha(tiny_model: StableDiffusion) -> None:
    mask = box_mask((16, 16), (0, 0, 8, 16))
    plain = drawn_share(tiny_model, mask=mask)
    assert plain[:, :8].mean() > 0.9 and not plain[:, 8:].any()
    turned = drawn_share(tiny_model, mask=mask, mask_invert=True)
    assert turned[:, 8:].mean() > 0.9 and not turned[:, :8].any()
    blurred = drawn_share(tiny_model, mask=mask, mask_blur=1.0)
    assert blurred[:, 8:10].any() and not blurred[:, 13:].any()
    clear = picture().convert("RGBA")
    clear.putalpha(Image.eval(mask, lambda value: 255 - value))
    assert not drawn_share(tiny_model, init=clear, mask_alpha=True)[:, 8:].any()


def test_masked_content(tiny_model: StableDiffusion) -> None:
    mask = box_mask((16, 16), (4, 4, 12, 12))
    latents = {}
    for content in ("original", "fill", "noise", "nothing"):
        notes = Notes()
        request = Request(init=picture(), mask=mask, mask_content=content, strength=0.5, **STEPS)
        list(stream(tiny_model, complete(tiny_model, request), notes))
        assert notes.start is not None
        latents[content] = notes.start.x(torch.ones(1, 2, 8, 8)) - notes.start.plan.start_scale
    inside = (..., slice(3, 5), slice(3, 5))
    assert latents["noise"][inside].allclose(torch.ones(1), atol=1e-4)
    assert latents["nothing"][inside].allclose(torch.zeros(1), atol=1e-4)
    assert not torch.allclose(latents["original"][inside], latents["fill"][inside], atol=1e-3)
    outside = (..., slice(0, 2), slice(0, 8))
    torch.testing.assert_close(latents["original"][outside], latents["noise"][outside])


def test_filling_goes_on_in_the_colours_around() -> None:
    pictures = torch.zeros(1, 1, 16, 16)
    pictures[..., 8:] = 1.0
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:13, 6:10] = 1
    full = filled(pictures, mask)
    assert torch.equal(full[..., :6], pictures[..., :6]) and full.min() >= 0 and full.max() <= 1
    assert full[..., 8, 6].item() < 0.5 < full[..., 8, 9].item()
    assert torch.equal(filled(pictures, torch.ones_like(mask)), torch.zeros_like(pictures))


def test_a_mask_comes_to_latents_with_every_pixel() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5, 5] = 1
    assert resized_mask(mask, (8, 8)).sum() == 1 and resized_mask(mask, (5, 3)).sum() >= 1
    assert resized_mask(mask, (32, 32)).sum() == 4


def test_only_the_masked_part_is_drawn_at_full_size(tiny_model: StableDiffusion) -> None:
    init, mask = picture((100, 60)), box_mask((100, 60), (70, 20, 74, 24))
    notes = Notes()
    request = complete(
        tiny_model, Request(init=init, mask=mask, only_masked=True, only_masked_padding=6, **STEPS)
    )
    assert (request.width, request.height) == (16, 16)
    *_, last = stream(tiny_model, request, notes)
    assert notes.start is not None
    assert notes.start.canvas.box == (64, 14, 80, 30)  # type: ignore[attr-defined]
    result = finish(tiny_model, request, last, notes, 0.0)
    assert result.images[0].size == (100, 60) and result.samples.shape == (1, 3, 16, 16)
    region = Request(init=init, region=(10, 10, 20, 30), strength=1, **STEPS)
    changed = (array(generate(tiny_model, region).images[0]) != array(init)).any(axis=-1)
    assert changed[10:40, 10:30].mean() > 0.9 and changed.sum() == changed[10:40, 10:30].sum()


def test_a_box_grows_to_a_shape_within_the_picture() -> None:
    assert grown((0, 0, 4, 10), (100, 100), (16, 16)) == (0, 0, 10, 10)
    assert grown((95, 50, 99, 60), (100, 100), (2, 1)) == (80, 50, 100, 60)
    assert grown((0, 0, 30, 10), (30, 20), (1, 1)) == (0, 0, 30, 20)


def test_a_soft_mask_changes_the_white_most(tiny_model: StableDiffusion) -> None:
    grey = Image.fromarray(np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1)))
    request = Request(init=picture(), mask=grey, soft_mask=True, strength=1, **{**STEPS, "steps": 8})
    latents = generate(tiny_model, request).latents
    known = tiny_model.encode_image(to_tensor([picture()]))
    change = (latents - known).abs().mean(dim=(0, 1, 2))
    assert change[-1] > 2 * change[1] and change[0] < change[-2]


# Seams and colours


def test_a_seam_rises_inside_the_mask() -> None:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., :, 4:] = 1
    weights = feathered(mask, 3)[0, 0, 6]
    assert weights.tolist() == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert torch.equal(feathered(mask, 0), mask)
    line = torch.zeros(1, 1, 12, 12)
    line[..., 5] = 1
    assert torch.equal(feathered(line, 3), line)  # too thin for a seam


def test_tones_are_matched_at_the_seam() -> None:
    old = picture((32, 32))
    darker = Image.eval(old, lambda value: int(value * 0.8))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 10:22, 10:22] = 1
    matched = array(matched_at_seam(darker, old, mask, 6))
    edge = (slice(10, 22), 10)
    assert (
        np.abs(matched[edge] - array(old)[edge]).mean()
        < 12
        < np.abs(array(darker)[edge] - array(old)[edge]).mean()
    )
    everything = torch.ones(1, 1, 32, 32)
    assert matched_at_seam(darker, old, everything, 6) is darker


@pytest.mark.parametrize("how", ["covariance", "histogram"])
def test_colours_are_matched(how: str) -> None:
    old = Image.fromarray(
        (np.random.default_rng(1).normal(130, 25, (40, 40, 3))).clip(0, 255).astype(np.uint8)
    )
    new = Image.fromarray(
        (np.random.default_rng(2).normal(90, 12, (40, 40, 3))).clip(0, 255).astype(np.uint8)
    )
    matched = array(matched_colours(new, old, how)).reshape(-1, 3)
    wanted = array(old).reshape(-1, 3)
    assert np.abs(matched.mean(axis=0) - wanted.mean(axis=0)).max() < 1.5
    assert np.abs(matched.std(axis=0) - wanted.std(axis=0)).max() < 2
    flat = Image.new("RGB", (4, 4), (9, 9, 9))
    assert np.abs(array(matched_colours(flat, old, how)).mean() - wanted.mean()) < 6


def test_colours_of_a_drawing(tiny_model: StableDiffusion) -> None:
    init = Image.new("RGB", (16, 16), (200, 40, 90))
    request = Request(init=init, strength=1, match_colours="covariance", **STEPS)
    assert np.abs(array(generate(tiny_model, request).images[0]).mean(axis=(0, 1)) - [200, 40, 90]).max() < 2


# Models that are shown the picture


@pytest.fixture
def shown(tiny_model: StableDiffusion) -> Callable[[int], StableDiffusion]:
    def make(channels: int) -> StableDiffusion:
        config = tiny_model.config
        assert config.unet is not None
        config = replace(config, unet=replace(config.unet, in_channels=channels))
        assert config.unet is not None
        generator, unet = torch.Generator().manual_seed(4), UNet(config.unet).eval().requires_grad_(False)
        for parameter in unet.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        parts = {
            name: part for name in ("autoencoder", "text") if (part := tiny_model.part(name)) is not None
        }
        return StableDiffusion(config, {**parts, "unet": unet})

    return make


def test_models_for_inpainting_and_editing(shown: Callable[[int], StableDiffusion]) -> None:
    inpaints, edits = shown(5), shown(4)
    request = complete(inpaints, Request(prompt="a", init=picture(), **STEPS))
    assert (request.strength, request.image_guidance) == (1, None)
    request = complete(edits, Request(prompt="a", init=picture(), **{**STEPS, "guidance": 3}))
    assert (request.strength, request.image_guidance) == (1, 1.5)
    for model in (inpaints, edits):
        one, other = (
            generate(model, Request(prompt="a", init=picture(seed=seed), **{**STEPS, "guidance": 3})).latents
            for seed in (1, 2)
        )
        assert torch.equal(one, other) == (model is inpaints)  # which is shown nothing without a mask
    with pytest.raises(InputError, match="guidance of their own"):
        generate(edits, Request(prompt="a AND b", init=picture(), **STEPS))


# Recipes and errors


def test_recipes_tell_the_picture_and_not_its_path(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    picture().save(path)
    mask = box_mask((16, 16), (4, 4, 12, 12))
    values = generate(tiny_model, Request(init=path, mask=mask, strength=0.5, **STEPS)).parameters[0]
    assert values["steps_run"] == 2 and values["strength"] == 0.5 and "init" not in values
    assert len(values["init_sha256"]) == len(values["mask_sha256"]) == 64 and "secret" not in str(values)
    other = generate(tiny_model, Request(init=picture(), mask=mask, strength=0.5, **STEPS)).parameters[0]
    assert other == values
    assert not {"init_sha256", "steps_run", "mask_blur"} & set(
        generate(tiny_model, Request(**STEPS)).parameters[0]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": None, "mask": box_mask((4, 4), (0, 0, 1, 1))}, "mask is given, and there is no picture"),
        ({"init": None, "strength": 0.5}, "strength is 0.5, and there is no picture"),
        ({"init": None, "loopback": 3}, "loopback is 3"),
        ({"only_masked": True}, "there is no mask"),
        ({"only_masked": True, "mask": Image.new("L", (16, 16))}, "the mask is empty"),
        ({"region": (0, 0, 17, 4)}, "the region 17x4 at 0,0 is not in the picture of 16x16"),
        ({"init": [picture(), picture(), picture()], "num_images": 2}, "3 pictures are given"),
        ({"init": [picture(), picture((8, 8))], "num_images": 2}, "different sizes"),
        ({"init": "no-such.png"}, "does not exist"),
        ({"init": b"GIF89a"}, "cannot be read"),
        ({"image_guidance": 2}, "does not read it"),
        ({"loopback": 2, "outpaint_left": 4}, "both asked for"),
        ({"mask_alpha": True, "outpaint_left": 4}, "both asked for"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(tiny_model: StableDiffusion, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(tiny_model, Request(**{"init": picture(), **STEPS, **fields}))


def test_a_model_that_draws_no_pictures(pixel_model: StableDiffusion) -> None:
    result = generate(pixel_model, Request(init=picture((8, 8)), seed=0))
    assert result.images[0].mode == "L"

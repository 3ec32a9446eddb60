"""Generation: open fields, the same seed twice, batches, start noise, warnings, non-finite values."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import sfumato
from sfumato import Request
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.errors import InputError, NumericalError
from sfumato.generation import Notes, complete, draw, finish, generate, stream
from sfumato.model import StableDiffusion
from sfumato.nn.autoencoder import AutoencoderKL
from sfumato.nn.unet import UNet
from sfumato.presets import ModelConfig


def bytes_of(samples: Tensor) -> list[str]:
    return [hashlib.sha256(sample.contiguous().numpy().tobytes()).hexdigest() for sample in samples]


# What a request leaves open


def test_open_fields_are_the_models_then_the_general_ones(tiny_model: StableDiffusion) -> None:
    request = complete(tiny_model, Request(prompt="x"))
    assert (request.steps, request.guidance, request.sampler) == (4, 3.0, "dpmpp_2m")
    assert (request.width, request.height, request.spacing) == (16, 16, "karras")
    assert request.seed is not None and request.seed != complete(tiny_model, Request(prompt="x")).seed
    tiny_model.defaults = {}
    assert complete(tiny_model, Request(prompt="x")).guidance == 7.5


def test_given_fields_stay(tiny_model: StableDiffusion) -> None:
    given = Request(prompt="x", steps=7, sampler="ddim", guidance=0, seed=5, width=32, height=8)
    own = {"spacing": "leading", "clip_skip": 1, "zeros_for_empty": False}
    assert complete(tiny_model, given) == given.model_copy(update=own)


def test_the_models_spacing_belongs_to_its_sampler(tiny_model: StableDiffusion) -> None:
    tiny_model.defaults = {"sampler": "euler", "spacing": "trailing"}
    assert complete(tiny_model, Request()).spacing == "trailing"
    assert complete(tiny_model, Request(sampler="ddim")).spacing == "leading"
    assert complete(tiny_model, Request(spacing="karras")).spacing == "karras"


def test_defaults_in_a_model_file_are_checked(tiny_model: StableDiffusion) -> None:
    tiny_model.defaults = {"steps": -1}
    with pytest.raises(InputError, match="steps is -1"):
        complete(tiny_model, Request(prompt="x"))
    tiny_model.defaults = {"stepz": 3}
    with pytest.raises(InputError, match="stepz") as caught:
        complete(tiny_model, Request(prompt="x"))
    assert "steps" in caught.value.hint


def test_ddpm_uses_the_noise_that_suits_its_steps(tiny_model: StableDiffusion) -> None:
    assert complete(tiny_model, Request(sampler="ddpm", steps=1000)).variance == "large"
    assert complete(tiny_model, Request(sampler="ddpm", steps=10)).variance == "small"
    assert complete(tiny_model, Request(sampler="ddpm", steps=10, variance="large")).variance == "large"


def test_asking_for_nothing_is_one_pass_per_step(tiny_model: StableDiffusion) -> None:
    assert complete(tiny_model, Request()).guidance == 1
    calls = record_calls(tiny_model.unet)
    generate(tiny_model, Request(seed=0))
    assert calls == [1] * 4


def test_the_text_encoders_layer_is_the_models_own(
    tiny_model: StableDiffusion, pixel_model: StableDiffusion
) -> None:
    tiny_model.config = replace(tiny_model.config, clip_skip=2, zeros_for_empty=True)
    request = complete(tiny_model, Request(prompt="x"))
    assert (request.clip_skip, request.zeros_for_empty, request.crop_top) == (2, True, None)
    given = complete(tiny_model, Request(prompt="x", clip_skip=1, zeros_for_empty=False))
    assert (given.clip_skip, given.zeros_for_empty) == (1, False)
    assert complete(pixel_model, Request()).clip_skip is None


@pytest.mark.parametrize("name", ["clip_skip", "zeros_for_empty", "original_width", "crop_top"])
def test_fields_that_the_model_does_not_read_are_refused(pixel_model: StableDiffusion, name: str) -> None:
    request = Request.model_validate({name: 1})
    with pytest.raises(InputError, match=f"{name} is (1|True); 'pixels' does not read it"):
        complete(pixel_model, request)


# The ways through the networks


def record_calls(module: nn.Module) -> list[int]:
    """The batch size of every later call."""
    sizes: list[int] = []
    module.register_forward_hook(lambda module, arguments, output: sizes.append(len(output)))
    return sizes


@pytest.mark.parametrize(
    ("guidance", "deterministic", "expected"),
    [(3, False, [4] * 4), (1, False, [2] * 4), (0, False, [2] * 4), (3, True, [1] * 16), (1, True, [1] * 8)],
)
def test_passes_of_the_unet(
    tiny_model: StableDiffusion, guidance: float, deterministic: bool, expected: list[int]
) -> None:
    calls = record_calls(tiny_model.unet)
    asked = Request(
        prompt="a red apple", num_images=2, guidance=guidance, deterministic=deterministic, seed=0
    )
    generate(tiny_model, asked)
    assert calls == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws(tiny_model: StableDiffusion, name: str) -> None:
    result = generate(tiny_model, Request(prompt="a red apple", sampler=name, steps=6, seed=1))
    assert result.samples.shape == (1, 3, 16, 16) and result.images[0].size == (16, 16)
    assert result.samples.std() > 0.05, "one flat colour"


def test_guidance_zero_ignores_the_prompt(tiny_model: StableDiffusion) -> None:
    drawn = [
        generate(tiny_model, Request(prompt=text, guidance=0, seed=3)).samples
        for text in ("a red apple", "b")
    ]
    assert torch.equal(*drawn)
    free = generate(tiny_model, Request(seed=3)).samples
    assert torch.allclose(drawn[0], free, atol=1e-5)


def test_prompt_negative_prompt_and_guidance_all_matter(tiny_model: StableDiffusion) -> None:
    base = {"prompt": "a red apple", "seed": 3}
    changes = [
        {},
        {"prompt": "a fox"},
        {"negative_prompt": "a fox"},
        {"guidance": 6},
        {"seed": 4},
        {"steps": 5},
    ]
    drawn = [generate(tiny_model, Request(**{**base, **change})).samples for change in changes]
    assert len({digest for samples in drawn for digest in bytes_of(samples)}) == len(changes)


def test_the_empty_prompt_draws_what_no_prompt_draws(tiny_model: StableDiffusion) -> None:
    empty = generate(tiny_model, Request(prompt="", guidance=1, seed=0)).samples
    assert torch.equal(empty, generate(tiny_model, Request(seed=0)).samples)


@pytest.mark.parametrize("prompt", ["🦊❄️🌲", "狐と雪", "a\0b", "é" * 500, "(((", "\n\t "])
def test_any_text_is_a_prompt(tiny_model: StableDiffusion, prompt: str) -> None:
    assert generate(tiny_model, Request(prompt=prompt, seed=0)).images[0].size == (16, 16)


def test_stream_gives_the_steps_and_generate_their_end(tiny_model: StableDiffusion) -> None:
    request = Request(prompt="a red apple", seed=1, sampler="ddim")
    steps = list(stream(tiny_model, request))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert steps[0].x.shape == steps[0].denoised.shape == (1, 2, 8, 8)
    assert all(step.sigma > step.target for step in steps) and steps[-1].target > 0  # DDIM ends at timestep 0
    latents = steps[-1].x / math.sqrt(1 + steps[-1].target ** 2)
    result = generate(tiny_model, request)
    assert torch.equal(result.latents, latents)
    assert torch.equal(result.samples, tiny_model.decode_latents(latents))
    assert not result.samples.requires_grad


def test_a_stream_can_be_left(tiny_model: StableDiffusion) -> None:
    calls = record_calls(tiny_model.unet)
    for step in stream(tiny_model, Request(seed=0, steps=10)):
        if step.index == 2:
            break
    assert len(calls) == 3
    assert torch.is_grad_enabled()


def test_stream_and_finish_are_generate(tiny_model: StableDiffusion) -> None:
    request, notes = complete(tiny_model, Request(prompt="a red apple", seed=1, num_images=2)), Notes()
    *_, last = stream(tiny_model, request, notes)
    result = finish(tiny_model, request, last, notes, 1.0)
    assert torch.equal(result.samples, generate(tiny_model, request).samples)
    assert result.seconds > 1.0


def test_draw_is_generate_for_many_prompts(tiny_model: StableDiffusion) -> None:
    prompts, seeds = ["a red apple", "a fox", ""], [5, 6, 7]
    together = draw(tiny_model, prompts, seeds)
    for row, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = generate(tiny_model, Request(prompt=prompt, seed=seed)).samples[0]
        assert torch.allclose(row, alone, atol=1e-4)


# The same seed, the same picture


def test_same_seed_same_picture(tiny_model: StableDiffusion) -> None:
    request = Request(prompt="a red apple", seed=11, sampler="euler_a")
    assert torch.equal(generate(tiny_model, request).samples, generate(tiny_model, request).samples)


@pytest.mark.parametrize("name", ["euler_a", "dpmpp_2m"])
def test_deterministic_is_byte_equal_alone_and_in_a_batch(tiny_model: StableDiffusion, name: str) -> None:
    request = Request(prompt="a red apple", sampler=name, seed=20, num_images=4, deterministic=True)
    batch = generate(tiny_model, request)
    for index in range(4):
        alone = generate(tiny_model, request.model_copy(update={"seed": 20 + index, "num_images": 1}))
        assert bytes_of(alone.samples) == bytes_of(batch.samples[index : index + 1])
        assert alone.images[0].tobytes() == batch.images[index].tobytes()


def test_batched_is_within_one_level_of_alone(tiny_model: StableDiffusion) -> None:
    request = Request(prompt="a red apple", seed=20, num_images=4)
    batch = generate(tiny_model, request)
    for index in range(4):
        alone = generate(tiny_model, request.model_copy(update={"seed": 20 + index, "num_images": 1}))
        ours, theirs = (np.array(one.images[i], dtype=int) for one, i in ((alone, 0), (batch, index)))
        assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() <= 0.001


def test_parameters_draw_the_same_picture_again(tiny_model: StableDiffusion) -> None:
    batch = generate(tiny_model, Request(prompt="a red apple", num_images=3, deterministic=True))
    values = batch.parameters[2]
    again = Request(**{name: value for name, value in values.items() if name in Request.model_fields})
    assert torch.equal(generate(tiny_model, again).samples[0], batch.samples[2])
    assert (values["model"], values["version"], values["dtype"]) == ("tiny", sfumato.__version__, "float32")
    assert [row["seed"] - batch.parameters[0]["seed"] for row in batch.parameters] == [0, 1, 2]


# Start noise


def test_start_noise_of_a_seed_given_as_a_file(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    noise = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(9))
    np.save(tmp_path / "noise.npy", noise.numpy())
    safetensors.torch.save_file({"noise": noise}, tmp_path / "noise.safetensors")
    expected = generate(tiny_model, Request(prompt="a fox", seed=9)).samples
    for start in (noise, tmp_path / "noise.npy", str(tmp_path / "noise.safetensors"), noise.numpy()):
        result = generate(tiny_model, Request(prompt="a fox", seed=0, start_noise=start, num_images=2))
        assert torch.allclose(result.samples, expected.expand(2, -1, -1, -1), atol=1e-4)
        assert len(result.parameters[0]["start_noise_sha256"]) == 64


def test_one_start_noise_for_each_picture_or_the_first_for_all(tiny_model: StableDiffusion) -> None:
    noise = torch.randn(2, 2, 8, 8)
    request = Request(prompt="a fox", start_noise=noise, num_images=2, seed=0)
    own = generate(tiny_model, request).samples
    assert not torch.allclose(own[0], own[1], atol=1e-2)
    shared = generate(tiny_model, request.model_copy(update={"shared_start": True})).samples
    assert torch.allclose(shared[0], shared[1], atol=1e-4) and torch.allclose(shared[0], own[0], atol=1e-4)


def test_shared_start_is_the_first_seeds(tiny_model: StableDiffusion) -> None:
    shared = generate(tiny_model, Request(prompt="a fox", seed=4, num_images=3, shared_start=True)).samples
    alone = generate(tiny_model, Request(prompt="a fox", seed=4)).samples
    assert torch.allclose(shared, alone.expand(3, -1, -1, -1), atol=1e-4)


def test_start_noise_that_cannot_be_taken(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    safetensors.torch.save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for name in ("text.npy", "objects.npy", "missing.npy", "two.safetensors"):
        with pytest.raises(InputError, match=name):
            generate(tiny_model, Request(start_noise=tmp_path / name))
    with pytest.raises(InputError, match=r"shape \(3, 8, 8\)"):
        generate(tiny_model, Request(start_noise=torch.zeros(3, 8, 8)))
    with pytest.raises(InputError, match="not finite"):
        generate(tiny_model, Request(start_noise=torch.full((2, 8, 8), math.nan)))


# Sizes, warnings and what a model lacks


def test_many_prompts_in_one_batch(tiny_model: StableDiffusion) -> None:
    prompts = ["a fox", "a red apple " * 9, "a (blue) [apple]"]
    drawn = draw(tiny_model, prompts, [3, 4, 5])
    for index, prompt in enumerate(prompts):
        alone = generate(tiny_model, Request(prompt=prompt, seed=3 + index, emphasis="plain"))
        torch.testing.assert_close(drawn[index : index + 1], alone.samples, rtol=1e-3, atol=1e-3)


def test_sizes(tiny_model: StableDiffusion) -> None:
    wide = generate(tiny_model, Request(prompt="a fox", width=24, height=16, seed=0))
    assert wide.images[0].size == (24, 16) and wide.parameters[0]["width"] == 24
    with pytest.raises(InputError, match="multiples of 4") as caught:
        generate(tiny_model, Request(prompt="a fox", width=18, height=17))
    assert "16x16" in caught.value.hint


def test_warnings_are_collected_and_by_stream_raised(tiny_model: StableDiffusion) -> None:
    long = Request(prompt="a red apple " * 9 + "zebra", seed=0, emphasis="plain")
    told = generate(tiny_model, long).warnings
    assert len(told) == 1 and "zebra" in told[0]
    with pytest.warns(UserWarning, match="zebra"):
        stream(tiny_model, long)
    rude = long.model_copy(update={"prompt": "a fox", "negative_prompt": long.prompt})
    assert generate(tiny_model, rude).warnings[0].startswith("the negative prompt is longer")
    useless = generate(tiny_model, Request(prompt="a fox", negative_prompt="a dog", guidance=1, seed=0))
    assert useless.warnings == ["the negative prompt has no effect at guidance 1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(tiny_model, Request(prompt="a fox", seed=0))


def test_a_model_without_text_or_autoencoder(pixel_model: StableDiffusion) -> None:
    result = generate(pixel_model, Request(seed=0, num_images=2))
    assert result.images[0].mode == "L" and result.are_pictures
    assert torch.equal(result.samples, result.latents)
    assert generate(pixel_model, Request(prompt="", seed=0)).images[0].mode == "L"
    for refused in (Request(prompt="a fox"), Request(negative_prompt="a fox")):
        with pytest.raises(InputError, match="no text encoder"):
            generate(pixel_model, refused)


def other_model(pixel_model: StableDiffusion, sides: tuple[int, ...], **changes: int) -> StableDiffusion:
    assert pixel_model.config.unet is not None
    unet = replace(pixel_model.config.unet, **changes)
    config = ModelConfig(name="other", unet=unet, image_size=sides, defaults={"steps": 2})
    return StableDiffusion(config, {"unet": UNet(unet).eval()})


def test_other_dimensions_give_arrays_with_a_preview(pixel_model: StableDiffusion) -> None:
    line = generate(other_model(pixel_model, (16,), dims=1), Request(seed=0))
    assert line.samples.shape == (1, 1, 16) and not line.are_pictures and line.images[0].size == (16, 64)
    longer = generate(other_model(pixel_model, (16,), dims=1), Request(seed=0, width=24))
    assert longer.samples.shape == (1, 1, 24)
    with pytest.raises(InputError, match="one dimension"):
        generate(other_model(pixel_model, (16,), dims=1), Request(height=8))
    volume = generate(other_model(pixel_model, (4, 8, 8), dims=3), Request(seed=0))
    assert volume.samples.shape == (1, 1, 4, 8, 8) and not volume.are_pictures
    assert volume.images[0].size == (16, 16)
    pair = generate(other_model(pixel_model, (8, 8), in_channels=2, out_channels=2), Request(seed=0))
    assert pair.samples.shape == (1, 2, 8, 8) and not pair.are_pictures


def test_a_layer_of_the_text_encoder(tiny_model: StableDiffusion) -> None:
    asked = Request(prompt="a red apple", seed=0)
    last = generate(tiny_model, asked)
    assert last.parameters[0]["clip_skip"] == 1
    assert torch.equal(generate(tiny_model, asked.model_copy(update={"clip_skip": 1})).samples, last.samples)
    with pytest.raises(InputError, match=r"clip_skip is 2; this text encoder allows 1 .* to 1"):
        generate(tiny_model, asked.model_copy(update={"clip_skip": 2}))


def test_an_absent_negative_prompt_as_zeros(tiny_model: StableDiffusion) -> None:
    seen: list[Tensor] = []
    tiny_model.unet.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["context"]), with_kwargs=True
    )
    asked = Request(prompt="a red apple", seed=0, zeros_for_empty=True)
    zeros = generate(tiny_model, asked)
    assert seen[0].shape == (2, 8, 16) and not seen[0][1].any() and seen[0][0].any()
    assert zeros.parameters[0]["zeros_for_empty"] is True
    empty = generate(tiny_model, asked.model_copy(update={"zeros_for_empty": False}))
    assert not torch.allclose(zeros.samples, empty.samples, atol=1e-3)
    seen.clear()
    generate(tiny_model, asked.model_copy(update={"negative_prompt": "a fox"}))
    fox = tiny_model.encode_prompt(["a fox"]).context
    assert fox is not None and torch.allclose(seen[0][1:], fox, atol=1e-6)


def test_a_model_that_starts_from_a_picture_says_so(tiny_model: StableDiffusion) -> None:
    assert tiny_model.config.unet is not None
    unet = replace(tiny_model.config.unet, in_channels=5)  # a mask and a masked picture beside the sample
    parts = {"unet": UNet(unet), "autoencoder": tiny_model.autoencoder, "text": tiny_model.text_encoder}
    model = StableDiffusion(replace(tiny_model.config, unet=unet), parts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'tiny' needs a picture to start from: 3 more channels") as caught:
        generate(model, Request(prompt="a red apple", seed=0))
    assert "Conditioning.concat (b, 3, ...)" in caught.value.hint


def test_two_text_encoders_and_sizes(tiny_xl_model: StableDiffusion) -> None:
    seen: list[Tensor] = []
    tiny_xl_model.unet.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["vector"]), with_kwargs=True
    )
    asked = Request(prompt="a red apple", seed=0, width=32, height=16, steps=2)
    drawn = generate(tiny_xl_model, asked)
    own = {
        name: drawn.parameters[0][name]
        for name in ("clip_skip", "zeros_for_empty", "original_width", "crop_top")
    }
    assert own == {"clip_skip": 2, "zeros_for_empty": True, "original_width": 32, "crop_top": 0}
    prompt = tiny_xl_model.encode_prompt(["a red apple"], size=(16, 32)).vector
    empty = tiny_xl_model.uncondition(1, size=(16, 32)).vector
    assert prompt is not None and empty is not None
    assert torch.allclose(seen[0], torch.cat([prompt, empty]), atol=1e-6)
    changed = asked.model_copy(update={"original_width": 8, "crop_top": 5})
    assert not torch.allclose(generate(tiny_xl_model, changed).samples, drawn.samples, atol=1e-4)
    told = tiny_xl_model.encode_prompt(["a red apple"], size=(16, 32), original=(16, 8), crop=(5, 0)).vector
    assert told is not None and torch.allclose(seen[2][:1], told, atol=1e-6)
    assert generate(tiny_xl_model, Request(seed=0, steps=2)).samples.isfinite().all()
    single = generate(tiny_xl_model, asked.model_copy(update={"deterministic": True}))
    assert torch.allclose(single.samples, drawn.samples, atol=1e-4)


def test_prompts_in_wordpieces(tiny_bert_model: StableDiffusion) -> None:
    drawn = [generate(tiny_bert_model, Request(prompt=text, seed=0)) for text in ("a red apple", "a fox")]
    assert not torch.allclose(drawn[0].samples, drawn[1].samples, atol=1e-4)
    assert drawn[0].parameters[0]["clip_skip"] is None
    long = generate(tiny_bert_model, Request(prompt="a fox in a snowy forest two green pears", seed=0))
    assert "two green pears" in long.warnings[0]


def test_classes_in_the_context(tiny_class_model: StableDiffusion) -> None:
    def draw_label(label: int | None, guidance: float = 3) -> Tensor:
        return generate(tiny_class_model, Request(label=label, guidance=guidance, seed=0)).samples

    assert not torch.allclose(draw_label(0), draw_label(1), atol=1e-4)
    assert not torch.allclose(draw_label(0), draw_label(0, guidance=1), atol=1e-4)
    free = draw_label(None)
    assert torch.allclose(free, draw_label(0, guidance=0), atol=1e-5)
    assert torch.allclose(free, draw_label(3, guidance=1), atol=1e-5)  # the last row is no class
    with pytest.raises(InputError, match="the label is 4; 'tiny-classes' has labels: 0 to 3"):
        draw_label(4)
    with pytest.raises(InputError, match="no text encoder"):
        generate(tiny_class_model, Request(prompt="a fox"))


def test_a_table_without_a_row_for_no_class(tiny_class_model: StableDiffusion) -> None:
    table = tiny_class_model.classes
    assert table is not None
    config = replace(tiny_class_model.config, classes=replace(table.config, unconditional=False))
    parts = {"unet": tiny_class_model.unet, "autoencoder": tiny_class_model.autoencoder, "classes": table}
    model = StableDiffusion(config, parts)  # type: ignore[arg-type]
    assert generate(model, Request(label=3, guidance=1, seed=0)).samples.isfinite().all()
    with pytest.raises(InputError, match="guidance is 1"):
        generate(model, Request(label=3, guidance=2))
    with pytest.raises(InputError, match="one of 4 classes"):
        generate(model, Request())


def test_labels(pixel_model: StableDiffusion) -> None:
    classes = other_model(pixel_model, (8, 8), num_classes=3)
    for parameter in classes.unet.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2
    drawn = [generate(classes, Request(label=label, guidance=1, seed=0)).samples for label in (0, 2)]
    assert not torch.equal(*drawn)
    with pytest.raises(InputError, match="label is 3"):
        generate(classes, Request(label=3, guidance=1))
    with pytest.raises(InputError, match="one of 3 classes"):
        generate(classes, Request())
    with pytest.raises(InputError, match="guidance"):
        generate(classes, Request(label=1, guidance=2))
    with pytest.raises(InputError, match="labels: none"):
        generate(pixel_model, Request(label=1))


def test_options_go_to_samplers_that_have_them(tiny_model: StableDiffusion) -> None:
    drawn = [generate(tiny_model, Request(sampler="ddim", eta=eta, seed=0)).samples for eta in (0, 1)]
    assert not torch.equal(*drawn)
    with pytest.raises(InputError, match="eta"):
        generate(tiny_model, Request(sampler="euler", eta=0.5))


# Non-finite values: repeated in float32, or an error; never a black picture


def poison(module: nn.Module, calls: Callable[[int], bool]) -> None:
    """Make the outputs of those calls (counted from 0, copies of the module included) not a number."""
    count = 0

    def spoil(module: nn.Module, arguments: object, output: object) -> object:
        nonlocal count
        count += 1
        tensor = output if isinstance(output, Tensor) else output.last_hidden_state  # type: ignore[attr-defined]
        if calls(count - 1):
            tensor.view(-1)[0] = math.nan
        return output

    module.register_forward_hook(spoil)


def stage(model: StableDiffusion, name: str) -> nn.Module:
    assert isinstance(model.autoencoder, AutoencoderKL) and model.text_encoder is not None
    return {"text encoder": model.text_encoder, "U-Net": model.unet, "decoder": model.autoencoder.decoder}[
        name
    ]


@pytest.mark.parametrize(
    ("name", "call", "noted"),
    [("text encoder", 0, "text encoder"), ("U-Net", 2, "U-Net at step 3"), ("decoder", 0, "decoder")],
)
def test_a_stage_that_fails_once_is_repeated_and_noted(
    tiny_model: StableDiffusion, name: str, call: int, noted: str
) -> None:
    request = Request(prompt="a red apple", seed=0)
    clean = generate(tiny_model, request)
    poison(stage(tiny_model, name), lambda count: count == call)
    result = generate(tiny_model, request)
    assert result.parameters[0]["float32_retries"] == [noted]
    assert torch.allclose(result.samples, clean.samples, atol=1e-5)
    assert clean.parameters[0]["float32_retries"] == []


@pytest.mark.parametrize(
    ("name", "first", "words"),
    [
        ("text encoder", 0, "text encoder"),
        ("U-Net", 2, "U-Net .* step 3 of 4"),
        ("decoder", 0, "decoder .* step 4"),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_stage_that_fails_twice_is_an_error(
    tiny_model: StableDiffusion, name: str, first: int, words: str, deterministic: bool
) -> None:
    passes = 2 if deterministic and name == "U-Net" else 1
    period = (first + 1) * passes  # the second try is spoilt at the same step as the first
    poison(stage(tiny_model, name), lambda count: count % period >= first * passes)
    with pytest.raises(NumericalError, match=words) as caught:
        generate(tiny_model, Request(prompt="a red apple", seed=0, deterministic=deterministic))
    assert caught.value.exit_status == 6


def test_half_precision_that_overflows_is_saved_by_float32(tiny_model: StableDiffusion) -> None:
    assert isinstance(tiny_model.autoencoder, AutoencoderKL)
    tiny_model.to(torch.device("cpu"), torch.float16)
    final = tiny_model.autoencoder.decoder.conv_out
    final.weight.data *= 0.0
    assert final.bias is not None
    final.bias.data[:] = 60000.0
    final.register_forward_hook(lambda module, arguments, output: (output * 2) / 120000)
    result = generate(tiny_model, Request(prompt="a red apple", seed=0))
    assert result.parameters[0]["float32_retries"] == ["decoder"]
    assert result.parameters[0]["dtype"] == "float16"
    assert torch.allclose(result.samples, torch.ones_like(result.samples))

"""The prompt language, LoRA and embeddings on their way from a request to the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato import Request
from sfumato.checkpoints.files import sha256
from sfumato.errors import CheckpointError, InputError
from sfumato.generation import Notes, complete, generate, stream
from sfumato.generation.run import final_latents
from sfumato.model import StableDiffusion


def latents(model: StableDiffusion, prompt: str, **options: Any) -> Tensor:
    return generate(model, Request(prompt=prompt, seed=0, steps=4, sampler="euler", **options)).latents


def digest(model: StableDiffusion) -> dict[str, Tensor]:
    assert model.text_encoder is not None
    return {
        name: value.clone()
        for part in (model.unet, model.text_encoder)
        for name, value in part.state_dict().items()
    }


def test_weights_change_the_picture_and_plain_prompts_have_none(tiny_model: StableDiffusion) -> None:
    plain = latents(tiny_model, "a red apple")
    assert not torch.allclose(latents(tiny_model, "a (red:1.5) apple"), plain, atol=1e-3)
    assert torch.equal(latents(tiny_model, "a red apple", emphasis="comfyui"), plain)
    other = latents(tiny_model, "a (red:1.5) apple", emphasis="comfyui")
    assert not torch.allclose(other, latents(tiny_model, "a (red:1.5) apple"), atol=1e-3)
    assert torch.equal(latents(tiny_model, "a red apple", emphasis="plain"), plain)


def test_a_prompt_that_changes(tiny_model: StableDiffusion) -> None:
    """Stopped after half of the steps it is one prompt; started there, the other."""
    request = Request(prompt="[a red apple:a fox:0.5]", seed=0, steps=4, sampler="euler")
    steps = list(stream(tiny_model, request))
    first = list(stream(tiny_model, request.model_copy(update={"prompt": "a red apple"})))
    assert all(torch.equal(a.x, b.x) for a, b in zip(steps[:2], first[:2], strict=True))
    second = tiny_model.predictor()(steps[1].x, steps[2].sigma, tiny_model.encode_prompt(["a fox"]))
    uncond = tiny_model.predictor()(steps[1].x, steps[2].sigma, tiny_model.encode_prompt([""]))
    torch.testing.assert_close(steps[2].denoised, uncond + 3 * (second - uncond), rtol=1e-4, atol=1e-4)
    turns = latents(tiny_model, "[a red apple|a fox]")
    assert not torch.allclose(turns, latents(tiny_model, "a red apple"), atol=1e-3)
    again = latents(tiny_model, "[a red apple|a red apple]")
    assert torch.equal(again, latents(tiny_model, "a red apple"))


def test_a_negative_prompt_that_changes(tiny_model: StableDiffusion) -> None:
    never = latents(tiny_model, "a fox", negative_prompt="[a dog::0]")
    assert torch.equal(never, latents(tiny_model, "a fox"))


def test_and_composes(tiny_model: StableDiffusion) -> None:
    both = Request(prompt="a red apple AND a fox :0.5", seed=0, steps=1, sampler="euler")
    (step,) = stream(tiny_model, both)
    predict, start = tiny_model.predictor(), generate(tiny_model, both)
    x = next(iter(stream(tiny_model, both.model_copy(update={"guidance": 0.0}))))
    assert start.latents.shape == x.x.shape
    sigma = step.sigma
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * sigma
    uncond, first, second = (
        predict(noise, sigma, tiny_model.encode_prompt([text])) for text in ("", "a red apple", "a fox")
    )
    wanted = uncond + 3 * (first - uncond) + 1.5 * (second - uncond)
    torch.testing.assert_close(step.denoised, wanted, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="AND"):
        generate(tiny_model, both.model_copy(update={"apg": True}))


def test_long_prompts_are_read_to_their_end(tiny_model: StableDiffusion) -> None:
    long = "a red apple " * 9
    result = generate(tiny_model, Request(prompt=long + "zebra", seed=0))
    assert not result.warnings
    assert not torch.equal(result.latents, generate(tiny_model, Request(prompt=long + "fox", seed=0)).latents)


def test_choices_are_each_pictures_own(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    (tmp_path / "fruit.txt").write_text("apple\npear\nfox\nhouse\n")
    request = complete(
        tiny_model,
        Request(prompt="a {red|green|blue} __fruit__", seed=3, num_images=4, wildcards=str(tmp_path)),
    )
    notes = Notes()
    *_, last = stream(tiny_model, request, notes)
    drawn = [prompt for prompt, _ in notes.prompts]
    assert len(set(drawn)) > 1 and all("{" not in (text or "") and "__" not in (text or "") for text in drawn)
    for index, text in enumerate(drawn):
        alone = generate(tiny_model, Request(prompt=text, seed=3 + index, steps=request.steps))
        torch.testing.assert_close(
            final_latents(last)[index : index + 1], alone.latents, rtol=1e-3, atol=1e-3
        )


def test_an_unknown_wildcard_and_tag_are_told(tiny_model: StableDiffusion) -> None:
    told = generate(tiny_model, Request(prompt="a __beast__ <hypernet:ink:1>", seed=0)).warnings
    assert told == [
        "there is no wildcard 'beast'; it was left as it is",
        "<hypernet:ink:1> was left out: there are no hypernet tags here",
    ]


def test_styles(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    file = tmp_path / "styles.csv"
    file.write_text("name,prompt,negative_prompt\nred,a red {prompt},fox\n")
    styled = latents(tiny_model, "apple", styles="red", styles_file=file)
    assert torch.equal(styled, latents(tiny_model, "a red apple", negative_prompt="fox"))
    with pytest.raises(InputError, match="no style 'rde'"):
        latents(tiny_model, "apple", styles="rde", styles_file=file)
    with pytest.raises(InputError, match="styles_file"):
        latents(tiny_model, "apple", styles="red")


@pytest.fixture
def lora_dir(tiny_model: StableDiffusion, tmp_path: Path) -> Path:
    """A LoRA in kohya's names on one layer of the U-Net and one of the text encoder."""
    generator = torch.Generator().manual_seed(0)
    width = 32
    names = {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (width, width),
             "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (16, 16)}  # fmt: skip
    tensors = {}
    for name, (out, given) in names.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, given, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "ink.safetensors")
    return tmp_path


def test_lora_by_tag_and_by_option(tiny_model: StableDiffusion, lora_dir: Path) -> None:
    before, plain = digest(tiny_model), latents(tiny_model, "a fox")
    changed = latents(tiny_model, "a fox <lora:ink:1>", lora_dir=lora_dir)
    assert (changed - latents(tiny_model, "a fox ")).abs().max() > 1e-3
    assert torch.allclose(changed, latents(tiny_model, "a fox ", lora="ink:1", lora_dir=lora_dir))
    file = str(lora_dir / "ink.safetensors")
    assert torch.equal(latents(tiny_model, "a fox", lora=f"{file}:0"), plain)
    halves = (
        latents(tiny_model, "a fox ", lora=[f"{file}:0:1"]),
        latents(tiny_model, "a fox ", lora=[f"{file}:1:0"]),
    )
    assert not torch.allclose(*halves, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in digest(tiny_model).items())
    values = generate(
        tiny_model, Request(prompt="a fox <lora:ink:1>", seed=0, lora_dir=str(lora_dir))
    ).parameters[0]
    assert values["loras"] == {"ink": sha256(lora_dir / "ink.safetensors")}


def test_lora_are_taken_off_when_a_stream_is_given_up(tiny_model: StableDiffusion, lora_dir: Path) -> None:
    before = digest(tiny_model)
    steps = stream(tiny_model, Request(prompt="a fox <lora:ink:1>", seed=0, lora_dir=str(lora_dir)))
    next(steps)
    assert any(not torch.equal(value, before[name]) for name, value in digest(tiny_model).items())
    steps.close()  # type: ignore[attr-defined]
    assert all(torch.equal(value, before[name]) for name, value in digest(tiny_model).items())


def test_lora_that_are_not_there_or_for_another_model(tiny_model: StableDiffusion, lora_dir: Path) -> None:
    with pytest.raises(InputError, match="asks for the LoRA 'ink'"):
        latents(tiny_model, "a fox <lora:ink:1>")
    with pytest.raises(InputError, match=r"no '\.\./ink'"):
        latents(tiny_model, "a fox <lora:../ink:1>", lora_dir=lora_dir)
    save_file(
        {"lora_unet_input_blocks_9_1_proj_in.lora_up.weight": torch.ones(4, 4)},
        lora_dir / "other.safetensors",
    )
    with pytest.raises(CheckpointError):
        latents(tiny_model, "a fox <lora:other:1>", lora_dir=lora_dir)


def test_embeddings_by_name(tiny_model: StableDiffusion, tmp_path: Path) -> None:
    save_file(
        {"emb_params": torch.randn(2, 16, generator=torch.Generator().manual_seed(1))},
        tmp_path / "inkstyle.safetensors",
    )
    without = latents(tiny_model, "a fox inkstyle")
    named = latents(tiny_model, "a fox inkstyle", embedding_dir=tmp_path)
    assert not torch.allclose(named, without, atol=1e-3)
    assert torch.equal(named, latents(tiny_model, "a fox embedding:inkstyle", embedding_dir=tmp_path))
    told = generate(tiny_model, Request(prompt="a fox embedding:nothing", seed=0)).warnings
    assert told == ["there is no embedding 'nothing'; the prompt goes without it"]

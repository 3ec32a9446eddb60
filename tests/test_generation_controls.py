"""Controls as requests ask for them: which picture a network is shown, how, when, and what a recipe says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sfumato import Request
from sfumato.checkpoints.controls.layouts import control_pairs
from sfumato.checkpoints.controls.load import load_control
from sfumato.checkpoints.controls.write import write_controlnet
from sfumato.checkpoints.layouts.tables import to_foreign
from sfumato.cli import main
from sfumato.diffusion.control import Influence
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Predictor
from sfumato.errors import InputError
from sfumato.generation import complete, generate, stream
from sfumato.generation import control as controlling
from sfumato.model import StableDiffusion
from sfumato.nn.attention import CrossAttention
from sfumato.nn.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.ip_adapter import IPAdapter, IPAdapterConfig, image_layers
from sfumato.nn.t2i_adapter import T2IAdapter, T2IAdapterConfig
from sfumato.preprocess import preprocess
from sfumato.request.control import ControlPicture, read_control

STEPS: dict[str, Any] = {"prompt": "a red apple", "steps": 3, "seed": 1, "sampler": "euler"}


def noisy(size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def randomised(module: torch.nn.Module, seed: int) -> Any:
    for parameter in module.parameters():
        generator = torch.Generator().manual_seed(parameter.numel() + seed)
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.eval().requires_grad_(False)


def drawn(model: StableDiffusion, *controls: ControlPicture | str, **fields: Any) -> Tensor:
    return generate(model, Request(**{**STEPS, "control": controls, **fields})).latents


def difference(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


@pytest.fixture
def network(tiny_model: StableDiffusion) -> ControlNet:
    config = ControlNetConfig(tiny_model.unet.config, hint_widths=(4, 8))
    return randomised(ControlNet(config), 7)


def of(network: Any, **fields: Any) -> ControlPicture:
    return ControlPicture(**{"kind": "plain", "picture": noisy(), "model": network, **fields})


# What it draws


def test_it_draws_what_its_parts_say(tiny_model: StableDiffusion, network: ControlNet) -> None:
    """One step by hand: network, hint, guidance."""
    result = generate(tiny_model, Request(**{**STEPS, "steps": 1, "control": (of(network, weight=0.7),)}))
    request = complete(tiny_model, Request(**{**STEPS, "steps": 1}))
    (step,) = stream(tiny_model, request)
    control = controlling.Control(network, Influence(0.7))
    pixels = torch.from_numpy(np.array(noisy())).movedim(-1, 0)[None].float() / 255
    conds = {
        "cond": tiny_model.encode_prompt(["a red apple"], dialect="a1111"),
        "uncond": tiny_model.encode_prompt([""], dialect="a1111"),
    }
    conds = controlling.with_shown(conds, [controlling.shown(control, pixels)], 1)
    predict = controlling.controlled(
        tiny_model.network, tiny_model.unet, [control], [step.sigma, 0.0],
        lambda each: Predictor(each, tiny_model.schedule, tiny_model.prediction),
    )  # fmt: skip
    x = ImageNoise([1], (2, 8, 8), device=tiny_model.device).initial() * step.sigma
    cond, uncond = (predict(x, step.sigma, conds[name]) for name in ("cond", "uncond"))
    assert difference(result.latents, uncond + 3 * (cond - uncond)) < 1e-3
    assert difference(result.latents, step.denoised) > 1e-3


def test_weight_and_time(tiny_model: StableDiffusion, network: ControlNet) -> None:
    plain = drawn(tiny_model)
    whole = drawn(tiny_model, of(network))
    assert torch.equal(plain, drawn(tiny_model, of(network, weight=0)))
    assert torch.equal(plain, drawn(tiny_model, of(network, end=0.1)))  # no whole step
    assert torch.equal(whole, drawn(tiny_model, of(network, start=0, end=1)))
    results = [
        plain,
        whole,
        drawn(tiny_model, of(network, weight=0.5)),
        drawn(tiny_model, of(network, start=0.5)),
    ]
    results += [drawn(tiny_model, of(network, mode=mode)) for mode in ("prompt", "control")]
    for index, one in enumerate(results):
        assert all(difference(one, other) > 1e-4 for other in results[index + 1 :])


def test_two_controls_add_up(tiny_model: StableDiffusion, network: ControlNet) -> None:
    twice = drawn(tiny_model, of(network, weight=0.5), of(network, weight=0.5))
    assert difference(twice, drawn(tiny_model, of(network))) < 1e-4
    other = of(network, picture=noisy(seed=1), weight=0.5)
    assert difference(drawn(tiny_model, of(network, weight=0.5), other), twice) > 1e-4


def test_a_mask_of_nothing_is_no_control(tiny_model: StableDiffusion, network: ControlNet) -> None:
    nothing, everywhere = (Image.new("L", (16, 16), value) for value in (0, 255))
    assert difference(drawn(tiny_model), drawn(tiny_model, of(network, mask=nothing))) < 1e-5
    assert difference(drawn(tiny_model, of(network)), drawn(tiny_model, of(network, mask=everywhere))) < 1e-5


def test_the_picture_is_preprocessed_at_the_drawings_size(
    tiny_model: StableDiffusion, network: ControlNet
) -> None:
    large = noisy((40, 20))
    by_kind = drawn(tiny_model, of(network, kind="canny", picture=large, options={"low": 10, "high": 20}))
    ready = preprocess("canny", large.resize((16, 16), Image.Resampling.LANCZOS), {"low": 10, "high": 20})
    assert torch.equal(by_kind, drawn(tiny_model, of(network, picture=ready)))
    middle = large.crop((10, 0, 30, 20))
    cropped = drawn(tiny_model, of(network, picture=large, resize="crop"))
    assert difference(cropped, drawn(tiny_model, of(network, picture=middle))) < 0.05


def test_without_a_picture_it_is_the_one_to_start_from(
    tiny_model: StableDiffusion, network: ControlNet
) -> None:
    asked: dict[str, Any] = {"init": noisy(), "strength": 0.7}
    own = drawn(tiny_model, of(network, kind="blur", picture=None), **asked)
    assert torch.equal(own, drawn(tiny_model, of(network, kind="blur"), **asked))
    with pytest.raises(InputError, match="has no picture"):
        drawn(tiny_model, of(network, picture=None))


def test_a_part_sees_its_part_of_the_control(tiny_model: StableDiffusion, network: ControlNet) -> None:
    whole, hint = noisy((48, 32)), noisy((48, 32), 1)
    asked: dict[str, Any] = {"init": whole, "region": (16, 8, 16, 16), "strength": 1}
    part = drawn(tiny_model, of(network, picture=hint), **asked)
    by_hand = drawn(tiny_model, of(network, picture=hint.crop((16, 8, 32, 24))), **asked)
    assert torch.equal(part, by_hand)


def test_one_picture_for_each_drawing(tiny_model: StableDiffusion, network: ControlNet) -> None:
    both = [noisy(seed=1), noisy(seed=2)]
    asked: dict[str, Any] = {"num_images": 2, "deterministic": True}
    together = drawn(tiny_model, of(network, picture=both), **asked)
    alone = [
        drawn(tiny_model, of(network, picture=one), deterministic=True, seed=1 + index)
        for index, one in enumerate(both)
    ]
    assert torch.equal(together, torch.cat(alone))
    with pytest.raises(InputError, match="2 pictures for 3"):
        drawn(tiny_model, of(network, picture=both), num_images=3)


def test_windows_see_their_part_of_the_control(tiny_model: StableDiffusion, network: ControlNet) -> None:
    noise = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(3))
    hint = noisy((32, 16))
    asked: dict[str, Any] = {"window": 16, "window_overlap": 0, "window_weights": "uniform"}
    wide = drawn(tiny_model, of(network, picture=hint), width=32, start_noise=noise, **asked)
    left = drawn(
        tiny_model, of(network, picture=hint.crop((0, 0, 16, 16))), start_noise=noise[..., :8].contiguous()
    )
    assert difference(wide[..., :8], left) < 1e-4


def test_t2i_and_ip_adapters(tiny_model: StableDiffusion) -> None:
    adapter = randomised(
        T2IAdapter(T2IAdapterConfig(channels=(16, 32), num_res_blocks=1, kind="full-xl", unshuffle=4)), 3
    )
    plain = drawn(tiny_model)
    with_adapter = drawn(tiny_model, of(adapter))
    assert difference(plain, with_adapter) > 1e-4
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=14,
        patch_size=7, projection_dim=12,
    )  # fmt: skip
    eye = randomised(CLIPVisionEncoder(vision), 5)
    layers = image_layers(tiny_model.unet)
    attentions = (cast(CrossAttention, tiny_model.unet.get_submodule(name)) for name in layers)
    widths = tuple(each.to_q.out_features for each in attentions)
    prompter = randomised(IPAdapter(IPAdapterConfig(widths, 16, 12)), 4)
    seen = drawn(tiny_model, of(prompter), image_encoder=eye)
    assert difference(plain, seen) > 1e-5
    assert torch.equal(plain, drawn(tiny_model, of(prompter, weight=0), image_encoder=eye))
    assert difference(seen, drawn(tiny_model, of(prompter), of(adapter), image_encoder=eye)) > 1e-4
    large: dict[str, Any] = {"width": 32, "window": 16}
    in_windows = drawn(tiny_model, of(prompter), image_encoder=eye, **large)
    assert difference(in_windows, drawn(tiny_model, **large)) > 1e-5  # tokens are for every window
    with pytest.raises(InputError, match="Leave T2I-Adapters out"):
        drawn(tiny_model, of(adapter), **large)
    with pytest.raises(InputError, match="no image encoder"):
        drawn(tiny_model, of(prompter))


# Files, texts, recipes


def write(network: ControlNet, path: Path) -> Path:
    save_file(to_foreign(control_pairs(network.config), network.state_dict()), path)
    return path


def test_files_recipes_and_replay(
    tiny_model_file: Path, network: ControlNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets").mkdir()
    write(network, tmp_path / "nets" / "tiny-canny.safetensors")
    noisy().save(tmp_path / "photo.png")
    common = ["--model", str(tiny_model_file)]
    control = f"canny:{tmp_path / 'photo.png'} weight=0.8 low=20"
    asked = [
        "generate",
        "a red apple",
        *common,
        "--steps",
        "2",
        "--seed",
        "1",
        "-o",
        str(tmp_path / "one.png"),
    ]
    assert main([*asked, "--control", control, "--control-dir", str(tmp_path / "nets")]) == 0
    capsys.readouterr()
    again = ["replay", str(tmp_path / "one.png"), "--check", *common]
    assert main(again) == 2
    told = capsys.readouterr().err
    assert '--control "canny:PICTURE model=FILE weight=0.8' in told and "low=20" in told
    assert str(tmp_path) not in told  # a picture names no places on somebody's disk
    assert main([*again, "--control", control, "--control-dir", str(tmp_path / "nets")]) == 0
    assert capsys.readouterr().out == "equal\n"
    other = control.replace("0.8", "0.5")
    assert main([*again, "--control", other, "--control-dir", str(tmp_path / "nets")]) == 1
    assert "another control" in capsys.readouterr().out


def test_a_network_is_found_by_its_kind(
    tiny_model: StableDiffusion, network: ControlNet, tmp_path: Path
) -> None:
    path = write(network, tmp_path / "my-canny.safetensors")
    asked = ControlPicture(kind="canny", picture=noisy())
    found = drawn(tiny_model, asked, control_dir=tmp_path)
    assert torch.equal(found, drawn(tiny_model, of(path, kind="canny")))
    released = write(network, tmp_path / "control_v11p_sd15_softedge.safetensors")
    found = drawn(tiny_model, ControlPicture(kind="soft_edges", picture=noisy()), control_dir=tmp_path)
    assert torch.equal(found, drawn(tiny_model, of(released, kind="soft_edges")))
    with pytest.raises(InputError, match="0 networks named after 'blur'"):
        drawn(tiny_model, ControlPicture(kind="blur", picture=noisy()), control_dir=tmp_path)
    with pytest.raises(InputError, match="has no network"):
        drawn(tiny_model, asked)


def test_a_network_that_was_trained_here_is_read_as_it_was(
    tiny_model: StableDiffusion, network: ControlNet, tmp_path: Path
) -> None:
    """Its heads and groups are other than a released network's of these widths would be."""
    path = tmp_path / "own.safetensors"
    write_controlnet(path, network, torch.float32)
    read = load_control(path)
    assert isinstance(read, ControlNet)
    ours, theirs = network.config.encoder, read.config.encoder
    assert (theirs.num_groups, theirs.num_heads) == (ours.num_groups, ours.num_heads) == (8, 2)
    assert torch.equal(drawn(tiny_model, of(path)), drawn(tiny_model, of(network)))


def test_a_network_of_another_model_is_told(tiny_model: StableDiffusion, network: ControlNet) -> None:
    wide = ControlNet(replace(network.config, encoder=replace(network.config.encoder, model_channels=24)))
    with pytest.raises(InputError, match="its model_channels is 24"):
        drawn(tiny_model, of(wide))
    with pytest.raises(InputError, match="adds to"):
        drawn(tiny_model, of(T2IAdapter(T2IAdapterConfig(channels=(24, 32), num_res_blocks=1))))
    with pytest.raises(InputError, match="no preprocessor 'cany'"):
        drawn(tiny_model, of(network, kind="cany"))


def asked(**fields: Any) -> tuple[ControlPicture, ...]:
    return Request(**fields).control


def test_texts_of_controls() -> None:
    read = read_control("canny:'my photo.png' model=a/b.safetensors weight=0.5 end=.8 mode=prompt low=20")
    assert (read.kind, read.picture, read.model) == ("canny", Path("my photo.png"), "a/b.safetensors")
    assert (read.weight, read.end, read.mode, read.options) == (0.5, 0.8, "prompt", {"low": 20.0})
    assert read_control("grey:").picture is None
    assert asked(control="plain:a.png") == asked(control=["plain:a.png"])
    for text, words in (
        ("canny", "names no picture"),
        ("canny:'a.png", "Close its quotes"),
        ("canny:a.png low", "no option"),
        ("canny:a.png weight=x", "weight"),
        ("canny:a.png start=2", "start"),
    ):
        with pytest.raises(ValueError, match=words):
            asked(control=text)

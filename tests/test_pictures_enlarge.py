"""Models that enlarge pictures, and LDM's inpainting: against the reference, what they are shown, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from sfumato import Request
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.load import open_model
from sfumato.checkpoints.save import save_file
from sfumato.cli import main
from sfumato.conditioning import Conditioning
from sfumato.diffusion.schedule import ScheduleConfig
from sfumato.errors import InputError
from sfumato.generation import complete, generate
from sfumato.generation.concat import small_noise
from sfumato.images import to_tensor
from sfumato.model import StableDiffusion, load
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.clip import CLIPTextConfig, CLIPTextEncoder
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.nn.vq import VQModel
from sfumato.presets import ModelConfig
from sfumato.recipes import read
from sfumato.text.tokenizer import clip_json

CLIP = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
X4 = ModelConfig(
    "x4",
    unet=UNetConfig(
        in_channels=7, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
        channel_mult=(1, 2), num_heads=4, use_spatial_transformer=True, context_dim=32, legacy=False,
        use_linear_in_transformer=True, num_classes=400, disable_self_attentions=(True, True),
    ),
    autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
    text=CLIP,
    tokenizer=clip_json(),
    schedule=ScheduleConfig(beta_start=0.0001, beta_end=0.02),
    prediction="v",
    latent_scale=0.08333,
    image_size=(64, 64),
)  # fmt: skip
PLAIN = UNetConfig(
    in_channels=6, out_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_head_channels=32, legacy=False,
)  # fmt: skip
VQ = AutoencoderConfig(
    z_channels=3, embed_dim=3, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, double_z=False, n_embed=64
)
SR = ModelConfig(
    "sr", unet=PLAIN, autoencoder=VQ, image_size=(64, 64), concat="enlarges",
    schedule=ScheduleConfig(beta_start=0.0015, beta_end=0.0155),
)  # fmt: skip
PROMPT, NEGATIVE = "a red apple", "blue"
STEPS: dict[str, Any] = {"steps": 3, "seed": 1}


def random_parts(config: ModelConfig) -> dict[str, nn.Module]:
    assert config.unet is not None and config.autoencoder is not None
    kind = AutoencoderKL if config.autoencoder.n_embed is None else VQModel
    parts: dict[str, nn.Module] = {"unet": UNet(config.unet), "autoencoder": kind(config.autoencoder)}
    if config.text is not None:
        parts["text"] = CLIPTextEncoder(config.text)
    generator = torch.Generator().manual_seed(1)
    for part in parts.values():
        part.eval().requires_grad_(False)
        for parameter in part.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            fan = max(1, parameter[0].numel())
            parameter.data = values / fan**0.5 if parameter.ndim > 1 else 1 + 0.1 * values
    return parts


@pytest.fixture(scope="module")
def x4_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("x4") / "x4.safetensors"
    save_file(path, X4, {name: part.state_dict() for name, part in random_parts(X4).items()}, torch.float32)
    return path


@pytest.fixture(scope="module")
def x4(x4_file: Path) -> StableDiffusion:
    return load(x4_file, device="cpu")


@pytest.fixture(scope="module")
def sr() -> StableDiffusion:
    return StableDiffusion(SR, random_parts(SR))


def picture(size: tuple[int, int] = (16, 16), seed: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of latents as a share of the largest of them."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@dataclass
class Seen:
    """The conditions that a network was asked with."""

    model: StableDiffusion
    conds: list[Conditioning]

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, *rest: Any, **options: Any) -> Tensor:
        self.conds.append(cond)
        return StableDiffusion.network(self.model, x, t, cond, *rest, **options)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Conditioning]]:
    """Draws, and gives the conditions of every pass."""

    def drawn(model: StableDiffusion, **fields: Any) -> list[Conditioning]:
        watch = Seen(model, [])
        monkeypatch.setattr(model, "network", watch)
        generate(model, Request(**{"init": picture(), **STEPS, **fields}))
        monkeypatch.undo()
        return watch.conds

    return drawn


# Against the reference


@pytest.fixture(scope="module")
def reference(x4_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pipeline of diffusers with the networks of the same file."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("x4") / "folder"
    convert(open_model(x4_file).opened, folder)
    classes = {
        "vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "scheduler": "DDIMScheduler",
        "low_res_scheduler": "DDPMScheduler",
    }  # fmt: skip
    parts: dict[str, Any] = {
        name: getattr(diffusers, each).from_pretrained(folder, subfolder=name)
        for name, each in classes.items()
    }
    kind: Any = diffusers.StableDiffusionUpscalePipeline
    made = kind(**parts, text_encoder=None, tokenizer=None)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("level", [20, 300])
@torch.no_grad()
def test_parity_of_the_text_guided_upscaler(
    x4: StableDiffusion, reference: Any, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    size = (16, 12)
    fields: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "sampler": "ddim", "spacing": "leading", "steps": 5,
        "guidance": 4.0, "seed": 7, "init": picture(size),
    }  # fmt: skip
    start = torch.randn(1, 4, *size[::-1], generator=torch.Generator().manual_seed(5))
    low = small_noise(Request(), [7], (3, *size[::-1]))
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: low if shape[1] == 3 else start)
    theirs = reference(
        image=picture(size), num_inference_steps=5, guidance_scale=4.0, noise_level=level,
        prompt_embeds=x4.encode_prompt([PROMPT]).context, output_type="latent",
        negative_prompt_embeds=x4.encode_prompt([NEGATIVE]).context,
    ).images  # fmt: skip
    ours = generate(x4, Request(noise_level=level, start_noise=start, **fields))
    assert ours.images[0].size == (64, 48)
    assert distance(ours.latents, theirs) <= 1e-4
    other = generate(x4, Request(noise_level=level + 40, start_noise=start, **fields))
    assert distance(other.latents, theirs) > 1e-3


@torch.no_grad()
def test_parity_of_latent_diffusions_super_resolution(
    sr: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    path = tmp_path / "sr.safetensors"
    states = {name: part.state_dict() for name, part in random_parts(SR).items()}
    save_file(path, SR, states, torch.float32)
    convert(open_model(path).opened, tmp_path / "folder")
    kind: Any = diffusers.LDMSuperResolutionPipeline
    pipeline = kind.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    module = "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: start)
    drawn: list[Tensor] = []
    decode = pipeline.vqvae.decode
    monkeypatch.setattr(pipeline.vqvae, "decode", lambda z: (drawn.append(z), decode(z))[1])
    pipeline(image=to_tensor([picture()]), num_inference_steps=5, output_type="pt")
    own = load(tmp_path / "folder", device="cpu")
    for model in (sr, own):
        ours = generate(
            model,
            Request(init=picture(), sampler="ddim", spacing="leading", steps=5, start_noise=start, seed=0),
        )
        assert ours.images[0].size == (64, 64) and distance(ours.latents, drawn[0]) <= 1e-4


# What is shown


@pytest.mark.parametrize(
    ("given", "asked", "drawn"),
    [((16, 12), {}, (64, 48)), ((17, 13), {}, (64, 48)), ((40, 40), {}, (160, 160)),
     ((16, 8), {"width": 32}, (32, 16)), ((16, 8), {"width": 64, "height": 64}, (64, 64))],
)  # fmt: skip
def test_four_times_the_picture(
    x4: StableDiffusion, given: tuple[int, int], asked: dict[str, int], drawn: tuple[int, int]
) -> None:
    request = complete(x4, Request(prompt="a", init=picture(given), **asked, **STEPS))
    assert (request.width, request.height) == drawn
    assert (request.strength, request.noise_level, request.guidance) == (1, 20, 7.5)


def test_what_a_network_is_shown(
    x4: StableDiffusion, sr: StableDiffusion, seen: Callable[..., list[Conditioning]]
) -> None:
    small = to_tensor([picture()])
    for cond in seen(sr):
        assert cond.vector is None and cond.concat is not None and torch.equal(cond.concat, small)
    (first, *_) = seen(x4, prompt="a", noise_level=0, num_images=2)  # both branches in one pass
    assert first.concat is not None and first.vector is not None
    assert first.vector.tolist() == [0, 0, 0, 0] and not first.vector.is_floating_point()
    assert torch.equal(first.concat[:2], first.concat[2:])
    assert (first.concat - small).abs().max() < 0.06  # sqrt(1e-4) of noise
    noisy, *_ = seen(x4, prompt="a", noise_level=350)
    assert noisy.concat is not None and (noisy.concat - small).std() > 0.5


def test_the_small_pictures_noise_is_its_own(x4: StableDiffusion) -> None:
    own = small_noise(Request(), [3, 4], (3, 8, 8))
    assert own.shape == (2, 3, 8, 8) and torch.equal(own[1:], small_noise(Request(), [4], (3, 8, 8)))
    start = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert abs(torch.corrcoef(torch.stack([own[0].flatten(), start[:3].flatten()]))[0, 1]) < 0.25
    philox = small_noise(Request(noise_source="philox"), [3], (3, 8, 8))
    assert not torch.equal(own[:1], philox)
    inits = [picture(seed=1), picture(seed=2)]
    both = generate(x4, Request(prompt="a", init=inits, num_images=2, **STEPS)).latents
    for index, init in enumerate(inits):
        alone = generate(x4, Request(prompt="a", init=init, steps=3, seed=1 + index)).latents
        assert distance(both[index], alone[0]) <= 1e-4


def test_at_strength_1_nothing_is_encoded(x4: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> Tensor:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(x4, "encode_image", encode)
        generate(x4, Request(prompt="a", init=picture(), **STEPS))
        with pytest.raises(AssertionError):
            generate(x4, Request(prompt="a", init=picture(), strength=0.5, **STEPS))
    result = generate(x4, Request(prompt="a", init=picture(), strength=0, **STEPS))
    larger = picture().resize((64, 64), Image.Resampling.LANCZOS)
    torch.testing.assert_close(result.samples, x4.decode_latents(x4.encode_image(to_tensor([larger]))))


def test_windows_see_their_part_of_the_small_picture(
    x4: StableDiffusion, seen: Callable[..., list[Conditioning]]
) -> None:
    conds = seen(x4, prompt="a", init=picture((32, 16)), window=64, window_overlap=16)
    assert {tuple(cond.concat.shape[1:]) for cond in conds if cond.concat is not None} == {(3, 16, 16)}


# Latent diffusion's inpainting


def test_latent_diffusions_inpainting(seen: Callable[..., list[Conditioning]]) -> None:
    """As its scripts/inpaint.py: the picture black where it is masked, then the mask, both in -1..1."""
    config = replace(SR, unet=replace(PLAIN, in_channels=7), concat="inpaints_black")
    model = StableDiffusion(config, random_parts(config))
    values = np.zeros((64, 64), dtype=np.uint8)
    values[10:37, 21:50] = 255
    init, mask = picture((64, 64)), Image.fromarray(values)
    first, *_ = seen(model, init=init, mask=mask)
    assert first.concat is not None and first.concat.shape == (1, 4, 16, 16) and first.vector is None
    whole = torch.from_numpy(values / 255).float()[None, None]
    black = (to_tensor([init]) + 1) / 2 * (1 - whole) * 2 - 1
    torch.testing.assert_close(first.concat[:, :3], model.encode_image(black))
    assert torch.equal(first.concat[:, 3:], whole[..., ::4, ::4] * 2 - 1)
    result = generate(model, Request(init=init, mask=mask, **STEPS)).images[0]
    assert np.array_equal(np.array(result)[values == 0], np.array(init)[values == 0])
    assert not np.array_equal(np.array(result), np.array(init))


# On the command line, and errors


def test_on_the_command_line(x4_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture().save("small.png")
    words = ["generate", "a red apple", "--model", str(x4_file), "--init", "small.png"]
    assert main([*words, "--steps", "2", "--seed", "1", "--noise-level", "5", "-o", "large.png"]) == 0
    with Image.open("large.png") as drawn:
        assert drawn.size == (64, 64)
    values = read(tmp_path / "large.png").values
    assert (values["noise_level"], values["width"], values["strength"]) == (5, 64, 1)
    words = ["replay", "large.png", "--model", str(x4_file), "--init", "small.png"]
    assert main([*words, "-o", "again.png"]) == 0
    with Image.open("large.png") as first, Image.open("again.png") as second:
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": Image.new("L", (16, 16), 255)}, "enlarges whole pictures; mask is asked for"),
        ({"region": (0, 0, 8, 8)}, "region is asked for"),
        ({"outpaint_left": 16}, "is asked for"),
        ({"label": 3}, "has labels: none"),
        ({"init": None}, "needs a picture to start from: 3 more channels"),
        ({"image_guidance": 2}, "does not read it"),
    ],
)
def test_what_does_not_fit_is_told(x4: StableDiffusion, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(x4, Request(**{"prompt": "a", "init": picture(), **STEPS, **fields}))


def test_noise_levels_that_are_not_known(
    x4: StableDiffusion, sr: StableDiffusion, tiny_model: StableDiffusion
) -> None:
    for model in (sr, tiny_model):
        with pytest.raises(InputError, match=r"noise_level is 7; .* does not read it"):
            complete(model, Request(init=picture(), noise_level=7))
    with pytest.raises(ValidationError, match="noise_level"):
        Request(noise_level=351)
    unet = X4.unet
    assert unet is not None
    few = StableDiffusion(replace(X4, unet=replace(unet, num_classes=10)), random_parts(X4))
    with pytest.raises(InputError, match="knows 0 to 9"):
        complete(few, Request(prompt="a", init=picture(), noise_level=10))
    assert complete(few, Request(prompt="a", init=picture())).noise_level == 9


def test_a_config_may_say_what_is_shown() -> None:
    with pytest.raises(InputError, match="concat is 'enlarge'"):
        replace(SR, concat="enlarge")
    assert ModelConfig.from_json(SR.to_json()) == SR

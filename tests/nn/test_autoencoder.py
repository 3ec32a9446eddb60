"""The autoencoder against diffusers and against recorded answers of latent diffusion's own code."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as DiffusersAutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL, Decoder, DiagonalGaussian, Encoder

FIXTURES = Path(__file__).parent / "fixtures"
ENTRIES = json.loads((FIXTURES / "ldm_autoencoder.json").read_text(encoding="utf-8"))
OUTPUTS = load_file(FIXTURES / "ldm_autoencoder.safetensors")
RULES = runpy.run_path(str(FIXTURES / "make_ldm_unet.py"))
TINY = AutoencoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, resolution=16, embed_dim=3)


def seeded(name: str, *shape: int) -> Tensor:
    """Float32 values that depend on the name and the shape alone, with unit variance."""
    return RULES["seeded"](name, shape)


def load_seeded(network: nn.Module) -> dict[str, Tensor]:
    """Give a network weights that depend on their names alone, none of them zero; the state loaded."""
    state = {name: RULES["seeded_weight"](name, tuple(v.shape)) for name, v in network.state_dict().items()}
    network.load_state_dict(state)
    return state


def diffusers_key(name: str, num_levels: int) -> str:
    """The name of a weight in diffusers."""
    name = re.sub(r"up\.(\d+)\.", lambda match: f"up_blocks.{num_levels - 1 - int(match[1])}.", name)
    for pattern, replacement in (
        (r"down\.(\d+)\.", r"down_blocks.\1."),
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"mid\.block_(\d)", lambda match: f"mid_block.resnets.{int(match[1]) - 1}"),
        (r"mid\.attn_1", "mid_block.attentions.0"),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
        ("nin_shortcut", "conv_shortcut"),
        ("norm_out", "conv_norm_out"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def reference(config: AutoencoderConfig, state: dict[str, Tensor]) -> Any:
    """diffusers' autoencoder with the same weights; attention at every level, or in the middle alone."""
    prefix = "Attn" if config.attn_resolutions else ""
    levels = len(config.ch_mult)
    options: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": (f"{prefix}DownEncoderBlock2D",) * levels,
        "up_block_types": (f"{prefix}UpDecoderBlock2D",) * levels,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.num_groups,
        "mid_block_add_attention": config.attn_type == "vanilla",
    }
    model = DiffusersAutoencoderKL(**options)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    renamed = {diffusers_key(name, levels): value for name, value in state.items()}
    assert renamed.keys() == shapes.keys()
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in renamed.items()})
    return model.eval()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (16, 24)),
        ({"num_res_blocks": 2, "ch_mult": (1, 2, 2)}, (20, 12)),
        ({"ch_mult": (1, 3, 2), "in_channels": 1, "out_ch": 2}, (8, 28)),
        ({"ch_mult": (1,), "z_channels": 5, "embed_dim": 5}, (7, 9)),
        ({"attn_resolutions": (16, 8), "num_res_blocks": 2}, (12, 10)),
        ({"attn_resolutions": (16, 8, 4), "ch_mult": (1, 3, 2)}, (12, 20)),
        ({"attn_type": "none"}, (10, 14)),
        ({"ch_mult": (1, 1, 2, 2)}, (15, 33)),  # odd sides, of which pixels are lost
    ],
)
def test_equal_to_diffusers(options: dict[str, Any], size: tuple[int, int]) -> None:
    tiny: dict[str, Any] = {
        "ch": 8,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "num_groups": 4,
        "resolution": 16,
    }
    config = AutoencoderConfig(**(tiny | options))
    model = AutoencoderKL(config).eval()
    other = reference(config, load_seeded(model))
    x = seeded("x", 2, config.in_channels, *size)
    with torch.no_grad():
        posterior = model.encode(x)
        theirs = other.encode(x).latent_dist
        z = posterior.mode()
        pictures, reconstruction = model.decode(z), other.decode(z).sample
    assert z.shape[2:] == tuple(side // model.downsampling for side in size)
    torch.testing.assert_close(z, theirs.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, theirs.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior.kl(), theirs.kl(), rtol=1e-5, atol=0)
    torch.testing.assert_close(pictures, reconstruction, rtol=0, atol=1e-5)
    assert 0.1 < pictures.std() < 10


@pytest.mark.parametrize("index", range(len(ENTRIES)))
def test_equal_to_latent_diffusion(index: int) -> None:
    entry = ENTRIES[index]
    config = AutoencoderConfig(**entry["config"])
    encoder, decoder = Encoder(config).eval(), Decoder(config).eval()
    for part, network in (("encoder", encoder), ("decoder", decoder)):
        lines = RULES["key_lines"](load_seeded(network))
        assert lines == entry.get(f"{part}_keys", lines)
        assert RULES["digest"](lines) == entry[part]
    height, width = entry["size"]
    factor = config.downsampling
    with torch.no_grad():
        moments = encoder.double()(
            seeded("x", 2, config.in_channels, factor * height, factor * width).double()
        )
        decoded = decoder.double()(seeded("z", 2, config.z_channels, height, width).double())
    torch.testing.assert_close(moments.float(), OUTPUTS[f"{index}.moments"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(decoded[:1, :4].float(), OUTPUTS[f"{index}.decoded"], rtol=1e-6, atol=1e-7)
    assert decoded.shape == (
        2,
        32 * config.ch_mult[0] if config.give_pre_end else config.out_ch,
        *decoded.shape[2:],
    )
    if config.double_z:
        kl = DiagonalGaussian.from_moments(moments).kl()
        torch.testing.assert_close(kl.float(), OUTPUTS[f"{index}.kl"], rtol=1e-6, atol=0)


def test_fixture_covers_every_option() -> None:
    configs = [entry["config"] for entry in ENTRIES]
    assert len(configs) >= 30
    for name in ("double_z", "resamp_with_conv", "tanh_out", "give_pre_end"):
        for attention in ("vanilla", "linear", "none"):
            seen = {config[name] for config in configs if config["attn_type"] == attention}
            assert seen == {False, True}, (name, attention)
    assert sum(bool(config["attn_resolutions"]) for config in configs) >= 20


def test_stable_diffusion_has_83653863_parameters() -> None:
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert model.downsampling == 8
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "encoder", "decoder", "quant_conv", "post_quant_conv",
    }  # fmt: skip


@pytest.mark.parametrize("attn_type", ["vanilla", "linear"])
def test_trains_in_bfloat16_and_channels_last(attn_type: str) -> None:
    config = AutoencoderConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, resolution=16, embed_dim=3,
        attn_resolutions=(16,), attn_type=attn_type,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    model = AutoencoderKL(config)
    load_seeded(model)
    x = seeded("x", 2, 3, 16, 12).clamp(-1, 1)
    model.double()
    with torch.no_grad():
        exact = model.decode(model.encode(x.double()).mode())
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(x.double()).mode()), exact)
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = model.encode(x)
        reconstruction = model.decode(posterior.mode())
    assert reconstruction.dtype == torch.bfloat16 and posterior.kl().dtype == torch.float32
    # Linear attention over noise varies little, and the norm after it magnifies that, rounding and all.
    assert (reconstruction - exact).norm() < 0.25 * exact.norm()
    ((reconstruction.float() - x).abs().mean() + posterior.kl().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_learns_one_batch() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(TINY)
    x = nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size=(16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        reconstruction, posterior = model(x, torch.Generator().manual_seed(1))
        loss = (reconstruction - x).abs().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


def test_gaussian_samples_follow_the_generator_and_the_moments() -> None:
    mean, logvar = torch.full((2, 1, 100, 100), 3.0), torch.full((2, 1, 100, 100), -2.0)
    gaussian = DiagonalGaussian(mean, logvar)
    first = gaussian.sample(torch.Generator().manual_seed(5))
    assert torch.equal(first, gaussian.sample(torch.Generator().manual_seed(5)))
    assert not torch.equal(first, gaussian.sample(torch.Generator().manual_seed(6)))
    state = torch.get_rng_state()
    gaussian.sample(torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(first, gaussian.sample(None))
    assert abs(first.mean().item() - 3) < 0.02
    assert abs(first.std().item() - torch.tensor(-1.0).exp().item()) < 0.01
    assert torch.equal(gaussian.mode(), mean)


def test_divergence_of_gaussians() -> None:
    normal = DiagonalGaussian(torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 5))
    assert torch.equal(normal.kl(), torch.zeros(3))
    mean, logvar = torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    one = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    other = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(other, one).sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


def test_log_variance_is_clamped() -> None:
    moments = torch.tensor([1.0, 2.0, -1e4, 1e4]).reshape(1, 4, 1, 1)
    gaussian = DiagonalGaussian.from_moments(moments)
    assert gaussian.logvar.flatten().tolist() == [-30.0, 20.0]
    assert gaussian.std.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_type": "linaer"}, "linear"),
        ({"ch": 100}, "num_groups"),
        ({"ch_mult": ()}, "ch_mult"),
        ({"dropout": 1.0}, "dropout"),
        ({"z_channels": 0}, "z_channels"),
    ],
)
def test_unfit_configs_say_why(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        AutoencoderConfig(**options)


def test_autoencoder_needs_both_moments() -> None:
    with pytest.raises(InputError, match="double_z"):
        AutoencoderKL(AutoencoderConfig(double_z=False))


def test_lists_and_tuples_make_equal_configs() -> None:
    config = AutoencoderConfig(ch_mult=[1, 2], attn_resolutions=[8])  # pyright: ignore[reportArgumentType]
    assert config == AutoencoderConfig(ch_mult=(1, 2), attn_resolutions=(8,))
    assert hash(config) == hash(AutoencoderConfig(ch_mult=(1, 2), attn_resolutions=(8,)))

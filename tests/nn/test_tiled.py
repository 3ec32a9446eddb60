"""Autoencoders in bands and in tiles against themselves on the whole picture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.nn import rows as bands
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.rows import statistics, store, stored
from sfumato.nn.seamless import seamless
from sfumato.nn.tiled import decode_tiled, encode_tiled
from sfumato.nn.tiles import Tiling, in_tiles
from sfumato.nn.vq import VQModel

SMALL = AutoencoderConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, num_groups=4, resolution=32)
OTHERS = {
    "attention in the levels": AutoencoderConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, resolution=32, attn_resolutions=(16,)
    ),
    "pooling, linear attention, tanh": AutoencoderConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, resamp_with_conv=False, attn_type="linear",
        tanh_out=True,
    ),
    "before the end": AutoencoderConfig(
        ch=8, ch_mult=(1, 1), num_res_blocks=1, num_groups=4, give_pre_end=True, attn_type="none"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bands, "BAND", 8 * 48 * 5)  # five rows of the largest maps here
    yield


def random_model(config: AutoencoderConfig = SMALL) -> AutoencoderKL | VQModel:
    torch.manual_seed(1)
    model = AutoencoderKL(config) if config.n_embed is None else VQModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))  # scales and shifts that are not 1 and 0
    return model.eval()


def decibels(given: Tensor, wanted: Tensor) -> float:
    """Peak signal over noise, of pictures in -1..1."""
    return float(10 * torch.log10(4 / (given - wanted).square().mean().clamp_min(1e-30)))


@pytest.mark.parametrize("size", [(12, 9), (5, 12), (1, 1)])
@torch.no_grad()
def test_exact_decoding_is_the_whole_decoder(size: tuple[int, int]) -> None:
    model, z = random_model(), torch.randn(2, 4, *size)
    kept = z.clone()
    whole, given = model.decode(z), decode_tiled(model, z)
    assert torch.equal(z, kept)
    assert given.shape == whole.shape
    assert (given - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_exact_decoding_of_other_shapes(name: str) -> None:
    model = random_model(OTHERS[name])
    z = torch.randn(1, 4, 12, 9)
    whole = model.decode(z)
    assert (decode_tiled(model, z) - whole).abs().max() <= 1e-5 * whole.abs().max()
    x = torch.randn(1, 3, 24, 18)
    moments = model.encode(x).mode()
    assert (encode_tiled(model, x).mode() - moments).abs().max() <= 1e-5 * moments.abs().max()


@torch.no_grad()
def test_exact_encoding_is_the_whole_encoder() -> None:
    model, x = random_model(), torch.randn(2, 3, 48, 36)
    kept = x.clone()
    whole, given = model.encode(x), encode_tiled(model, x)
    assert torch.equal(x, kept)
    for one, other in ((given.mean, whole.mean), (given.std, whole.std)):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@torch.no_grad()
def test_half_precision_stays_half_precision_and_near() -> None:
    model, z = random_model(), torch.randn(1, 4, 12, 9)
    wanted = model.decode(z)
    given = decode_tiled(model.bfloat16(), z.bfloat16())
    assert given.dtype == torch.bfloat16
    assert decibels(given.float(), wanted) > 25


@torch.no_grad()
def test_a_codebook_is_asked_first() -> None:
    config = AutoencoderConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, double_z=False, n_embed=16
    )
    model, z = random_model(config), torch.randn(1, 4, 10, 6)
    assert torch.allclose(decode_tiled(model, z), model.decode(z), atol=1e-5)
    x = torch.randn(1, 3, 20, 12)
    assert torch.allclose(encode_tiled(model, x).mode(), model.encode(x).mode(), atol=1e-5)


@pytest.mark.parametrize("wrap", [(False, True), (True, False), (True, True)])
@torch.no_grad()
def test_exact_decoding_goes_around_as_seamless_does(wrap: tuple[bool, bool]) -> None:
    model, z, x = random_model(), torch.randn(1, 4, 12, 8), torch.randn(1, 3, 40, 32)
    with seamless(model, y=wrap[0], x=wrap[1]):
        whole, latents = model.decode(z), model.encode(x).mode()
    given = decode_tiled(model, z, wrap=wrap)
    assert (given - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert (given - model.decode(z)).abs().max() > 1e-3
    assert (encode_tiled(model, x, wrap=wrap).mode() - latents).abs().max() <= 1e-5 * latents.abs().max()


@torch.no_grad()
def test_fast_tiles_are_near_and_without_an_edge() -> None:
    """Their statistics are their own, so that they are near the whole picture and not equal to it."""
    model = random_model()
    ramp = torch.linspace(-1, 1, 32).expand(1, 4, 24, 32) + 0.1 * torch.randn(1, 4, 24, 32)
    whole = model.decode(ramp)
    given = decode_tiled(model, ramp, "fast", tile=12, overlap=8)
    assert given.shape == whole.shape
    assert decibels(given, whole) > 15
    steps = (given[..., 1:] - given[..., :-1]).abs().mean(dim=(0, 1, 2))
    around_the_seam = steps[12 * 4 - 2 : 12 * 4 + 2].max()
    assert around_the_seam < 2 * steps.median()
    x = torch.randn(1, 3, 96, 64)
    latents = encode_tiled(model, x, "fast", tile=12, overlap=4).mode()
    assert latents.shape == (1, 4, 24, 16)


def test_statistics_of_bands_are_those_of_the_map() -> None:
    values = torch.randn(2, 8, 37, 11) + 1000
    mean, variance = statistics(stored(values), 4)
    grouped = values.double().reshape(2, 4, -1)
    assert torch.allclose(mean.double(), grouped.mean(-1), rtol=1e-6)
    assert torch.allclose(variance.double(), grouped.var(-1, correction=0), rtol=1e-4)


def test_storing_in_place_reads_what_was_there() -> None:
    values = torch.randn(1, 1, 40, 48 * 8)
    conv = nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        wanted = conv(values)
        store(bands.convolved(stored(values), conv), values)
    assert torch.allclose(values, wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 33), (7, 70), (16, 16), (1, 1), (24, 25)])
def test_tiles_with_context_are_the_whole(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)))  # sees 4 pixels far
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        wanted = layers(x)
        given = in_tiles(layers, x, Tiling(10, 8))
        assert torch.allclose(given, wanted, atol=1e-6)
        if min(size) > 20:
            assert not torch.allclose(in_tiles(layers, x, Tiling(10, 2)), wanted, atol=1e-4)


def test_a_constant_stays_one_under_fading() -> None:
    made = in_tiles(lambda part: torch.ones_like(part), torch.zeros(1, 1, 50, 47), Tiling(10, 6))
    assert torch.allclose(made, torch.ones(1, 1, 50, 47))


def test_what_cannot_be_tiled_is_refused() -> None:
    model = random_model()
    with pytest.raises(InputError, match="no way 'exakt'"):
        decode_tiled(model, torch.zeros(1, 4, 2, 2), "exakt")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="multiples of 4"):
        encode_tiled(model, torch.zeros(1, 3, 6, 8))
    with pytest.raises(InputError, match="multiple of 4"):
        Tiling(10, 4, 4)
    with pytest.raises(InputError, match="the overlap is 12, more"):
        Tiling(8, 12)

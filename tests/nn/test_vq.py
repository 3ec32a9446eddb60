"""The codebook and its autoencoder against diffusers, and latent diffusion's rule of quantising on decode."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel as DiffusersVQModel
from torch import Tensor

from sfumato.errors import InputError
from sfumato.nn import vq
from sfumato.nn.autoencoder import AutoencoderConfig, AutoencoderKL
from sfumato.nn.vq import Latents, VectorQuantizer, VQModel

HELPERS = runpy.run_path(str(Path(__file__).parent / "test_autoencoder.py"))
TINY: dict[str, Any] = {
    "ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4, "resolution": 16, "z_channels": 3,
    "embed_dim": 3, "double_z": False, "n_embed": 50,
}  # fmt: skip


def model_of(**options: Any) -> tuple[VQModel, dict[str, Tensor]]:
    """A tiny model whose weights depend on their names, and its state."""
    model = VQModel(AutoencoderConfig(**(TINY | options))).eval()
    return model, HELPERS["load_seeded"](model)


def reference(config: AutoencoderConfig, state: dict[str, Tensor]) -> Any:
    """diffusers' model with the same weights."""
    levels = len(config.ch_mult)
    model = DiffusersVQModel(
        in_channels=config.in_channels,
        out_channels=config.out_ch,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        num_vq_embeddings=config.n_embed or 0,
        vq_embed_dim=config.embed_dim,
        norm_num_groups=config.num_groups,
        mid_block_add_attention=config.attn_type == "vanilla",
    )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    renamed = {HELPERS["diffusers_key"](name, levels): value for name, value in state.items()}
    assert renamed.keys() == shapes.keys()
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in renamed.items()})
    return model.eval()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (16, 24)),
        ({"ch_mult": (1, 2, 2), "embed_dim": 5, "n_embed": 7}, (20, 12)),
        ({"attn_type": "none", "num_res_blocks": 2}, (12, 8)),
    ],
)
def test_equal_to_diffusers(options: dict[str, Any], size: tuple[int, int]) -> None:
    model, state = model_of(**options)
    other = reference(model.config, state)
    x = HELPERS["seeded"]("x", 2, 3, *size)
    with torch.no_grad():
        latents = model.encode(x).mode()
        theirs = other.encode(x).latents
        torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-5)
        codes, _, (_, _, indices) = other.quantize(theirs)
        torch.testing.assert_close(model.quantize(theirs), codes, rtol=0, atol=1e-5)
        assert torch.equal(model.quantize.indices(theirs).flatten(), indices)
        assert len(indices.unique()) > 3
        torch.testing.assert_close(model.decode(theirs), other.decode(theirs).sample, rtol=0, atol=1e-5)
        free = other.decode(theirs, force_not_quantize=True).sample
        torch.testing.assert_close(model.decode(theirs, quantise=False), free, rtol=0, atol=1e-5)
        pictures, before = model(x)
        torch.testing.assert_close(pictures, other(x).sample, rtol=0, atol=1e-5)
        assert torch.equal(before.mode(), latents) and (model.decode(theirs) - free).abs().max() > 1e-3


def test_names_are_those_of_latent_diffusion() -> None:
    ours = set(model_of()[0].state_dict())
    shape = AutoencoderConfig(**(TINY | {"double_z": True, "n_embed": None}))
    assert ours == {*AutoencoderKL(shape).state_dict(), "quantize.embedding.weight"}


def test_the_nearest_entry_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    book, z = VectorQuantizer(37, 4), torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(book.embedding.weight, generator=torch.Generator().manual_seed(1))
    entries = book.embedding.weight.detach().double()
    distances = (z.double()[:, None] - entries[None, :, :, None, None]).square().sum(2)  # (b, 37, h, w)
    expected = distances.argmin(dim=1)
    assert torch.equal(book.indices(z), expected)
    monkeypatch.setattr(vq, "SCORES", 100)  # two places at once
    assert torch.equal(book.indices(z), expected)
    codes = book(z)
    assert codes.shape == z.shape and torch.equal(codes, book.lookup(expected))
    assert torch.equal(book.indices(codes), expected) and torch.equal(
        codes[1, :, 4, 0], entries[expected[1, 4, 0]].float()
    )


def test_half_precision_finds_the_entry_that_float32_finds() -> None:
    book = VectorQuantizer(4096, 3)
    torch.nn.init.uniform_(book.embedding.weight, -1, 1, generator=torch.Generator().manual_seed(0))
    book.bfloat16()
    z = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = book.indices(z)
    assert torch.equal(found, book.float().indices(z.float()))
    assert book.bfloat16()(z).dtype == torch.bfloat16


def test_indices_are_pictures_too() -> None:
    model, _ = model_of()
    with torch.no_grad():
        z = model.encode(HELPERS["seeded"]("x", 1, 3, 8, 8)).mode()
        indices = model.quantize.indices(z)
        assert indices.shape == (1, 4, 4) and indices.dtype == torch.long
        torch.testing.assert_close(model.decode_indices(indices), model.decode(z))


def test_latents_stand_where_a_gaussian_could() -> None:
    latents = Latents(torch.randn(2, 3, 4, 4))
    generator = torch.Generator().manual_seed(3)
    assert latents.sample(generator) is latents.mode() is latents.mean and not latents.std.any()
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_a_codebook_and_a_gaussian_exclude_each_other() -> None:
    with pytest.raises(InputError, match="n_embed is 8 with double_z = True"):
        AutoencoderConfig(n_embed=8)
    with pytest.raises(InputError, match="n_embed is 0"):
        AutoencoderConfig(n_embed=0, double_z=False)
    with pytest.raises(InputError, match="VQModel needs n_embed"):
        VQModel(AutoencoderConfig())

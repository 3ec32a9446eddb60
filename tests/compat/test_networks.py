"""The original's network classes: constructors, results and names on disk."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from sfumato.compat.ldm import (
    AutoencoderKL,
    Decoder,
    DiagonalGaussianDistribution,
    Encoder,
    UNetModel,
    VQModel,
    VQModelInterface,
)
from sfumato.compat.networks import view
from sfumato.errors import InputError
from sfumato.nn import autoencoder
from sfumato.nn.unet import UNet

DDCONFIG = {
    "double_z": True, "z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0, "num_groups": 8,
}  # fmt: skip
VQ_DDCONFIG = {**DDCONFIG, "double_z": False}
UNET = {
    "image_size": 8, "in_channels": 2, "out_channels": 2, "model_channels": 16, "attention_resolutions": [2],
    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
    "transformer_depth": 1, "context_dim": 12, "use_checkpoint": True, "legacy": False, "num_groups": 8,
}  # fmt: skip


@pytest.fixture
def moments() -> Tensor:
    return torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))


def normal(posterior: DiagonalGaussianDistribution) -> Independent:
    return Independent(Normal(posterior.mean, posterior.std), 3)


def test_gaussian_in_torchs_own_words(moments: Tensor) -> None:
    posterior, other = DiagonalGaussianDistribution(moments), DiagonalGaussianDistribution(moments.flip(0))
    assert torch.equal(posterior.mode(), moments[:, :3]) and posterior.parameters is moments
    torch.testing.assert_close(posterior.var, posterior.std**2)
    standard = Independent(Normal(torch.zeros(2, 3, 4, 4), 1.0), 3)
    torch.testing.assert_close(posterior.kl(), kl_divergence(normal(posterior), standard))
    torch.testing.assert_close(posterior.kl(other), kl_divergence(normal(posterior), normal(other)))
    sample = posterior.sample()
    torch.testing.assert_close(posterior.nll(sample), -normal(posterior).log_prob(sample))
    assert posterior.nll(sample, dims=(2, 3)).shape == (2, 3)


def test_gaussian_draws_the_originals_noise(moments: Tensor) -> None:
    posterior = DiagonalGaussianDistribution(moments)
    torch.manual_seed(1)
    wanted = posterior.mean + posterior.std * torch.randn(2, 3, 4, 4)
    torch.manual_seed(1)
    assert torch.equal(posterior.sample(), wanted)
    drawn = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_gaussian_clamps_and_can_be_deterministic(moments: Tensor) -> None:
    assert DiagonalGaussianDistribution(moments * 1e6).logvar.abs().max() == 30
    fixed = DiagonalGaussianDistribution(moments, deterministic=True)
    assert torch.equal(fixed.sample(), fixed.mean) and float(fixed.kl()) == float(fixed.nll(moments)) == 0
    assert float(fixed.std.abs().max()) == float(fixed.var.abs().max()) == 0


@pytest.mark.parametrize("shape", [(2, 16, 12, 3), (2, 16, 12)])
def test_get_input(shape: tuple[int, ...]) -> None:
    pictures = torch.arange(math.prod(shape)).reshape(shape).to(torch.uint8)
    given = AutoencoderKL(DDCONFIG, embed_dim=2).get_input({"image": pictures}, "image")
    wanted = pictures.permute(0, 3, 1, 2) if len(shape) == 4 else pictures[:, None]
    assert given.dtype == torch.float32 and given.is_contiguous()
    assert torch.equal(given, wanted.float())
    assert torch.equal(VQModel(VQ_DDCONFIG, None, 5, 2).get_input({"x": pictures}, "x"), given)


def test_autoencoder_is_ours_under_the_originals_constructor() -> None:
    model = AutoencoderKL(ddconfig=DDCONFIG, lossconfig={"target": "torch.nn.Identity"}, embed_dim=4).eval()
    x = torch.randn(1, 3, 16, 16)
    posterior = model.encode(x)
    assert isinstance(posterior, DiagonalGaussianDistribution) and posterior.mean.shape == (1, 4, 8, 8)
    own = autoencoder.AutoencoderKL(model.config)
    own.load_state_dict(model.state_dict())
    assert torch.equal(own.encode(x).mean, posterior.mean)
    given, same = model(x, sample_posterior=False)
    torch.testing.assert_close(given, own.decode(posterior.mode()))
    torch.manual_seed(0)
    sampled, _ = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(sampled, model.decode(same.sample()))


def test_encoder_and_decoder_by_ddconfig() -> None:
    encoder, decoder = Encoder(**DDCONFIG), Decoder(**DDCONFIG)
    assert encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    assert decoder(torch.zeros(1, 2, 8, 8)).shape == (1, 3, 16, 16)
    assert decoder.z_shape == (1, 2, 8, 8)
    kl = AutoencoderKL(DDCONFIG, embed_dim=2)
    assert encoder.state_dict().keys() == kl.encoder.state_dict().keys()
    default = {name: value for name, value in DDCONFIG.items() if name != "ch_mult"}
    assert len(Encoder(**default).down) == 4  # the original's default is (1, 2, 4, 8)
    assert "to_qkv" in " ".join(Encoder(**DDCONFIG, use_linear_attn=True).state_dict())


def test_ddconfig_is_read_in_full() -> None:
    with pytest.raises(InputError, match=r"no 'ch_mul'(.|\n)*'ch_mult'"):
        Encoder(**DDCONFIG, ch_mul=[1])
    with pytest.raises(InputError, match="lacks z_channels"):
        Encoder(**{name: value for name, value in DDCONFIG.items() if name != "z_channels"})


def test_quantised_autoencoder() -> None:
    model = VQModel(ddconfig=VQ_DDCONFIG, n_embed=7, embed_dim=2)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    x = torch.randn(2, 3, 16, 16)
    latents = model.encode_to_prequant(x)
    quant, loss, (_, _, indices) = model.encode(x)
    codes = model.quantize.embedding.weight
    distance = (latents.movedim(1, -1).reshape(-1, 1, 2) - codes).square().sum(-1)
    assert torch.equal(indices, distance.argmin(dim=1))
    torch.testing.assert_close(quant, codes[indices].reshape(2, 8, 8, 2).movedim(-1, 1))
    torch.testing.assert_close(loss, 1.25 * (quant - latents).square().mean())
    decoded, same_loss = model(x)
    torch.testing.assert_close(decoded, model.decode(quant))
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(model.decode_code(indices.reshape(2, 8, 8)), model.decode(quant))
    # Straight through: the encoder is given the decoder's gradient.
    quant.sum().backward()
    assert model.quant_conv.bias is not None
    torch.testing.assert_close(model.quant_conv.bias.grad, torch.full((2,), 128.0))


def test_interface_quantises_on_decoding() -> None:
    model = view(VQModel(ddconfig=VQ_DDCONFIG, n_embed=7, embed_dim=2), VQModelInterface)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    x = torch.randn(1, 3, 16, 16)
    latents = model.encode(x)
    quantised = view(model, VQModel).encode(x)[0]
    # The straight-through z + (entry - z) rounds otherwise than the entry itself.
    torch.testing.assert_close(
        model.decode(latents), model.decode(quantised, force_not_quantize=True), rtol=1e-3, atol=1e-4
    )
    assert not torch.allclose(model.decode(latents), model.decode(latents, force_not_quantize=True))
    torch.testing.assert_close(model(x), model.decode(latents))


def test_unet_by_the_originals_options() -> None:
    model = UNetModel(**UNET).eval()
    own = UNet(model.config).eval()
    own.load_state_dict(model.state_dict())
    x, t, context = torch.randn(2, 2, 8, 8), torch.tensor([5, 900]), torch.randn(2, 3, 12)
    assert torch.equal(model(x, timesteps=t, context=context), own(x, t, context))
    assert (model.image_size, model.in_channels, model.out_channels, model.model_channels) == (8, 2, 2, 16)
    assert model.gradient_checkpointing and model.dtype == torch.float32 and model.num_classes is None
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    model.convert_to_fp32()
    assert model.dtype == torch.float32


def test_unet_with_classes_and_without_transformer() -> None:
    plain = {**UNET, "use_spatial_transformer": False, "context_dim": None, "legacy": True, "num_heads": 4}
    model = UNetModel(**plain, num_classes=3, use_fp16=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([5, 900])
    first, second = (model(x, t, y=torch.tensor([label, 0])) for label in (1, 2))
    assert not torch.allclose(first[0], second[0]) and torch.allclose(first[1], second[1])


def test_unet_without_self_attention_in_a_level() -> None:
    model = UNetModel(**UNET, disable_self_attentions=[True, False])
    assert model.config.disable_self_attentions == (True, False)


def test_unet_of_the_xl_configuration() -> None:
    options = {**UNET, "transformer_depth": [1, 2], "context_dim": [12, 12], "num_classes": "sequential"}
    model = UNetModel(**options, adm_in_channels=5, use_linear_in_transformer=True)
    assert model.config.transformer_depth == (1, 2) and model.config.context_dim == 12
    assert model(torch.zeros(1, 2, 8, 8), torch.tensor([1]), torch.zeros(1, 3, 12), torch.zeros(1, 5)).shape


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_embed", 512),
        ("num_attention_blocks", [1, 1]),
        ("disable_middle_self_attn", True),
        ("num_classes", "many"),
        ("context_dim", [12, 13]),
    ],
)
def test_options_that_have_no_place(option: str, value: object) -> None:
    with pytest.raises(InputError, match=option):
        UNetModel(**{**UNET, option: value})


def test_a_view_is_the_same_module() -> None:
    unet = UNet(UNetModel(**UNET).config)
    seen = view(unet, UNetModel)
    assert next(seen.parameters()) is next(unet.parameters()) and seen.image_size is None
    seen.half().eval()
    assert next(unet.parameters()).dtype == torch.float16 and not unet.training
    calls: list[int] = []
    unet.time_embed.register_forward_hook(lambda *_: calls.append(1))
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float16)
    seen(x, torch.tensor([1]), torch.zeros(1, 3, 12, dtype=torch.float16))
    assert calls == [1]

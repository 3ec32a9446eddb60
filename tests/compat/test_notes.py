"""The notes' own class names, against the formulas that the notes print."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from sfumato.compat import notes
from sfumato.errors import InputError

# The notes' configuration file, but for the width and the size of the picture.
CONFIG = {
    "channel": 1, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [1], "dropout": 0.0,
    "channel_mult": [1, 2], "conv_resample": True, "dims": 2, "num_classes": 0, "num_heads": 8,
    "num_head_channels": -1, "use_scale_shift_norm": False, "resblock_updown": True, "transformer_depth": 1,
    "context_dim": None, "n_embed": 1,
}  # fmt: skip


def predict(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
    """A network that depends on everything that it is given."""
    shift = 0.0 if context is None else context.mean()
    return torch.tanh(x * 0.8) + 0.01 * t.reshape(-1, 1, 1, 1) / 10 + shift


def test_unet_by_the_notes_keys() -> None:
    model = notes.UNetModel(**CONFIG)
    assert model.config.out_channels == 1 and model.config.num_classes is None
    assert model.config.context_dim is None and model.config.use_spatial_transformer
    assert model(torch.zeros(2, 1, 8, 8), torch.tensor([0, 199])).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match="one must be positive"):
        notes.UNetModel(**{**CONFIG, "num_heads": -1})


def test_attention_without_a_context_attends_to_the_picture() -> None:
    layer = notes.CrossAttention(query_dim=6, heads=2, dim_head=4).eval()
    x = torch.randn(2, 5, 6)
    q, k, v = (
        project(x).reshape(2, 5, 2, 4).transpose(1, 2) for project in (layer.to_q, layer.to_k, layer.to_v)
    )
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(layer(x), layer.to_out((weights @ v).transpose(1, 2).reshape(2, 5, 8)))
    assert notes.CrossAttention(6, 3)(x, torch.randn(2, 7, 3)).shape == x.shape
    assert "to_out.0.weight" in notes.CrossAttention(6, dropout=0.1).state_dict()


def test_transformer_blocks() -> None:
    x, context = torch.randn(2, 64, 4, 4), torch.randn(2, 3, 5)
    assert notes.SpatialTransformer(64, 2, 32, depth=2, context_dim=5)(x, context).shape == x.shape
    assert notes.SpatialTransformer(64, 2, 32)(x).shape == x.shape
    block = notes.BasicTransformerBlock(8, 2, 4, context_dim=5)
    assert block(torch.randn(2, 6, 8), context).shape == (2, 6, 8)
    with pytest.raises(InputError, match=r"dropout is 0\.1"):
        notes.SpatialTransformer(64, 2, 32, dropout=0.1)
    with pytest.raises(InputError, match="gated_ff"):
        notes.BasicTransformerBlock(8, 2, 4, gated_ff=False)


def test_residual_block_is_told_the_timestep() -> None:
    block = notes.ResBlock(32, 16, 0.0, out_channels=64)
    assert isinstance(block, notes.TimestepBlock)
    assert block(torch.randn(2, 32, 4, 4), torch.randn(2, 16)).shape == (2, 64, 4, 4)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 32, 4, 4)
    assert not torch.allclose(block(x, torch.zeros(1, 16)), block(x, torch.ones(1, 16)))
    assert notes.ResBlock(32, 16, 0.0, up=True)(x, torch.zeros(1, 16)).shape == (1, 32, 8, 8)
    assert notes.ResBlock(32, 16, 0.0, down=True)(x, torch.zeros(1, 16)).shape == (1, 32, 2, 2)
    assert notes.ResBlock(24, 16, 0.0, out_channels=40).in_layers[0].num_groups == 8
    with pytest.raises(InputError, match="use_conv"):
        notes.ResBlock(32, 16, 0.0, use_conv=True)


def test_resampling() -> None:
    x = torch.randn(1, 4, 6, 6)
    assert notes.Upsample(4, True)(x).shape == (1, 4, 12, 12)
    assert torch.equal(notes.Upsample(4, False)(x)[..., ::2, ::2], x)
    assert notes.Downsample(4, use_conv=True)(x).shape == (1, 4, 3, 3)
    torch.testing.assert_close(notes.Downsample(4, False)(x), nn.functional.avg_pool2d(x, 2))
    with pytest.raises(InputError, match="out_channels is 5"):
        notes.Upsample(4, True, out_channels=5)


def test_the_schedule_of_the_notes() -> None:
    diffusion = notes.Diffusion(predict)
    betas = torch.linspace(1e-4, 0.02, 200, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    assert diffusion.timesteps == 200
    torch.testing.assert_close(diffusion.betas, betas.float())
    torch.testing.assert_close(diffusion.alphas, (1 - betas).float())
    torch.testing.assert_close(diffusion.alphas_bar, abar.float())
    torch.testing.assert_close(diffusion.sqrt_alphas_bar, abar.sqrt().float())
    torch.testing.assert_close(diffusion.sqrt_one_minus_alphas_bar, (1 - abar).sqrt().float())
    x_0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 50, 199])
    wanted = diffusion.sqrt_alphas_bar[t].reshape(-1, 1, 1, 1) * x_0
    wanted = wanted + diffusion.sqrt_one_minus_alphas_bar[t].reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(diffusion.add_noise(x_0, t, noise), wanted)


def test_algorithm_1() -> None:
    diffusion, x_0 = notes.Diffusion(predict), torch.randn(4, 1, 4, 4)
    context = torch.ones(4, 2, 3)
    given = diffusion(x_0, context, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    t = torch.randint(0, 200, (4,), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    x_t = diffusion.add_noise(x_0, t, noise)
    torch.testing.assert_close(given, ((predict(x_t, t, context) - noise) ** 2).mean())


def test_every_timestep_is_trained() -> None:
    """The notes' torch.randint(1, T) leaves out index 0, which sampling visits."""
    seen: set[int] = set()

    def spy(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        seen.update(t.tolist())
        return x

    notes.Diffusion(spy, timesteps=4)(torch.zeros(200, 1), generator=torch.Generator().manual_seed(0))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("timesteps", [200, 1000])
def test_algorithm_2_is_the_notes_loop(timesteps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampling = notes.Sampling(predict, timesteps)
    context = torch.full((2, 1, 1), 0.1)
    given = sampling((2, 1, 4, 4), context, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 1, 4, 4, generator=generator)
    alphas, bars, betas = sampling.alphas, sampling.alphas_bar, sampling.betas
    for t in reversed(range(timesteps)):
        z = torch.randn(x.shape, generator=generator) if t > 0 else 0
        eps = predict(x, torch.full((2,), t), context)
        x = torch.sqrt(1 / alphas[t]) * (x - (1 - alphas[t]) * eps / torch.sqrt(1 - bars[t]))
        x = x + torch.sqrt(betas[t]) * z
    torch.testing.assert_close(given, x, atol=1e-4, rtol=1e-4)


def test_the_short_schedule_is_told_of() -> None:
    with pytest.warns(UserWarning, match=r"36% of the picture.* scale beta_range by 5"):
        notes.Sampling(predict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notes.Sampling(predict, timesteps=1000)
        notes.Sampling(predict, beta_range=(5e-4, 0.1))


def test_steps_can_be_watched() -> None:
    sampling = notes.Sampling(predict, timesteps=1000)
    steps = sampling.steps((1, 1, 2, 2))
    assert next(steps).index == 0


def test_other_noise_is_refused() -> None:
    with pytest.raises(InputError, match="noise_info"):
        notes.Diffusion(predict, noise_info=(0, 2))

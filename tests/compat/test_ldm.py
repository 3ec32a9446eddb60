"""`LatentDiffusion`: the original's scripts run on it, and draw what `sfumato.generate` draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfumato import Request, generate
from sfumato.compat.ldm import (
    AutoencoderKL,
    DDIMSampler,
    DiagonalGaussianDistribution,
    FrozenCLIPEmbedder,
    IdentityFirstStage,
    LatentDiffusion,
    UNetModel,
)
from sfumato.diffusion.noise import ImageNoise
from sfumato.errors import InputError
from sfumato.model import StableDiffusion


def start_noise(model: StableDiffusion, seeds: list[int]) -> Tensor:
    """The noise that `generate` starts from."""
    return ImageNoise(seeds, model.latent_shape(16, 16), device=torch.device("cpu")).initial()


def test_txt2img_draws_what_generate_draws(tiny_model: StableDiffusion) -> None:
    """The main part of scripts/txt2img.py."""
    prompt, n_samples, ddim_steps, scale, H, W, f, C = "a red apple", 2, 10, 5.0, 16, 16, 2, 2
    model = LatentDiffusion(tiny_model)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    model = model.to(device)
    sampler = DDIMSampler(model)
    with torch.no_grad(), model.ema_scope():
        uc = None
        if scale != 1.0:
            uc = model.get_learned_conditioning(n_samples * [""])
        c = model.get_learned_conditioning(n_samples * [prompt])
        shape = [C, H // f, W // f]
        samples_ddim, _ = sampler.sample(
            S=ddim_steps, conditioning=c, batch_size=n_samples, shape=shape, verbose=False,
            unconditional_guidance_scale=scale, unconditional_conditioning=uc, eta=0.0,
            x_T=start_noise(tiny_model, [4, 5]),
        )  # fmt: skip
        x_samples_ddim = model.decode_first_stage(samples_ddim)
        x_samples_ddim = torch.clamp((x_samples_ddim + 1.0) / 2.0, min=0.0, max=1.0)

    request = Request(
        prompt=prompt, num_images=2, seed=4, sampler="ddim", spacing="leading", steps=10, guidance=5.0
    )
    drawn = generate(tiny_model, request)
    torch.testing.assert_close(samples_ddim, drawn.latents, atol=1e-4, rtol=1e-4)
    wanted = ((drawn.samples + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(x_samples_ddim, wanted, atol=1e-4, rtol=0)
    assert float(wanted.std()) > 0.05  # a picture, not a clamped nothing


def test_img2img(tiny_model: StableDiffusion) -> None:
    """The main part of scripts/img2img.py, against its own formula run to the end."""
    model = LatentDiffusion(tiny_model)
    sampler = DDIMSampler(model)
    strength, ddim_steps, scale, batch_size = 0.6, 10, 3.0, 2
    init_image = torch.rand(1, 3, 16, 16) * 2 - 1
    init_image = init_image.repeat_interleave(batch_size, dim=0)
    torch.manual_seed(8)
    init_latent = model.get_first_stage_encoding(model.encode_first_stage(init_image))
    sampler.make_schedule(ddim_num_steps=ddim_steps, ddim_eta=0.0, verbose=False)
    t_enc = int(strength * ddim_steps)
    uc = model.get_learned_conditioning(batch_size * [""])
    c = model.get_learned_conditioning(batch_size * ["a blue apple"])
    z_enc = sampler.stochastic_encode(init_latent, torch.tensor([t_enc] * batch_size))
    samples = sampler.decode(
        z_enc, c, t_enc, unconditional_guidance_scale=scale, unconditional_conditioning=uc
    )
    x_samples = model.decode_first_stage(samples)
    assert x_samples.shape == (2, 3, 16, 16) and bool(torch.isfinite(x_samples).all())

    torch.manual_seed(8)
    posterior = tiny_model.autoencoder.encode(init_image)  # type: ignore[union-attr]
    latent = (posterior.mean + posterior.std * torch.randn(posterior.mean.shape)) * tiny_model.latent_scale
    torch.testing.assert_close(init_latent, latent)
    abar = model.alphas_cumprod
    x = abar[601].sqrt() * latent + (1 - abar[601]).sqrt() * torch.randn(latent.shape)
    torch.testing.assert_close(z_enc, x)
    for index in reversed(range(t_enc)):
        t = 1 + 100 * index
        a, before = abar[t], abar[t - 100] if index else abar[0]
        eps_u, eps_c = (model.apply_model(x, torch.tensor([t, t]), cond) for cond in (uc, c))
        eps = eps_u + scale * (eps_c - eps_u)
        x = before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps
    torch.testing.assert_close(samples, x, atol=1e-4, rtol=1e-4)


def test_attributes(tiny_model: StableDiffusion) -> None:
    model = LatentDiffusion(tiny_model)
    assert (model.num_timesteps, model.parameterization, model.scale_factor) == (1000, "eps", 1.0)
    assert (model.channels, model.image_size) == (2, 8)
    assert (model.first_stage_key, model.cond_stage_key) == ("image", "txt")
    assert model.model.conditioning_key == "crossattn" and model.device == torch.device("cpu")
    assert isinstance(model.model.diffusion_model, UNetModel)
    assert isinstance(model.first_stage_model, AutoencoderKL)
    assert isinstance(model.cond_stage_model, FrozenCLIPEmbedder)
    assert model.eval() is model and not model.training


def test_state_dict_has_the_originals_names(tiny_model: StableDiffusion) -> None:
    names = set(LatentDiffusion(tiny_model).state_dict())
    for name in (
        "betas", "alphas_cumprod_prev", "posterior_mean_coef2", "model.diffusion_model.time_embed.0.weight",
        "first_stage_model.post_quant_conv.bias",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ):  # fmt: skip
        assert name in names
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.")
    assert all(name.startswith(parts) or "." not in name for name in names)


def test_networks_are_shared_with_the_model(tiny_model: StableDiffusion) -> None:
    model = LatentDiffusion(tiny_model)
    assert model.model.diffusion_model.state_dict().keys() == tiny_model.unet.state_dict().keys()
    model.half()
    assert tiny_model.dtype == torch.float16 and model.betas.dtype == torch.float32
    assert tiny_model.autoencoder is not None
    assert next(tiny_model.autoencoder.parameters()).dtype == torch.float16
    # In half precision as well the methods take floats as they come.
    x = torch.randn(1, 3, 16, 16)
    z = model.get_first_stage_encoding(model.encode_first_stage(x))
    assert model.decode_first_stage(z.float()).dtype == torch.float16
    model.float()
    assert tiny_model.dtype == torch.float32


def test_conditioning(tiny_model: StableDiffusion) -> None:
    model = LatentDiffusion(tiny_model)
    wanted = tiny_model.encode_prompt(["a red apple"]).context
    assert wanted is not None
    assert wanted.shape == (1, 8, 16)
    assert torch.equal(model.get_learned_conditioning("a red apple"), wanted)
    both = model.get_learned_conditioning(["a red apple", ""])
    torch.testing.assert_close(both[:1], wanted)
    embedder = model.cond_stage_model
    assert isinstance(embedder, FrozenCLIPEmbedder)
    assert torch.equal(embedder(["a red apple"]), wanted) and embedder.max_length == 8
    assert torch.equal(embedder.encode("a red apple"), wanted) and embedder.device.type == "cpu"
    embedder.freeze()
    with pytest.raises(InputError, match="a prompt is a int"):
        model.get_learned_conditioning([3])


def test_first_stage(tiny_model: StableDiffusion) -> None:
    tiny_model.latent_scale = 0.25
    model, x = LatentDiffusion(tiny_model), torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.encode_first_stage(x)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    assert tiny_model.autoencoder is not None
    assert torch.equal(posterior.mode(), tiny_model.autoencoder.encode(x).mode())
    first, second = (
        model.get_first_stage_encoding(posterior, torch.Generator().manual_seed(0)) for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 0.25 * posterior.sample(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(model.get_first_stage_encoding(posterior.mode()), tiny_model.encode_image(x))
    torch.testing.assert_close(model.decode_first_stage(first), tiny_model.decode_latents(first))
    with pytest.raises(InputError, match="predict_cids"):
        model.decode_first_stage(first, predict_cids=True)
    with pytest.raises(InputError, match="no codebook"):
        model.quantize_first_stage(first)


def test_gradients_pass_where_the_name_says_so(tiny_model: StableDiffusion) -> None:
    model, z = LatentDiffusion(tiny_model), torch.randn(1, 2, 8, 8, requires_grad=True)
    assert not model.decode_first_stage(z).requires_grad
    model.differentiable_decode_first_stage(z).sum().backward()
    assert z.grad is not None and float(z.grad.abs().sum()) > 0


def test_apply_model_takes_a_condition_in_every_form(tiny_model: StableDiffusion) -> None:
    model, x, t = LatentDiffusion(tiny_model), torch.randn(2, 2, 8, 8), torch.tensor([7, 700])
    c = model.get_learned_conditioning(["a fox", "a red apple"])
    wanted = tiny_model.unet(x, t, c)
    for form in (c, [c], {"c_crossattn": [c]}, {"c_crossattn": c}):
        assert torch.equal(model.apply_model(x, t, form), wanted)
    halves = [c[:, :3], c[:, 3:]]
    assert torch.equal(model.apply_model(x, t, halves), wanted)
    with pytest.raises(InputError, match=r"no condition 'c_cross'(.|\n)*'c_crossattn'"):
        model.apply_model(x, t, {"c_cross": c})
    with pytest.raises(InputError, match="c_crossattn was not given"):
        model.apply_model(x, t, None)
    with pytest.raises(InputError, match="c_concat was given"):
        model.apply_model(x, t, {"c_crossattn": c, "c_concat": [x]})


def test_get_input_of_a_training_batch(tiny_model: StableDiffusion) -> None:
    model = LatentDiffusion(tiny_model)
    batch = {"image": torch.rand(2, 16, 16, 3) * 2 - 1, "txt": ["a fox", "a red apple"]}
    torch.manual_seed(0)
    z, c = model.get_input(batch, "image")
    torch.manual_seed(0)
    pictures = batch["image"].permute(0, 3, 1, 2)  # type: ignore[union-attr]
    torch.testing.assert_close(z, model.get_first_stage_encoding(model.encode_first_stage(pictures)))
    assert torch.equal(c, model.get_learned_conditioning(batch["txt"]))


def test_a_model_in_pixel_space_without_conditions(pixel_model: StableDiffusion) -> None:
    model = LatentDiffusion(pixel_model)
    assert isinstance(model.first_stage_model, IdentityFirstStage) and model.cond_stage_model is None
    assert model.model.conditioning_key is None and model.image_size == 8
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(
        model.decode_first_stage(model.get_first_stage_encoding(model.encode_first_stage(x))), x
    )
    torch.manual_seed(1)
    samples, _ = DDIMSampler(model).sample(5, 2, (1, 8, 8), x_T=start_pixels())
    drawn = generate(pixel_model, Request(sampler="ddim", spacing="leading", steps=5, seed=4, num_images=2))
    torch.testing.assert_close(samples, drawn.latents, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="has no conditions"):
        model.get_learned_conditioning("a fox")
    with pytest.raises(InputError, match="no text encoder"):
        FrozenCLIPEmbedder(pixel_model)


def start_pixels() -> Tensor:
    return ImageNoise([4, 5], (1, 8, 8), device=torch.device("cpu")).initial()

"""Self-attention guidance against the reference pipeline's own functions, and what it costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import (
    StableDiffusionSAGPipeline,
    gaussian_blur_2d,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.guidance import Branch, Combine, cfg, guided
from sfumato.diffusion.guidance_attention import (
    Attended,
    attended,
    blurred_where,
    gaussian_blur,
    self_attention_guided,
)
from sfumato.diffusion.guidance_methods import interval
from sfumato.diffusion.guidance_projection import apg
from sfumato.diffusion.prediction import GuidedDenoiser, Predictor
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())
T = 500
SIGMA = SD1.sigma(T)
HEADS = 2


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = seeded(0, 3, 4, 16, 24) * SIGMA
CONDS = {name: Conditioning(seeded(i, 3, 5, 8)) for i, name in enumerate(("cond", "uncond"), 1)}


class Network:
    """Arithmetic with an attention map (b, heads, n, n) over an 8 times coarser grid; keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.attention = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.context is not None
        self.batches.append(x.shape[0])
        level = (cond.context.mean(dim=(1, 2)) + t / 1000)[:, None, None, None]
        coarse = torch.nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2)  # (b, 24, 4)
        heads = torch.stack([coarse, coarse.flip(2) + 1], dim=1)
        self.attention = (3 * heads @ heads.transpose(2, 3)).softmax(dim=-1)
        return torch.sin(x * 2 + level) + x.roll(1, dims=3) * level

    def take(self) -> Tensor:
        return self.attention.mean(dim=1).sum(dim=1)


def setup(prediction: str = "eps") -> tuple[Network, dict[str, Branch], Attended]:
    network = Network()
    predictor = Predictor(network, SD1, prediction)
    return (
        network,
        {name: (predictor, cond) for name, cond in CONDS.items()},
        attended(predictor, network.take),
    )


@pytest.mark.parametrize("blur", [1.0])
@pytest.mark.parametrize("size", [(16, 24), (9, 5), (5, 5)])
def test_blur_equals_the_reference(blur: float, size: tuple[int, int]) -> None:
    values = seeded(3, 2, 4, *size)
    torch.testing.assert_close(gaussian_blur(values, blur), gaussian_blur_2d(values, 9, blur))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
@pytest.mark.parametrize("blur", [0.5, 3.0])
def test_blur_of_small_and_flat_pictures(size: tuple[int, int], blur: float) -> None:
    flat = torch.full((2, 3, *size), 0.7, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(flat, blur), flat)


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("sag_scale", [0.75, 1.5])
def test_equals_the_reference_pipeline(scale: float, sag_scale: float) -> None:
    """The pipeline's steps with its own mask, blur and noise, in its variance-preserving coordinates."""
    network, branches, looked = setup()
    got = self_attention_guided(branches, cfg(scale), looked, sag_scale)(X, SIGMA)

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon"
    )
    scheduler.alphas_cumprod = SD1.alphas_cumprod
    config = SimpleNamespace(attention_head_dim=HEADS)
    pipeline = SimpleNamespace(scheduler=scheduler, unet=SimpleNamespace(config=config))
    latents = X / (1 + SIGMA**2) ** 0.5
    t = torch.tensor(T)

    def unet(x: Tensor, name: str) -> Tensor:
        return network(x, torch.full((3,), float(T)), CONDS[name])

    text = unet(latents, "cond")
    base_name = "uncond" if scale > 1 else "cond"
    base = unet(latents, base_name)
    pred = base + scale * (text - base) if scale > 1 else text
    x0 = StableDiffusionSAGPipeline.pred_x0(pipeline, latents, base, t)  # pyright: ignore[reportArgumentType]
    degraded = StableDiffusionSAGPipeline.sag_masking(
        pipeline,  # pyright: ignore[reportArgumentType]
        x0,
        network.attention.flatten(0, 1),
        (4, 6),
        t,
        base,
    )
    pred = pred + sag_scale * (base - unet(degraded, base_name))
    expected = StableDiffusionSAGPipeline.pred_x0(pipeline, latents, pred, t)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # its Gaussian is made in float32
    assert (got - guided(branches, cfg(scale))(X, SIGMA)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("combine", "batches"),
    [(cfg(7.5), [3, 3, 3]), (cfg(1.0), [3, 3]), (cfg(0.0), [3, 3]), (interval(cfg(7.5), 10, 20), [3, 3])],
)
def test_one_evaluation_more(combine: Combine, batches: list[int]) -> None:
    network, branches, looked = setup()
    self_attention_guided(branches, combine, looked, 0.75)(X, SIGMA)
    assert network.batches == batches
    network.batches.clear()
    self_attention_guided(branches, combine, looked, 0.0)(X, SIGMA)
    assert sum(network.batches) == sum(batches) - 3


def test_parts_and_rows() -> None:
    network, branches, looked = setup()
    denoise = self_attention_guided(branches, cfg(7.5), looked, 0.75)
    whole, unguided = denoise.parts(X, SIGMA)
    assert torch.equal(whole, denoise(X, SIGMA))
    torch.testing.assert_close(unguided, branches["uncond"][0](X, SIGMA, CONDS["uncond"]))
    for i in range(3):
        alone = denoise.rows(i, i + 1)
        torch.testing.assert_close(alone(X[i : i + 1], SIGMA), whole[i : i + 1], rtol=1e-6, atol=1e-6)
    follow = self_attention_guided(branches, cfg(1.0), looked, 0.75)
    network.batches.clear()
    assert torch.equal(follow.parts(X, SIGMA)[0], follow(X, SIGMA))
    torch.testing.assert_close(follow.parts(X, SIGMA)[1], unguided)
    assert network.batches == [3, 3, 3, 3, 3, 3, 3, 3]


def test_one_image_and_one_condition_per_call() -> None:
    network, branches, looked = setup()

    def of(rows: slice, batched: bool) -> GuidedDenoiser:
        some = {name: (one, cond.rows(rows.start, rows.stop)) for name, (one, cond) in branches.items()}
        return self_attention_guided(some, apg(7.5), looked, 0.75, batched=batched)

    got = of(slice(0, 3), False)(X, SIGMA)
    assert network.batches == [1] * 9
    torch.testing.assert_close(got, of(slice(0, 3), True)(X, SIGMA))
    for i in range(3):
        assert torch.equal(of(slice(i, i + 1), False)(X[i : i + 1], SIGMA), got[i : i + 1])


def test_only_masked_positions_are_blurred() -> None:
    values, mask = seeded(3, 2, 4, 8, 8), torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2] = True  # the lower left quarter of the second picture
    got = blurred_where(values, mask, 1.0)
    changed = (got != values).any(dim=1)
    assert not changed[0].any() and changed[1, 4:, :4].all() and changed[1].sum() == 16
    torch.testing.assert_close(got[1, :, 4:, :4], gaussian_blur(values, 1.0)[1, :, 4:, :4])


def test_what_is_missing_or_of_another_rank_is_named() -> None:
    _, branches, looked = setup()
    with pytest.raises(InputError, match="needs the branch 'uncond'"):
        self_attention_guided({"cond": branches["cond"]}, cfg(7.5), looked, 0.75)(X, SIGMA)
    with pytest.raises(InputError, match="blur"):
        self_attention_guided(branches, cfg(7.5), looked, 0.75, blur=0.0)
    with pytest.raises(InputError, match="samples \\(b, c, h, w\\)"):
        blurred_where(X[..., 0], torch.ones(3, 4) > 0, 1.0)

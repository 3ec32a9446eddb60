"""Interval, rescaling and branches to lead away from: their formulas, their costs, images kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.conditioning import Conditioning
from sfumato.diffusion.guidance import Branch, Combine, cfg, composed, guided, image_cfg
from sfumato.diffusion.guidance_attention import attended, self_attention_guided
from sfumato.diffusion.guidance_methods import (
    autoguidance,
    away_from,
    interval,
    interval_of_steps,
    pag,
    per_image,
    rescale,
)
from sfumato.diffusion.guidance_projection import apg, perp_neg
from sfumato.diffusion.guidance_threshold import dynamic_threshold, mimic_threshold
from sfumato.diffusion.prediction import Predictor
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.errors import InputError
from sfumato.model import StableDiffusion
from sfumato.nn.patches import combine_patches, freeu, kept_attention, perturbed_attention

SD1 = Schedule(ScheduleConfig())
SIGMA = 1.7
NAMES = ("cond", "cond1", "image", "negative", "uncond", "perturbed", "weak")


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = seeded(0, 3, 4, 6, 5)
X0 = {name: seeded(i + 1, 3, 4, 6, 5) for i, name in enumerate(NAMES)}


class Network:
    """Float64 arithmetic that depends on the condition and mixes a picture's positions; keeps its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        assert cond.context is not None
        self.batches.append(x.shape[0])
        level = (cond.context.mean(dim=(1, 2)) + t / 1000)[:, None, None, None]
        return torch.sin(x * 3 + level) + x.roll(1, dims=3) * level


def branches_of(
    network: Network, prediction: str = "eps", dtype: torch.dtype = torch.float64
) -> dict[str, Branch]:
    """All the branches there are, of one network, but for the two that need another predictor."""
    one, other = Predictor(network, SD1, prediction), Predictor(network, SD1, prediction)
    return {
        name: (
            other if name in ("perturbed", "weak") else one,
            Conditioning(seeded(20 + i, 3, 5, 8).to(dtype)),
        )
        for i, name in enumerate(NAMES)
    }


# Interval


def test_outside_the_interval_the_condition_alone_is_computed() -> None:
    network = Network()
    branches = branches_of(network)
    denoise = guided(branches, interval(cfg(4.0), 0.5, 2.0))
    plain = guided(branches, cfg(4.0))
    for sigma, inside in [(2.1, False), (2.0, True), (1.0, True), (0.51, True), (0.5, False), (0.1, False)]:
        network.batches.clear()
        got = denoise(X, sigma)
        assert network.batches == ([6] if inside else [3])
        expected = plain(X, sigma) if inside else branches["cond"][0](X, sigma, branches["cond"][1])
        assert torch.equal(got, expected)
    network.batches.clear()
    denoise.parts(X, 5.0)
    assert network.batches == [6]  # the unguided part is needed outside as well


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_scale_of_one_branch_costs_one_in_the_interval_too(scale: float) -> None:
    network = Network()
    guided(branches_of(network), interval(cfg(scale), 0.5, 2.0))(X, SIGMA)
    assert network.batches == [3]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (2.0, 1.0), (math.nan, 1.0)])
def test_an_impossible_interval_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="guidance from sigma"):
        interval(cfg(2.0), low, high)


@pytest.mark.parametrize(
    ("start", "stop", "guided_steps"),
    [
        (0.0, 1.0, range(10)),
        (0.0, 0.5, range(5)),
        (0.25, 0.8, range(2, 8)),
        (0.3, 1.0, range(3, 10)),
        (0.7, 0.7, range(0)),
        (0.0, 0.0, range(0)),
        (1.0, 1.0, range(0)),
        (0.29, 0.31, range(2, 3)),
    ],
)
@pytest.mark.parametrize("last", [0.0, 0.03])
def test_fractions_of_steps(start: float, stop: float, guided_steps: range, last: float) -> None:
    sigmas = [10.0 * 0.6**i for i in range(10)] + [last]
    low, high = interval_of_steps(sigmas, start, stop)
    needed = interval(cfg(2.0), low, high)
    found = [i for i, sigma in enumerate(sigmas[:-1]) if len(needed.needs(sigma)) == 2]
    assert found == list(guided_steps)


def test_whole_ends_have_no_limits() -> None:
    """A sampler that adds noise before its first step, or evaluates its last level, is guided there too."""
    assert interval_of_steps([10.0, 1.0, 0.1], 0.0, 1.0) == (0.0, math.inf)
    assert interval_of_steps([0.01 * i for i in range(100, -1, -1)], 0.29, 1.0)[1] == 0.01 * 71
    with pytest.raises(InputError, match="of the steps"):
        interval_of_steps([10.0, 1.0], 0.5, 0.4)
    with pytest.raises(InputError, match="of the steps"):
        interval_of_steps([10.0, 1.0], 0.5, 1.1)


# Rescaling


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescaling_equals_the_reference_on_the_raw_prediction(prediction: str, phi: float) -> None:
    """diffusers rescales what the network said; the same network's x0, guided and rescaled, is the same."""
    network = Network()
    branches = branches_of(network, prediction)
    raw: dict[str, Tensor] = {}

    def said(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        raw["cond"], raw["uncond"] = (network(x, t, branches[name][1]) for name in ("cond", "uncond"))
        mixed = raw["uncond"] + 7.5 * (raw["cond"] - raw["uncond"])
        return rescale_noise_cfg(mixed, raw["cond"], guidance_rescale=phi)

    for sigma in (0.03, SIGMA, 14.0):
        expected = Predictor(said, SD1, prediction)(X, sigma, Conditioning())
        got = guided(branches, rescale(cfg(7.5), phi, prediction))(X, sigma)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_rescaling_x0_is_another_method() -> None:
    on_eps, on_x0 = (rescale(cfg(7.5), 1.0, name)(X, SIGMA, X0) for name in ("eps", "x0"))
    assert (on_eps - on_x0).abs().max() > 0.1


def test_rescaling_leaves_a_single_branch_alone() -> None:
    network = Network()
    branches = branches_of(network)
    for scale, name in ((1.0, "cond"), (0.0, "uncond")):
        network.batches.clear()
        got = guided(branches, rescale(cfg(scale), 0.7, "eps"))(X, SIGMA)
        assert network.batches == [3]
        assert torch.equal(got, branches[name][0](X, SIGMA, branches[name][1]))
    assert rescale(cfg(7.5), 0.0, "eps") == cfg(7.5)


def test_rescaling_a_constant_prediction_stays_finite() -> None:
    """An untrained network says 0 everywhere: then x0 = x for eps."""
    x = X.round()  # so that 7.5 x - 6.5 x has no rounding
    got = rescale(cfg(7.5), 0.7, "eps")(x, SIGMA, {"cond": x, "uncond": x})
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize(("phi", "prediction"), [(1.5, "eps"), (-0.1, "eps"), (0.5, "epsilon")])
def test_impossible_rescaling_is_refused(phi: float, prediction: str) -> None:
    with pytest.raises(InputError):
        rescale(cfg(7.5), phi, prediction)


# Away from a branch


def test_perturbed_attention_guidance() -> None:
    got = pag(cfg(4.0), 3.0)(X, SIGMA, X0)
    expected = 4 * X0["cond"] - 3 * X0["uncond"] + 3 * (X0["cond"] - X0["perturbed"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert list(pag(cfg(4.0), 3.0).needs(SIGMA)) == ["cond", "uncond", "perturbed"]
    assert list(pag(cfg(1.0), 3.0).needs(SIGMA)) == ["cond", "perturbed"]
    assert list(pag(cfg(0.0), 3.0).needs(SIGMA)) == ["uncond", "cond", "perturbed"]
    assert pag(cfg(4.0), 0.0) == cfg(4.0)


def test_autoguidance() -> None:
    got = autoguidance(2.2)(X, SIGMA, X0)
    expected = X0["weak"] + 2.2 * (X0["cond"] - X0["weak"])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert list(autoguidance(2.2).needs(SIGMA)) == ["cond", "weak"]
    assert list(autoguidance(1.0).needs(SIGMA)) == ["cond"]
    both = autoguidance(2.2, cfg(3.0))(X, SIGMA, X0)
    expected = 3 * X0["cond"] - 2 * X0["uncond"] + 1.2 * (X0["cond"] - X0["weak"])
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-13)


def test_another_predictor_takes_a_pass_of_its_own() -> None:
    network = Network()
    guided(branches_of(network), pag(cfg(4.0), 3.0))(X, SIGMA)
    assert network.batches == [6, 3]


# What holds for every method

METHODS: dict[str, Callable[[], Combine]] = {
    "cfg": lambda: cfg(7.5),
    "composed": lambda: composed(7.5, [0.8, 0.4]),
    "picture and text": lambda: image_cfg(7.5, 1.5),
    "interval": lambda: interval(cfg(7.5), 0.4, 2.0),
    "rescaled": lambda: rescale(cfg(7.5), 0.7, "v"),
    "percentile": lambda: dynamic_threshold(cfg(7.5), 0.9),
    "mimicked": lambda: mimic_threshold(cfg(15.0), 7.0, 0.95),
    "projected": lambda: apg(7.5, 0.2, 8.0, -0.5),
    "projected, in a chain": lambda: interval(rescale(pag(apg(7.5, 0, 8), 2.0), 0.5, "eps"), 0.4, 2.0),
    "perpendicular": lambda: perp_neg(7.5, 1.2),
    "perturbed": lambda: pag(cfg(4.0), 3.0),
    "weak": lambda: autoguidance(2.0, rescale(cfg(3.0), 0.7, "eps")),
}
SIGMAS = (3.0, 2.0, 2.0, 1.1, 0.5, 0.3)  # with the repeated level of a second-order step


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_an_image_does_not_depend_on_its_batch(method: Callable[[], Combine]) -> None:
    branches = branches_of(Network())
    together = guided(branches, method())
    results = [together(X, sigma) for sigma in SIGMAS]
    for row in range(3):
        alone = guided(branches, method()).rows(row, row + 1)
        for sigma, expected in zip(SIGMAS, results, strict=True):
            got = alone(X[row : row + 1], sigma)
            torch.testing.assert_close(got, expected[row : row + 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_rows_may_be_taken_in_the_middle_of_a_run(method: Callable[[], Combine]) -> None:
    branches = branches_of(Network())
    denoise = guided(branches, method())
    denoise(X, 2.5)
    denoise(X, 1.5)
    tail = denoise.rows(1, 3)
    got, parts = tail(X[1:], 0.9), tail.parts(X[1:], 0.9)
    expected, unguided = denoise.parts(X, 0.9)
    torch.testing.assert_close(got, expected[1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts[0], expected[1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts[1], unguided[1:], rtol=1e-6, atol=1e-6)


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read from a tensor, which makes an accelerator's caller wait."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.READS, func
        return func(*args, **(kwargs or {}))


def test_the_guard_against_waiting_can_fail() -> None:
    with pytest.raises(AssertionError), NoWaiting():
        bool(X[0, 0, 0, 0] > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_no_method_waits_or_changes_the_number_format(
    method: Callable[[], Combine], dtype: torch.dtype
) -> None:
    combine, x = method(), X.to(dtype)
    predictions = {name: value.to(dtype) for name, value in X0.items()}
    with NoWaiting():
        for sigma in SIGMAS:
            got = combine(x, sigma, {name: predictions[name] for name in combine.needs(sigma)})
            assert got.dtype == dtype and got.shape == x.shape


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_equal_branches_guide_nowhere(method: Callable[[], Combine]) -> None:
    """Where no branch differs there is no direction: x0 stays finite, and what it was, but for its range."""
    x0 = X0["cond"] / 10
    got = method()(X, SIGMA, dict.fromkeys(NAMES, x0))
    torch.testing.assert_close(got, x0)


def test_away_from_any_branch() -> None:
    got = away_from(cfg(1.0), "image", 0.5)(X, SIGMA, X0)
    torch.testing.assert_close(got, 1.5 * X0["cond"] - 0.5 * X0["image"], rtol=0, atol=1e-13)


def test_per_image_reduces_each_image() -> None:
    got = per_image(torch.std, X)
    torch.testing.assert_close(got, X.std(dim=(1, 2, 3), keepdim=True))


@pytest.mark.parametrize("batched", [True, False])
def test_a_model_with_its_patches(tiny_model: StableDiffusion, batched: bool) -> None:
    """A whole network, perturbed, freed and looked at: it does not wait, and every part has its effect."""
    unet, shape = tiny_model.unet, (2, *tiny_model.latent_shape(16, 32))
    cond, uncond = tiny_model.encode_prompt(["a red apple", "a fox"]), tiny_model.uncondition(2)
    x = seeded(1, *shape).float() * SIGMA
    patch, take = kept_attention(unet)
    free = tiny_model.predictor(freeu(unet.config))
    branches = {
        "cond": (free, cond),
        "uncond": (free, uncond),
        "perturbed": (
            tiny_model.predictor(combine_patches(perturbed_attention(unet), freeu(unet.config))),
            cond,
        ),
    }
    looked = attended(tiny_model.predictor(combine_patches(patch, freeu(unet.config))), take)

    def draw(scale: float, sag_scale: float) -> Tensor:
        denoise = self_attention_guided(branches, pag(cfg(3.0), scale), looked, sag_scale, batched=batched)
        with NoWaiting(), torch.no_grad():
            got = denoise(x, SIGMA)
        alone = denoise.rows(1, 2)(x[1:], SIGMA)
        torch.testing.assert_close(alone, got[1:], rtol=1e-4, atol=1e-4)
        return got

    plain = guided(branches, cfg(3.0), batched=batched)(x, SIGMA)
    torch.testing.assert_close(draw(0.0, 0.0), plain, rtol=1e-4, atol=1e-4)
    results = [plain, draw(2.0, 0.0), draw(0.0, 0.75), draw(2.0, 0.75)]
    unpatched = tiny_model.predictor()
    results.append(guided({"cond": (unpatched, cond), "uncond": (unpatched, uncond)}, cfg(3.0))(x, SIGMA))
    for i, one in enumerate(results):
        assert one.dtype == torch.float32 and one.shape == shape
        assert all((one - other).abs().max() > 1e-3 for other in results[:i])

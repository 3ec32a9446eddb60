"""What every row of the table promises, and moments of the first-order ones; orders are in test_orders."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import Tensor

from sfumato.diffusion import samplers
from sfumato.diffusion.brownian import BrownianNoise
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Unguided
from sfumato.diffusion.samplers import (
    INVERSIONS,
    SAMPLERS,
    Sampler,
    Step,
    sampler,
)
from sfumato.diffusion.samplers.multistep import ADAMS_BASHFORTH, in_steps, lagrange_integrals
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError

SD1 = Schedule(ScheduleConfig())
ON_GIVEN_LEVELS = [name for name, row in SAMPLERS.items() if not row.ends_only and name != "restart"]


def needed(row: Sampler) -> dict[str, Any]:
    """The options that a row cannot do without."""
    return {"schedule": SD1} if "schedule" in row.options else {}


def no_noise(sigma: float, target: float) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def last(steps: object) -> Step:
    return list(steps)[-1]  # pyright: ignore[reportArgumentType, reportCallIssue]


SIGMAS = st.lists(st.floats(1e-3, 200), min_size=2, max_size=12).map(
    lambda values: sorted({round(value, 3) for value in values}, reverse=True)
)


@dataclass
class Recorder:
    """A denoiser and a noise that write down what they were asked for."""

    shape: tuple[int, ...] = (2, 3)

    def __post_init__(self) -> None:
        self.evaluated: list[tuple[float, Tensor]] = []
        self.drawn: list[tuple[float, float]] = []

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        assert isinstance(sigma, float)
        assert sigma > 0
        assert x.dtype == torch.float32
        self.evaluated.append((sigma, x / (1 + sigma**2)))
        return self.evaluated[-1][1]

    def noise(self, sigma: float, target: float) -> Tensor:
        assert 0 < target < sigma
        self.drawn.append((sigma, target))
        return torch.ones(self.shape)


@pytest.mark.parametrize("name", ON_GIVEN_LEVELS)
@settings(deadline=None, max_examples=12)  # a busy machine is not a failure
@given(SIGMAS, st.booleans())
def test_every_sampler_keeps_its_promises(name: str, positive: list[float], to_zero: bool) -> None:
    row, seen = SAMPLERS[name], Recorder()
    sigmas = [*positive, 0.0] if to_zero else positive
    start = torch.full((2, 3), positive[0])
    steps = list(row(Unguided(seen.denoise), start, sigmas, seen.noise, **needed(row)))
    pairs = list(itertools.pairwise(sigmas))
    assert [(step.sigma, step.target) for step in steps] == pairs
    assert [step.index for step in steps] == list(range(len(pairs)))
    warm_up = 1 if name == "plms" and pairs and pairs[0][1] > 0 else 0
    assert len(seen.evaluated) == row.evaluations * len(pairs) - (row.evaluations - 1) * to_zero + warm_up
    noisy = [pair for pair in pairs if pair[1] > 0] if row.stochastic else []
    if name == "tcd":  # where there is no timestep below the target, there is no room for noise
        assert set(seen.drawn) <= set(noisy)
    elif row.noise == "brownian":  # parts of a step draw too, all from the path of the step
        assert {pair for pair in seen.drawn if pair in noisy} == set(noisy)
        assert all(any(high == a and low >= b for a, b in noisy) for high, low in seen.drawn)
    else:
        assert seen.drawn == noisy
    for step in steps:
        assert step.x.shape == start.shape
        assert step.x.dtype == torch.float32
        assert step.x.isfinite().all()
        answers = [answer for sigma, answer in seen.evaluated if sigma == step.sigma]
        assert name == "lcm" or any(step.denoised is answer for answer in answers)
    if to_zero:
        torch.testing.assert_close(steps[-1].x, steps[-1].denoised)
    assert torch.equal(start, torch.full((2, 3), positive[0]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_grad_mode_belongs_to_the_consumer(name: str) -> None:
    inside: list[bool] = []
    row = SAMPLERS[name]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return x * 0.5

    def run(sigmas: list[float]) -> Any:
        return row(Unguided(denoise), x, sigmas, lambda s, t: torch.ones(1, 2), **needed(row))

    x = torch.ones(1, 2, requires_grad=True)
    with torch.enable_grad():
        steps = run([4.0, 2.0, 1.0, 0.0])
        for step in itertools.islice(steps, 2):
            assert torch.is_grad_enabled()
            assert not step.x.requires_grad
        steps.close()
        assert torch.is_grad_enabled()
    with torch.no_grad():
        next(iter(run([4.0, 2.0])))
        assert not torch.is_grad_enabled()
    assert inside
    assert not any(inside)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_global_noise_and_no_memory_between_runs(
    name: str, mixture: Callable[[Tensor, float], Tensor]
) -> None:
    row = SAMPLERS[name]

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        x = 10 * torch.randn(5, generator=generator)
        sigmas = SPACINGS["karras"](SD1, 6).sigmas
        draw = lambda s, t: torch.randn(5, generator=generator)  # noqa: E731
        return last(row(Unguided(mixture), x, sigmas, draw, **needed(row))).x

    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(), first)


@pytest.mark.parametrize("options", [{}, {"eta": 0.6}], ids=["default", "eta"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(
    name: str, options: dict[str, float], mixture: Callable[[Tensor, float], Tensor]
) -> None:
    """With the kind of noise that its row declares, every image is what it is alone."""
    row = SAMPLERS[name]
    if not options.keys() <= set(row.options):
        return

    def run(seeds: list[int]) -> Tensor:
        drawn = ImageNoise(seeds, (2, 3), device=torch.device("cpu"))
        path = BrownianNoise(seeds, (2, 3), low=SD1.sigma_min, high=SD1.sigma_max, device=torch.device("cpu"))
        noise = path if row.noise == "brownian" else drawn
        start = drawn.initial() * SD1.sigma_max
        sigmas = SPACINGS["karras"](SD1, 7).sigmas
        return last(row(Unguided(mixture), start, sigmas, noise, **needed(row), **options)).x

    together = run([5, 6, 7])
    for place, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(run([seed])[0], together[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_churn_stays_within_its_levels(name: str) -> None:
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]

    def run(**options: float) -> Recorder:
        seen = Recorder()
        steps = list(SAMPLERS[name](seen.denoise, torch.ones(2, 3), sigmas, seen.noise, **options))
        assert [(step.sigma, step.target) for step in steps] == list(itertools.pairwise(sigmas))
        return seen

    def levels(seen: Recorder) -> list[float]:
        return [sigma for sigma, _ in seen.evaluated]

    assert run().drawn == []
    assert run(s_churn=0.0, s_noise=2.0).drawn == []
    seen = run(s_churn=1.0, s_tmin=1.0, s_tmax=4.0)
    assert seen.drawn == [(4.8, 4.0), (2.4, 2.0), (1.2, 1.0)]
    assert {8.0, 4.8, 2.4, 1.2, 0.5} <= {round(level, 6) for level in levels(seen)}
    assert max(levels(run(s_churn=1e6))) == pytest.approx(8 * math.sqrt(2))
    silent = run(s_churn=1.0, s_noise=0.0)
    assert silent.drawn == []
    assert max(levels(silent)) == pytest.approx(8 * 1.2)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("euler_a", "euler"), ("dpm2_a", "dpm2"), ("euler_a_cfg_pp", "euler_cfg_pp"), ("ddim", "euler")],
)
def test_without_noise_an_ancestral_sampler_is_the_plain_one(
    name: str, plain: str, mixture: Callable[[Tensor, float], Tensor]
) -> None:
    start = torch.tensor([[-9.0, 0.1, 14.0]], dtype=torch.float64)
    sigmas = SPACINGS["karras"](SD1, 6).sigmas
    got = last(SAMPLERS[name](Unguided(mixture), start, sigmas, no_noise, eta=0.0)).x
    expected = last(SAMPLERS[plain](Unguided(mixture), start, sigmas, no_noise)).x
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if "s_noise" in row.options])
def test_no_amount_of_noise_draws_none(name: str, mixture: Callable[[Tensor, float], Tensor]) -> None:
    row = SAMPLERS[name]
    churned = {"s_churn": 3.0} if "s_churn" in row.options else {}
    options = {"restarts": ()} if name == "restart" else churned
    sigmas = SPACINGS["karras"](SD1, 6).sigmas
    end = last(row(Unguided(mixture), torch.ones(1, 3), sigmas, no_noise, s_noise=0.0, **options)).x
    assert end.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 400), min_size=2, max_size=5, unique=True),
    st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_integrals_of_interpolating_polynomials(levels: list[int], growth: float) -> None:
    """Against scipy: each node's Lagrange polynomial times exp(growth * u), in float64."""
    end, *nodes = sorted(level / 100 for level in levels)
    nodes.reverse()
    got = lagrange_integrals(nodes, nodes[0], end, growth)
    for node, value in zip(nodes, got, strict=True):
        others = [other for other in nodes if other != node]

        def integrand(u: float, node: float = node, others: list[float] = others) -> float:
            return math.exp(growth * u) * math.prod((u - other) / (node - other) for other in others)

        expected, _ = integrate.quad(integrand, nodes[0], end, epsabs=1e-12, epsrel=1e-11)
        scale, _ = integrate.quad(lambda u: abs(integrand(u)), end, nodes[0], epsabs=1e-12, epsrel=1e-9)
        assert value == pytest.approx(expected, abs=1e-11 * scale + 1e-14)
    whole, _ = integrate.quad(lambda u: math.exp(growth * u), nodes[0], end)
    assert sum(got) == pytest.approx(whole, rel=1e-9)


def test_coefficients_of_equal_steps_are_the_integrals() -> None:
    for count in range(1, 5):
        levels = [2.0 + 0.25 * i for i in range(count)]
        exact = lagrange_integrals(levels, 2.0, 1.75)
        assert in_steps(levels, 1.75) == pytest.approx(exact, rel=1e-12)
        assert sum(ADAMS_BASHFORTH[count - 1]) == pytest.approx(1)


@pytest.mark.parametrize(
    "sigmas", [[1.0, 1.0], [1.0, 2.0], [1.0, -0.1], [math.inf, 1.0], [math.nan, 1.0], [2.0, 0.0, 0.0]]
)
def test_refused_sigmas(sigmas: list[float]) -> None:
    with pytest.raises(InputError, match="descending"):
        SAMPLERS["euler"](lambda x, sigma: x, torch.ones(1), sigmas, no_noise)


def test_names() -> None:
    assert sampler("dpmpp_2m") is SAMPLERS["dpmpp_2m"]
    with pytest.raises(InputError, match="euler_a"):
        sampler("euler a")
    with pytest.raises(InputError, match="no sampler 'ddim_inversion'"):
        sampler(*INVERSIONS)


def test_the_table() -> None:
    assert {name: row.title for name, row in SAMPLERS.items()} == {
        "euler": "Euler",
        "euler_a": "Euler a",
        "heun": "Heun",
        "lms": "LMS",
        "dpm2": "DPM2",
        "dpm2_a": "DPM2 a",
        "dpm_fast": "DPM fast",
        "dpm_adaptive": "DPM adaptive",
        "dpmpp_2s_a": "DPM++ 2S a",
        "dpmpp_sde": "DPM++ SDE",
        "dpmpp_2m": "DPM++ 2M",
        "dpmpp_2m_sde": "DPM++ 2M SDE",
        "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
        "dpmpp_3m_sde": "DPM++ 3M SDE",
        "ddim": "DDIM",
        "ddpm": "DDPM",
        "plms": "PLMS",
        "unipc": "UniPC",
        "deis": "DEIS",
        "ipndm": "iPNDM",
        "ipndm_v": "iPNDM_v",
        "restart": "Restart",
        "lcm": "LCM",
        "tcd": "TCD",
        "euler_cfg_pp": "Euler CFG++",
        "euler_a_cfg_pp": "Euler a CFG++",
        "dpmpp_2m_cfg_pp": "DPM++ 2M CFG++",
        "ddim_cfg_pp": "DDIM CFG++",
    }
    for name, row in {**SAMPLERS, **INVERSIONS}.items():
        assert row.spacing in SPACINGS, name
        assert row.paper.split()[-1].rstrip("ab").isdigit(), name
        assert (row.order, row.evaluations) >= (1, 1)
        assert not row.discard_penultimate or row.evaluations == 2 or row.order == 3, name
        if row.stochastic and {"eta", "s_noise"} & set(row.options):
            assert "s_noise" in row.options, name


def test_options() -> None:
    churn = ("s_churn", "s_tmin", "s_tmax", "s_noise")
    control = ("order", "rtol", "atol", "h_init", "pcoeff", "icoeff", "dcoeff", "accept_safety")
    expected = {
        **dict.fromkeys(["euler", "heun", "dpm2"], churn),
        **dict.fromkeys(["euler_a", "dpm2_a", "dpmpp_2s_a", "dpm_fast"], ("eta", "s_noise")),
        **dict.fromkeys(["lms", "deis", "ipndm", "ipndm_v"], ("order",)),
        **dict.fromkeys(["plms", "dpmpp_2m"], ()),
        "dpm_adaptive": (*control, "eta", "s_noise"),
        "unipc": ("variant", "order", "lower_order_final"),
        "ddim": ("eta",),
        "ddpm": ("variance",),
    }
    assert {name: SAMPLERS[name].options for name in expected} == expected
    arguments = (Unguided(lambda x, sigma: x), torch.ones(1), [1.0, 0.5, 0.0], no_noise)
    with pytest.raises(InputError, match="no option 'eta'"):
        SAMPLERS["heun"](*arguments, eta=1.0)
    with pytest.raises(InputError, match="eta"):
        SAMPLERS["ddim"](*arguments, etta=1.0)
    with pytest.raises(InputError, match="large"):
        SAMPLERS["ddpm"](*arguments, variance="huge")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("lms", {"order": 5}, "order is 5; allowed are 1, 2, 3, 4"),
        ("ipndm", {"order": 0}, "order is 0"),
        ("deis", {"order": 4}, "order is 4; allowed are 1, 2, 3"),
        ("unipc", {"order": 4}, "order is 4"),
        ("unipc", {"variant": "bh3"}, "variant is 'bh3'; allowed are 'bh1', 'bh2'"),
        ("dpm_adaptive", {"order": 1}, "order is 1; allowed are 2, 3"),
        ("dpm_adaptive", {"atol": 0.0}, "atol is 0"),
        ("dpm_adaptive", {"rtol": -0.1}, "rtol is -0.1"),
        ("dpm_adaptive", {"rtol": math.nan}, "rtol is nan"),
        ("dpm_adaptive", {"h_init": 0.0}, "h_init is 0"),
        ("dpm_adaptive", {"icoeff": 0.0}, "icoeff"),
        ("dpm_adaptive", {"accept_safety": 1.5}, "accept_safety is 1.5"),
    ],
)
def test_refused_options(name: str, options: dict[str, Any], told: str) -> None:
    """At the call, before anything is iterated."""
    with pytest.raises(InputError, match=told):
        SAMPLERS[name](Unguided(lambda x, sigma: x), torch.ones(1, 1), [1.0, 0.5, 0.0], no_noise, **options)


def body_length(function: ast.FunctionDef) -> int:
    first, *rest = function.body[1:] if ast.get_docstring(function) else function.body
    return ([first, *rest][-1].end_lineno or 0) - first.lineno + 1


def test_samplers_are_short() -> None:
    """20 lines in the mean, docstrings aside: rows' functions, and the generators that do their work."""
    names = {row.function.__name__ for row in (*SAMPLERS.values(), *INVERSIONS.values())}
    lengths: dict[str, int] = {}
    for module in {inspect.getmodule(row.function) for row in SAMPLERS.values()}:
        assert module is not None
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef) and (
                node.name in names or any(isinstance(part, ast.Yield) for part in ast.walk(node))
            ):
                lengths[node.name] = body_length(node)
    assert len(lengths) >= len({row.function for row in SAMPLERS.values()})
    assert sum(lengths.values()) / len(lengths) <= 20, lengths
    assert max(lengths.values()) <= 30, lengths
    assert samplers.__doc__

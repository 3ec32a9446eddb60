"""Every sampler on every spacing, with a small network: finite, the same in any batch, never waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sfumato.conditioning import Conditioning
from sfumato.diffusion.brownian import BrownianNoise
from sfumato.diffusion.guidance import cfg, guided
from sfumato.diffusion.noise import ImageNoise
from sfumato.diffusion.prediction import Predictor, Unguided
from sfumato.diffusion.samplers import SAMPLERS, Sampler, Step
from sfumato.diffusion.schedule import Schedule, ScheduleConfig
from sfumato.diffusion.spacing import SPACINGS, Spacing, space
from sfumato.nn.unet import UNet, UNetConfig

SCHEDULE = Schedule(ScheduleConfig())
CPU = torch.device("cpu")
SHAPE = (2, 3, 5)  # odd sizes, so that some values of every image are no full vector register
READS_VALUES = {"dpm_adaptive"}  # its step size follows an error that it has to read


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """v of a random U-Net of one level, conditioned on a vector; v = 0 is the denoiser of N(0, 1)."""
    config = UNetConfig(
        in_channels=2, out_channels=2, model_channels=8, num_res_blocks=1, attention_resolutions=(),
        channel_mult=(1,), num_heads=1, num_groups=4, num_classes="sequential", adm_in_channels=3,
    )  # fmt: skip
    unet = UNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.ndim > 1
        parameter.copy_(values / parameter[0].numel() ** 0.5 if matrix else 1 + values / 10)
    return Predictor(lambda x, t, cond: unet(x, t, cond.context, cond.vector) / 5, SCHEDULE, "v")


QUICK = {"restarts": "3,1,0.1,2", "rtol": 0.5, "atol": 0.1}
"""For tests that ask no more of a row than its number of steps."""


def bound(row: Sampler) -> dict[str, Any]:
    """The options that the row cannot do without."""
    return {"schedule": SCHEDULE} if "schedule" in row.options else {}


def quick(row: Sampler) -> dict[str, Any]:
    """Options with which the row takes few steps of its own."""
    return {name: value for name, value in QUICK.items() if name in row.options}


def spaced(row: Sampler, spacing: str, steps: int) -> Spacing:
    """The levels of a run, as generation asks for them."""
    return space(spacing, SCHEDULE, steps, discard_penultimate=row.discard_penultimate)


def noise_of(row: Sampler, seeds: Sequence[int], levels: Sequence[float]) -> Callable[[float, float], Tensor]:
    """The kind of noise that the row declares."""
    if row.noise == "fresh":
        return ImageNoise(seeds, SHAPE, device=CPU)
    low = min(level for level in levels if level > 0)
    return BrownianNoise(seeds, SHAPE, low=low, high=levels[0], device=CPU)


def drawn(
    predictor: Predictor,
    row: Sampler,
    levels: Spacing,
    seeds: Sequence[int],
    *,
    batched: bool = False,
    scale: float = 3.0,
    **options: Any,
) -> list[Step]:
    """The steps of a guided run of pictures with these seeds; picture i is conditioned on seeds[i]."""
    vector = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    branches = {
        "cond": (predictor, Conditioning(vector=vector)),
        "uncond": (predictor, Conditioning(vector=torch.zeros_like(vector))),
    }
    denoise = guided(branches, cfg(scale), batched=batched)
    x = ImageNoise(seeds, SHAPE, device=CPU).initial() * levels.start_scale
    noise = noise_of(row, seeds, levels.sigmas)
    return list(row(denoise, x, levels.sigmas, noise, **bound(row), **options))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "counts", [(1, 2, 3), pytest.param((20, 50), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_finite(predictor: Predictor, counts: tuple[int, ...], name: str, spacing: str) -> None:
    row = SAMPLERS[name]
    for steps in counts:
        run = drawn(predictor, row, spaced(row, spacing, steps), [7], scale=1.0, **quick(row))
        assert all(step.x.isfinite().all() and step.denoised.isfinite().all() for step in run)
        assert run[-1].x.dtype == torch.float32
        assert run[-1].x.shape == (1, *SHAPE)
        assert row.ends_only or name == "restart" or len(run) == steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_finite_at_its_default(predictor: Predictor, name: str) -> None:
    row = SAMPLERS[name]
    run = drawn(predictor, row, spaced(row, row.spacing, 20), [7])
    assert all(step.x.isfinite().all() for step in run)


CASES = (
    [(name, {}) for name in SAMPLERS]
    + [(name, {"eta": 0.7}) for name, row in SAMPLERS.items() if "eta" in row.options and not row.stochastic]
    + [(name, {"s_churn": 3.0}) for name, row in SAMPLERS.items() if "s_churn" in row.options]
)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_alone_and_in_a_batch(predictor: Predictor, name: str, options: dict[str, float]) -> None:
    """Byte for byte where every call of the network is one image and one condition."""
    row, seeds = SAMPLERS[name], [3, 5, 8, 13]
    levels, chosen = spaced(row, row.spacing, 4), {**quick(row), **options}
    together = drawn(predictor, row, levels, seeds, **chosen)[-1].x
    for place, seed in enumerate(seeds):
        alone = drawn(predictor, row, levels, [seed], **chosen)[-1].x
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize("name", SAMPLERS)
def test_in_one_pass(predictor: Predictor, name: str) -> None:
    """Batched calls round differently, no more."""
    row, seeds = SAMPLERS[name], [3, 5, 8, 13]
    levels = spaced(row, row.spacing, 4)

    def run(seeds: Sequence[int]) -> Tensor:
        return drawn(predictor, row, levels, seeds, batched=True, **quick(row))[-1].x

    together, alone = run(seeds), torch.cat([run([seed]) for seed in seeds])
    assert ((together - alone).abs() > 1 / 255).float().mean() <= 1e-3
    if name in READS_VALUES:  # it steps each image by itself
        assert torch.equal(together, alone)


class OnlyMeta(TorchDispatchMode):
    """Refuses every operation whose answer lies elsewhere: a copy to or from the device waits for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(answer):
            assert isinstance(leaf, Tensor), f"{func} gives a value to Python"
            assert leaf.device.type == "meta", f"{func} gives a tensor on {leaf.device}"
        return answer


def without_values(row: Sampler, sigmas: Sequence[float]) -> int:
    """The number of steps of a run whose tensors have shapes and no values: what reads one, fails."""
    x = torch.empty(2, *SHAPE, device="meta")
    denoise = Unguided(lambda x, sigma: x * (1 / (1 + sigma)))
    with OnlyMeta():
        return len(list(row(denoise, x, sigmas, lambda s, t: torch.empty_like(x), **bound(row))))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in READS_VALUES])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_no_value_is_read(name: str, end: float) -> None:
    """So nothing in the loop can wait for a device, or depend on what is drawn."""
    assert without_values(SAMPLERS[name], [14.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.2, end]) > 0


def _reading(denoise: Any, x: Tensor, sigmas: Any, noise: Any, how: Callable[[Tensor], Any]) -> Any:
    yield how(x)


@pytest.mark.parametrize(
    "how",
    [Tensor.item, lambda x: bool((x > 0).all()), Tensor.tolist, Tensor.cpu, lambda x: torch.tensor(2.0) * x],
)
def test_a_read_is_seen(how: Callable[[Tensor], Any]) -> None:
    row = Sampler(lambda d, x, s, n: _reading(d, x, s, n, how), 1, 1, False, "karras", "", "")
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        without_values(row, [2.0, 1.0])

"""When controls count and how much: steps, fading, weights of samples and places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.diffusion.control import DECAY, Influence, timed, weigh, weighted_hint
from sfumato.errors import InputError


@pytest.mark.parametrize(
    ("start", "end", "steps", "expected"),
    [
        (0, 1, 4, [0, 1, 2, 3]),
        (0, 0.5, 4, [0, 1]),
        (0.5, 1, 4, [2, 3]),
        (0.3, 0.8, 10, [3, 4, 5, 6, 7]),
        (0.1, 0.7, 3, [1]),
        (0.2, 0.2, 5, []),
        (0, 0.3, 30, list(range(9))),
    ],
)
def test_a_step_counts_that_lies_in_the_span_wholly(
    start: float, end: float, steps: int, expected: list[int]
) -> None:
    """As in diffusers: keep = not (i / n < start or (i + 1) / n > end)."""
    influence = Influence(1.0, start, end)
    assert [step for step in range(steps) if influence.active(step, steps)] == expected


def test_without_weight_no_step_counts() -> None:
    assert not any(Influence(0.0).active(step, 4) for step in range(4))


def test_fading_is_that_of_guess_mode() -> None:
    """strength * 0.825 ** (12 - i) for the 13 of Stable Diffusion 1, in ControlNet's own code."""
    assert Influence(mode="balanced").residual_weights(13) == [1.0] * 13
    for mode in ("prompt", "control"):
        expected = [0.825 ** float(12 - i) for i in range(13)]
        assert Influence(mode=mode).residual_weights(13) == expected  # type: ignore[arg-type]
    assert Influence(mode="prompt").residual_weights(10)[0] == DECAY**9


def test_only_control_mode_spares_the_unconditional_side() -> None:
    assert [Influence(0.7, mode=mode).unguided_weight() for mode in ("balanced", "prompt")] == [0.7, 0.7]  # type: ignore[arg-type]
    assert Influence(0.7, mode="control").unguided_weight() == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "promt"}, "prompt"),
        ({"weight": float("nan")}, "weight"),
        ({"weight": 1e9}, "weight"),
        ({"start": 0.6, "end": 0.5}, "starts"),
        ({"end": 1.2}, "ends"),
        ({"start": float("nan")}, "starts"),
    ],
)
def test_what_is_no_influence_is_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        Influence(**options)  # type: ignore[arg-type]


def test_stages_follow_the_noise_levels() -> None:
    made: list[tuple[bool, ...]] = []

    def make(active: tuple[bool, ...]) -> Any:
        made.append(active)
        return lambda x, sigma, cond: active

    sigmas = [8.0, 6.0, 4.0, 2.0, 0.0]
    predictor = timed(make, [Influence(1, 0, 0.5), Influence(1, 0.25, 0.75)], sigmas)
    x, cond = torch.zeros(1), Conditioning()

    def at(sigma: float) -> Any:
        return predictor(x, sigma, cond)

    assert [at(sigma) for sigma in sigmas[:-1]] == [
        (True, False),
        (True, True),
        (False, True),
        (False, False),
    ]
    assert [at(sigma) for sigma in (9.0, 6.1, 5.0, 0.1, 0.0)] == [
        (True, False), (True, False), (True, True), (False, False), (False, False),
    ]  # fmt: skip
    assert len(made) == 4


def test_where_nothing_changes_there_is_one_predictor() -> None:
    def predictor(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        return x

    assert timed(lambda active: predictor, [Influence(), Influence()], [3.0, 2.0, 1.0]) is predictor
    assert timed(lambda active: predictor, [], [3.0]) is predictor


def test_weights_travel_as_a_channel_and_scale_what_is_added() -> None:
    picture, residual = torch.rand(2, 3, 16, 8), torch.rand(2, 5, 4, 2)
    hint = weighted_hint(picture, 0.5)
    assert torch.equal(hint[:, :3], picture)
    assert torch.equal(weigh(residual, hint[:, 3:]), residual * 0.5)
    mask = torch.zeros(1, 1, 16, 8)
    mask[..., :8, :] = 1
    weights = weighted_hint(picture, 2.0, mask)[:, 3:]
    found = weigh(residual, weights)
    assert torch.equal(found[..., :2, :], residual[..., :2, :] * 2) and not found[..., 2:, :].any()
    assert torch.equal(
        weigh(residual.mean((2, 3), keepdim=True), weights), residual.mean((2, 3), keepdim=True)
    )

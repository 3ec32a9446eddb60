"""Philox: the published test vectors, and what GPUs were seen to draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfumato.diffusion.philox import PhiloxGenerator, box_muller, philox

WORD = 0xFFFFFFFF
VECTORS = {  # Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result
    "zeros": ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ([WORD] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS.values(), ids=list(VECTORS))
def test_published_vectors(counter: list[int], key: int, expected: str) -> None:
    words = philox([np.array([word], dtype=np.uint64) for word in counter], key)
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


# What torch prints after torch.manual_seed(0) for randn(8, 8), randn(8, 8), randn(8) on device="cuda":
# the first and the last row of the first, and first + second / 2 + third in the first row.
FIRST = [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284]
LAST = [-0.5499, -0.3231, -0.5469, 0.9049, 0.2837, 0.1210, 0.4730, -1.0823]
SUM_ABOVE_ZERO = {0: 1.7098, 4: 0.67049, 6: 0.34424, 7: 0.011223}


def test_what_a_gpu_draws() -> None:
    generator = PhiloxGenerator(0)
    first, second, third = generator.normal((8, 8)), generator.normal((8, 8)), generator.normal((8,))
    assert first.dtype == torch.float32 and first.shape == (8, 8)
    torch.testing.assert_close(first[0], torch.tensor(FIRST), rtol=0, atol=5e-5)
    torch.testing.assert_close(first[7], torch.tensor(LAST), rtol=0, atol=5e-5)
    total = (first + second / 2 + third)[0]
    for place, value in SUM_ABOVE_ZERO.items():
        assert total[place].item() == pytest.approx(value, abs=5e-5)
    assert all(total[place] < 0 for place in (1, 2, 3, 5))


def test_each_value_has_a_stream_of_its_own() -> None:
    long, short = PhiloxGenerator(7).normal((1000,)), PhiloxGenerator(7).normal((10,))
    assert torch.equal(long[:10], short)
    assert torch.equal(PhiloxGenerator(7).normal((4, 250)).flatten(), long)


def test_the_offset_advances_by_a_call_and_not_by_its_values() -> None:
    first, second = PhiloxGenerator(5), PhiloxGenerator(5)
    first.normal((1,))
    second.normal((4, 64, 64))
    assert torch.equal(first.normal((6,)), second.normal((6,)))


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**32, 2**64 - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    values = PhiloxGenerator(seed).normal((8,))
    assert torch.equal(values, PhiloxGenerator(seed % 2**64).normal((8,)))
    others = (seed ^ 1, seed % 2**32, (seed % 2**64) >> 32)
    assert not any(torch.equal(values, PhiloxGenerator(o).normal((8,))) for o in others if o != seed)


def test_standard_normal_and_independent_of_the_call_before() -> None:
    generator = PhiloxGenerator(11)
    values = torch.stack([generator.normal((100_000,)) for _ in range(2)])
    assert values.mean(dim=1).abs().max() < 0.01
    assert (values.std(dim=1) - 1).abs().max() < 0.01
    assert abs(float((values[0] * values[1]).mean())) < 0.01
    below = [float((values < level).float().mean()) for level in (-2, -1, 0, 1, 2)]
    expected = [0.5 * (1 + math.erf(level / math.sqrt(2))) for level in (-2, -1, 0, 1, 2)]
    assert below == pytest.approx(expected, abs=4e-3)


def test_the_ends_of_the_words_stay_finite() -> None:
    ends = np.array([0, 1, WORD - 1, WORD], dtype=np.uint64)
    values = box_muller(np.repeat(ends, 4), np.tile(ends, 4))
    assert values.dtype == np.float32 and bool(np.isfinite(values).all())
    assert np.abs(values).max() < 7

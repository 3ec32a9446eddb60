"""The incomplete beta function and its inverse against scipy and closed forms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc, betaincinv
from scipy.stats import beta as distribution

from sfumato.diffusion.special import beta_quantile, incomplete_beta
from sfumato.errors import InputError

PARAMETERS = (0.05, 0.3, 0.5, 0.6, 1.0, 1.5, 3.0, 20.0, 200.0, 1000.0)
SHARES = (0.0, 1e-12, 1e-6, 1e-5, 2e-5, 1e-3, 0.05, 0.2, 0.5, 0.7, 0.9, 0.99, 0.9999, 1.0)


@pytest.mark.parametrize("a", PARAMETERS)
def test_against_scipy(a: float) -> None:
    for b in PARAMETERS:
        for share in SHARES:
            assert beta_quantile(share, a, b) == pytest.approx(betaincinv(a, b, share), abs=1e-12, rel=1e-10)
        for x in (0.0, 1e-9, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
            assert incomplete_beta(x, a, b) == pytest.approx(betainc(a, b, x), abs=1e-12)


def test_the_spacing_of_the_paper() -> None:
    shares = [i / 499 for i in range(500)]
    expected = distribution.ppf(shares, 0.6, 0.6).tolist()
    got = [beta_quantile(share, 0.6, 0.6) for share in shares]
    assert got == pytest.approx(expected, abs=1e-13, rel=1e-12)


@settings(deadline=None, max_examples=200)  # a busy machine is not a failure
@given(st.floats(0, 1), st.floats(0.1, 50), st.floats(0.1, 50))
def test_one_inverts_the_other(share: float, a: float, b: float) -> None:
    x = beta_quantile(share, a, b)
    assert 0 <= x <= 1
    if 1e-3 < x < 1 - 1e-3:  # where x is a good number of digits away from both ends
        assert incomplete_beta(x, a, b) == pytest.approx(share, abs=1e-11)


def test_closed_forms() -> None:
    assert beta_quantile(0.3, 1, 1) == pytest.approx(0.3)
    assert beta_quantile(0.3, 0.5, 0.5) == pytest.approx(math.sin(math.pi * 0.15) ** 2)  # arcsine's
    assert beta_quantile(0.3, 3, 1) == pytest.approx(0.3 ** (1 / 3))
    assert beta_quantile(0.5, 7, 7) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "values", [(-0.1, 1.0, 1.0), (1.1, 1.0, 1.0), (0.5, 0.0, 1.0), (0.5, 1.0, math.inf), (math.nan, 1.0, 1.0)]
)
def test_refused(values: tuple[float, float, float]) -> None:
    for function in (beta_quantile, incomplete_beta):
        with pytest.raises(InputError, match="alpha"):
            function(*values)

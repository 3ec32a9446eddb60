"""The regularised incomplete beta function and its inverse, the quantiles of a beta distribution.

Continued fraction: Abramowitz and Stegun 1964, 26.5.8; evaluated by Lentz's method as modified by Thompson
and Barnett 1986.
"""

from __future__ import annotations

import math

from sfumato import errors

PRECISION = 1e-15
ITERATIONS = 500  # the fraction needs about sqrt(max(a, b)) of them, Newton's method about six
TINY = 1e-300
TINY_SHARE = 1e-5
HIGHEST_LOG = -1e-9  # of x while searching: 1 - x stays a number


def incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), the share of a beta(a, b) distribution that lies below x in 0..1; a, b > 0."""
    _check("x", x, a, b)
    if x in (0.0, 1.0):
        return x
    return math.exp(_log_incomplete_beta(math.log(x), a, b))


def beta_quantile(share: float, a: float, b: float) -> float:
    """The x in 0..1 with I_x(a, b) = share; share in 0..1; a, b > 0.

    Within 1e-12 for a, b up to 1000. `InputError` outside these ranges.
    """
    _check("share", share, a, b)
    if share in (0.0, 1.0):
        return share
    # From the nearer end, where x is small; but 1 - share would round away what a tiny share says.
    if share > max(incomplete_beta(0.5, a, b), TINY_SHARE):
        return 1 - _lower_quantile(1 - share, b, a)
    return _lower_quantile(share, a, b)


def _lower_quantile(share: float, a: float, b: float) -> float:
    """The quantile by Newton's method in log x and log I, where the curve is nearly a line."""
    wanted = math.log(share)
    log_x = min((wanted + math.log(a) + _log_beta(a, b)) / a, math.log(0.5))  # I_x ~ x^a / (a B(a, b))
    for _ in range(ITERATIONS):
        log_share = _log_incomplete_beta(log_x, a, b)
        log_slope = a * log_x + (b - 1) * math.log1p(-math.exp(log_x)) - _log_beta(a, b) - log_share
        step = (log_share - wanted) / math.exp(log_slope)
        log_x = min(log_x - step, HIGHEST_LOG)
        if abs(step) <= PRECISION * max(1.0, abs(log_x)):
            break
    return math.exp(log_x)


def _log_incomplete_beta(log_x: float, a: float, b: float) -> float:
    x = math.exp(log_x)
    log_front = a * log_x + b * math.log1p(-x) - _log_beta(a, b)
    if x <= (a + 1) / (a + b + 2):
        return log_front + math.log(_fraction(x, a, b) / a)
    return math.log1p(-math.exp(log_front) * _fraction(1 - x, b, a) / b)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d_1 / (1 + d_2 / (1 + ...))) with the coefficients of 26.5.8."""
    value = numerator = 1.0
    denominator = 0.0
    for index in range(ITERATIONS):
        half = index // 2
        if index == 0:
            coefficient = 1.0
        elif index % 2 == 0:
            coefficient = half * (b - half) * x / ((a + index - 1) * (a + index))
        else:
            coefficient = -(a + half) * (a + b + half) * x / ((a + index - 1) * (a + index))
        denominator = 1 / (1 + coefficient * denominator or TINY)
        numerator = 1 + coefficient / numerator or TINY
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < PRECISION:
            break
    return value - 1


def _check(name: str, value: float, a: float, b: float) -> None:
    if not (0 <= value <= 1 and 0 < a < math.inf and 0 < b < math.inf):
        raise errors.InputError(
            f"{name} is {value:g}, alpha {a:g} and beta {b:g}",
            f"{name} lies in 0..1; alpha and beta are above 0.",
        )

"""Splits by hash: deterministic, independent of order, and fair to every single value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.split import held_out_pairs, is_held_out, pick, unit


def test_units_are_pinned() -> None:
    assert unit("drawing", "1F98A") == pytest.approx(0.0311, abs=1e-4)
    assert unit("ab", "c") != unit("a", "bc")


def test_share_is_kept() -> None:
    held = sum(is_held_out(0.25, "object", number) for number in range(4000))
    assert 0.23 < held / 4000 < 0.27


def test_every_option_is_picked() -> None:
    assert {pick("abc", "name", number) for number in range(60)} == set("abc")


names = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=2, max_size=6, unique=True)


@given(first=names, second=names, share=st.floats(0, 1))
def test_every_value_keeps_a_training_pair(first: list[str], second: list[str], share: float) -> None:
    held = held_out_pairs("test", first, second, share)
    for a in first:
        assert any((a, b) not in held for b in second)
    for b in second:
        assert any((a, b) not in held for a in first)
    assert held == held_out_pairs("test", first[::-1], second[::-1], share)

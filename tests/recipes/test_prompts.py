"""Prompt matrices and files of prompts with options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.recipes.prompts import matrix, read_line, read_prompts
from sfumato.request import Request


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a fox", ["a fox"]),
        ("a fox | in snow", ["a fox", "a fox, in snow"]),
        ("a|b|c", ["a", "a, b", "a, c", "a, b, c"]),
        ("a,| b ,|", ["a", "a, b", "a", "a, b"]),
        ("|b", ["", "b"]),
        ("a [x|y] {p|q}|b", ["a [x|y] {p|q}", "a [x|y] {p|q}, b"]),
        (r"a \| b|c", [r"a \| b", r"a \| b, c"]),
        ("a [x|y", ["a [x", "a [x, y"]),
        ("a ]x|y", ["a ]x", "a ]x, y"]),
    ],
)
def test_a_matrix(prompt: str, expected: list[str]) -> None:
    assert matrix(prompt) == expected


def test_a_matrix_has_two_to_the_parts() -> None:
    prompts = matrix("|".join("abcdefghijk"))
    assert len(prompts) == len(set(prompts)) == 1024
    with pytest.raises(InputError, match="12 parts has 2048 prompts"):
        matrix("|".join("abcdefghijkl"))


@given(st.text("a|[]{}()<>\\", max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_has_a_matrix_or_too_many_parts(prompt: str) -> None:
    try:
        assert 1 <= len(matrix(prompt)) <= 1024
    except InputError as error:
        assert "parts" in error.message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a fox", {"prompt": "a fox"}),
        ('a fox, it\'s "red" --seed 3 --steps=20', {
            "prompt": 'a fox, it\'s "red"', "seed": "3", "steps": "20",
        }),
        ("fox -- in snow --s 5", {"prompt": "fox -- in snow", "steps": "5"}),
        (
            '--prompt "a fox" --negative_prompt "no, dog" --sampler_name "DPM++ 2M" --cfg_scale 7',
            {"prompt": "a fox", "negative_prompt": "no, dog", "sampler": "DPM++ 2M", "guidance": "7"},
        ),
        ("--n dark --w 64 --h 32 --d 9 --l 2", {
            "negative_prompt": "dark", "width": "64", "height": "32", "seed": "9", "guidance": "2",
        }),
        ("a --negative-prompt= --batch_size 2", {"prompt": "a", "negative_prompt": "", "num_images": "2"}),
        ("a --deterministic --no-apg --steps 2", {
            "prompt": "a", "deterministic": True, "apg": False, "steps": "2",
        }),
        ("a --deterministic=false", {"prompt": "a", "deterministic": "false"}),
    ],
)  # fmt: skip
def test_a_line(line: str, expected: dict[str, Any]) -> None:
    assert read_line(line) == expected


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# two foxes\r\n\r\na fox --seed 3\n  日本の狐 --steps 2\n".encode())
    assert read_prompts(path, Request(steps=9, guidance=2)) == [
        Request(prompt="a fox", seed=3, steps=9, guidance=2),
        Request(prompt="日本の狐", steps=2, guidance=2),
    ]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a\nb --sedd 3", "line 2 of .*: there is no option 'sedd'", "Did you mean 'seed'"),
        ("a --steps 0", "line 1 of .*: steps is 0; it should be greater", ""),
        ("a --steps", "the option --steps has no value", ""),
        ("a --seed 3 4", "'4' follows --seed", "quotes"),
        ("a --seed 3 --seed 4", "'seed' is given twice", ""),
        ('a --negative-prompt "b', "its quotes do not match", ""),
        ("a --sampler nobody's", "its quotes do not match", ""),
        ("a --sampler nobody", "there is no sampler 'nobody'", ""),
        ("# nothing\n", "holds no prompts", ""),
        ("a\n" * 10_001, "holds more than 10,000 prompts", ""),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path, Request())
    assert hint in caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.txt", "missing.txt", "."):
        with pytest.raises(InputError, match="cannot read the prompts"):
            read_prompts(tmp_path / name, Request())

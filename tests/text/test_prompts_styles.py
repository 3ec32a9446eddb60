"""Styles: files that other tools wrote, and what a style does to a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.errors import InputError
from sfumato.text.styles import Style, apply_styles, read_styles, write_styles

STYLES = {
    style.name: style
    for style in (
        Style("oil", "oil painting", "photo"),
        Style("frame", "a (frame:1.2) around {prompt}, {prompt}", ""),
        Style("nothing"),
    )
}


def test_reading_and_writing(tmp_path: Path) -> None:
    path = tmp_path / "styles.csv"
    path.write_text(write_styles([*STYLES.values(), Style("q", 'a, "b"\nc')]), encoding="utf-8")
    assert read_styles(path) == {**STYLES, "q": Style("q", 'a, "b"\nc')}
    path.write_bytes("\ufeffname,prompt\r\noil, paint\r\n,\r\nü\r\n".encode())
    assert read_styles(path) == {"oil": Style("oil", " paint"), "ü": Style("ü")}
    path.write_text("")
    assert read_styles(path) == {}


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "styles.csv"
    path.write_text("title,words\na,b\n")
    with pytest.raises(InputError, match="styles need `name`"):
        read_styles(path)
    path.write_text("name,prompt\na," + "b" * 200_000)
    with pytest.raises(InputError, match="no CSV file of styles"):
        read_styles(path)


def test_applying() -> None:
    assert apply_styles(" a fox ", "", ["oil"], STYLES) == ("a fox, oil painting", "photo")
    assert apply_styles("", "blur", ["oil", "nothing"], STYLES) == ("oil painting", "blur, photo")
    prompt, _ = apply_styles("a", "", ["oil", "frame"], STYLES)
    assert prompt == "a (frame:1.2) around a, oil painting, a, oil painting"


def test_unknown_and_growing_styles_are_refused() -> None:
    with pytest.raises(InputError, match=r"no style 'oli'[\s\S]*'oil'"):
        apply_styles("a", "", ["oli"], STYLES)
    with pytest.raises(InputError, match="grows beyond"):
        apply_styles("a", "", ["frame"] * 64, STYLES)

"""Names of LoRA and embeddings are found in what a scan saw; no name reaches anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.checkpoints.addons.apply import AddonIndex
from sfumato.errors import InputError


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index")
    (root / "secret.safetensors").write_bytes(b"x")
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "far.safetensors").write_bytes(b"x")
    return root


@pytest.fixture(scope="module")
def folder(outside: Path) -> Path:
    folder = outside / "lora"
    for name in ("ink.safetensors", "style/oil.pt", "style/a..png.safetensors", "twice.pt", "old/twice.bin",
                 "both.pt", "both.safetensors", "UPPER.SAFETENSORS", ".hidden.safetensors", ".git/x.pt",
                 "notes.txt", "two\nlines.pt", "dot.ted.name.safetensors"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "out.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "away").symlink_to(outside / "elsewhere")
    (folder / "within.safetensors").symlink_to(folder / "style" / "oil.pt")
    (folder / "broken.safetensors").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> AddonIndex:
    return AddonIndex([folder])


def test_a_file_goes_by_its_stem_its_place_and_both_with_endings(folder: Path) -> None:
    index = AddonIndex([folder])
    for name in ("oil", "style/oil", "oil.pt", "style/oil.pt"):
        assert index.find(name) == folder / "style" / "oil.pt"
    assert index.find("UPPER") == folder / "UPPER.SAFETENSORS"
    assert index.find("a..png") == folder / "style" / "a..png.safetensors"
    assert index.find("dot.ted.name") == folder / "dot.ted.name.safetensors"
    assert index.find("within") == folder / "within.safetensors"
    assert "oil" in index and "nothing" not in index


def test_names_are_the_shortest_that_mean_one_file(folder: Path) -> None:
    assert AddonIndex([folder]).names == (
        "UPPER", "a..png", "both.pt", "both.safetensors", "dot.ted.name", "ink", "oil", "old/twice",
        "twice.pt", "within",
    )  # fmt: skip


def test_what_means_several_files_is_refused_with_the_choices(folder: Path) -> None:
    with pytest.raises(InputError, match="'twice' means 2 files") as caught:
        AddonIndex([folder]).find("twice")
    assert "old/twice" in caught.value.hint and "twice.pt" in caught.value.hint
    with pytest.raises(InputError, match="means 2 files") as caught:
        AddonIndex([folder]).find("both")
    assert "both.safetensors" in caught.value.hint


def test_two_folders_are_one_index(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ink.pt").write_bytes(b"x")
    (tmp_path / "new.pt").write_bytes(b"x")
    index = AddonIndex([folder, tmp_path])
    assert index.find("new") == tmp_path / "new.pt"
    with pytest.raises(InputError, match="means 2 files"):
        index.find("ink")
    (tmp_path / "later.pt").write_bytes(b"x")
    assert "later" not in index
    index.scan()
    assert index.find("later") == tmp_path / "later.pt"


@pytest.mark.parametrize(
    "name",
    ["../secret", "../secret.safetensors", "out", "away/far", "far", "loop/ink", "style/../ink", "./ink",
     "/ink", "", "ink\0", "ink.safetensors\0.txt", "..", "style", "style\\oil", "%2e%2e/secret", ".hidden",
     "x", "notes", "CON", "broken", "two\nlines", "\\\\host\\ink", "file://ink", "ink/"],
)  # fmt: skip
def test_names_of_nothing_inside_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match="there is no"):
        AddonIndex([folder]).find(name)


def test_absolute_names_are_refused(folder: Path, outside: Path) -> None:
    for path in (outside / "secret.safetensors", folder / "ink.safetensors"):
        with pytest.raises(InputError, match="there is no"):
            AddonIndex([folder]).find(str(path))


def test_the_nearest_name_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        AddonIndex([folder]).find("inc")
    assert caught.value.hint == "Did you mean 'ink'?"
    for number in range(200):
        (tmp_path / f"some-{number:03}.pt").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        AddonIndex([tmp_path]).find("\x1b[2J" + "w" * 5000)
    assert len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
    assert caught.value.hint == "Choose one of 200, such as 'some-000'."


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        AddonIndex([tmp_path / "none"])
    with pytest.raises(InputError, match="there is no 'a'"):
        AddonIndex([tmp_path]).find("a")
    assert AddonIndex([]).names == ()


PIECES = st.lists(st.sampled_from(["..", "style", "oil", "ink", ".", "", "/", "secret"]))


@settings(max_examples=500, deadline=None)
@given(name=st.one_of(st.text(), PIECES.map("/".join)))
def test_any_name_gives_a_file_inside_or_an_error(index: AddonIndex, name: str) -> None:
    try:
        found = index.find(name)
    except InputError:
        return
    assert os.path.realpath(found).startswith(os.path.realpath(index.folders[0]) + os.sep)

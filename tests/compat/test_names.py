"""docs/names.md: every name on it is there, every path exists, and its example runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import sfumato

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
TABLES = "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))
DOTTED = sorted(set(re.findall(r"`(sfumato(?:\.\w+)+)`", TEXT)))
PATHS = sorted(set(re.findall(r"`((?:src|configs|benchmarks|docs|tests)/[\w./-]+)`", TEXT)))
LINKS = sorted(set(re.findall(r"\]\(([\w./-]+)\)", TEXT)))


def find(name: str) -> object:
    """What a dotted name means: the longest part of it that is a module, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is no module")


def test_the_page_names_what_it_is_for() -> None:
    assert len(DOTTED) > 80 and len(PATHS) >= 5 and LINKS
    for word in (
        "ddpm.py", "openaimodel.py", "autoencoder.py", "diffusionmodules/model.py", "FrozenClipText",
        "*.ckpt",
        "get_input", "Attention.py", "Unet.py", "DiffusionModel.py", "config_SD.ini",
        "CrossAttnDownBlock2D", "get_learned_conditioning", "encode_first_stage",
        "decode_first_stage", "UNetMidBlock2DCrossAttn",
    ):  # fmt: skip
        assert word in TABLES, word


@pytest.mark.parametrize("name", DOTTED)
def test_a_name_is_there(name: str) -> None:
    found = find(name)
    assert found is not None
    assert getattr(found, "__doc__", None), "what the page leads to says what it is"


@pytest.mark.parametrize("path", PATHS)
def test_a_path_exists(path: str) -> None:
    assert (ROOT / path).exists() and (not path.endswith("/"))


@pytest.mark.parametrize("path", LINKS)
def test_a_link_leads_somewhere(path: str) -> None:
    assert (ROOT / "docs" / path).is_file()


def test_a_name_that_is_not_there_is_found_out() -> None:
    with pytest.raises(AttributeError):
        find("sfumato.compat.ldm.LMSSampler")
    with pytest.raises(AssertionError, match="no module"):
        find("sfumat.nothing")


def test_all_names_of_the_adapters_are_on_the_page() -> None:
    for room in ("ldm", "notes"):
        module = importlib.import_module(f"sfumato.compat.{room}")
        for name in module.__all__:
            assert getattr(module, name).__doc__
            assert f"`sfumato.compat.{room}.{name}`" in TEXT, name


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "names.md", "exec"), names)
    picture = names["x"]
    side = sfumato.load().image_size[0]
    assert tuple(picture.shape) == (1, 3, side, side)  # type: ignore[attr-defined]
    assert float(picture.std()) > 0.02  # type: ignore[attr-defined]

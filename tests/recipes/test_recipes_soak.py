"""The soak of recipes, with a small count."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from sfumato.recipes import embed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak" / "recipes.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_recipes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_hundred_of_each(soak: ModuleType, tmp_path: Path) -> None:
    image = Image.new("RGB", (5, 4))
    whole = {name: embed.encode(image, kind, {"prompt": "fox"}) for name, kind in embed.FORMATS.items()}
    for number in range(100):
        soak.strangers(random.Random(number))
        soak.damaged(random.Random(number), whole, tmp_path)
        soak.ours(random.Random(number), image, tmp_path)


def test_the_soak_sees_what_it_is_for(
    soak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "read", lambda path: soak.from_texts({}))
    with pytest.raises(AssertionError):
        soak.ours(random.Random(0), Image.new("RGB", (5, 4)), tmp_path)

"""The soak of the prompt language, with a small count."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sfumato.text.emphasis import segments
from sfumato.text.prompt_choices import read
from sfumato.text.prompt_tree import render
from sfumato.text.prompts import parse
from sfumato.text.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak" / "prompts.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_prompts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_generated_texts_keep_the_promises(soak: ModuleType) -> None:
    tokenizer = Tokenizer.train(["a red fox"], 530, 12)
    for number in range(600):
        soak.check(soak.soup(number), tokenizer)
    assert soak.soup(3) == soak.soup(3) != soak.soup(5)


def test_inputs_that_are_slow_for_others_are_read(soak: ModuleType) -> None:
    # How long they take at full length is measured there.
    for name, text in soak.slow_inputs().items():
        part = text[:3000] + text[-3000:]
        assert render(parse(part)) == part, name
        assert segments(part), name
        assert read(part), name

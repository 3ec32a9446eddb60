"""`sfumato prompt`: the tree, the steps, the tokens and what has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato.cli import main


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["prompt", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_page_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a ((red) fox:1.2) [snow:sea:0.5] [sun|moon] <lora:x:0.5:2> <hypernet:h:1> embedding:e __c__\n# no"
    assert main(["prompt", text, "--steps", "4"]) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert err == ""
    for line in (
        "times 1.2", "times 1.1", "text 'red'", "until 0.5", "then", "in turn", "or",
        "network 'x': unet 0.5, text encoder 2", "embedding 'e'", "ignored '<hypernet:h:1>'",
        "ignored '# no'", "unknown wildcard 'c'", "step 1: text 1", "step 4: text 4", "chunk 1: 8 tokens",
        "a red:1.32 fox:1.2 snow sun __ c __",
    ):  # fmt: skip
        assert line in lines, line


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = told(capsys, "a (b:1.5) AND [c::1]:0.5", "--steps", "3")
    assert values["tree"][0]["part"][1] == {
        "node": "emphasis", "factor": 1.5, "closed": True, "items": [{"node": "text", "source": "b"}]
    }  # fmt: skip
    assert values["branches"] == [
        {"weight": 1.0, "stages": [{"until": 3, "text": "a (b:1.5) "}]},
        {"weight": 0.5, "stages": [{"until": 1, "text": " c"}, {"until": 3, "text": " "}]},
    ]
    assert [(token["text"], token["weight"]) for token in values["texts"]["a (b:1.5) "][0]] == [
        ("a", 1.0), ("b", 1.5)
    ]  # fmt: skip
    assert values["texts"][" "] == [[]]


def test_options(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model_file: Path) -> None:
    assert len(told(capsys, "a AND b")["tree"]) == 2
    assert len(told(capsys, "a AND b", "--negative")["tree"]) == 1
    comfyui = told(capsys, "((a:1.5))", "--dialect", "comfyui")["texts"]["((a:1.5))"]
    assert comfyui[0][0]["weight"] == 1.5
    (tmp_path / "c.txt").write_text("red\n")
    values = told(capsys, "{a|b} __c__ __d__", "--wildcards", str(tmp_path), "--seed", "3")
    assert values["expanded"] in {"a red __d__", "b red __d__"} and values["unknown_wildcards"] == ["d"]
    rows = told(capsys, "a, " * 100, "--model", str(tiny_model_file))["texts"]["a, " * 100]
    assert len(rows) > 1


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["prompt", "a", "--steps", "0"]) == 2
    assert main(["prompt", "a", "--wildcards", str(tmp_path / "none")]) == 2
    assert main(["prompt", "a", "--model", str(tmp_path / "none.safetensors")]) != 0
    assert capsys.readouterr().out == ""

"""Devices and number formats by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfumato.errors import InputError, ResourceError
from sfumato.runtime import resolve_device, resolve_dtype, shapes_only


def test_devices() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device().type in {"cpu", "cuda", "mps"} and resolve_device("auto") == resolve_device()
    with pytest.raises(InputError, match="'cdua'") as caught:
        resolve_device("cdua")
    assert "'cuda'" in caught.value.hint
    with pytest.raises(ResourceError, match="not there"):
        resolve_device("cuda:99")


def test_dtypes() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype(None, cpu) == resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype(None, torch.device("cuda")) == torch.float16
    assert resolve_dtype("bfloat16", cpu) == resolve_dtype(torch.bfloat16, cpu) == torch.bfloat16
    for wrong in ("float12", torch.int8):
        with pytest.raises(InputError, match="there is no dtype"):
            resolve_dtype(wrong, cpu)


def test_shapes_only_builds_what_weights_can_be_assigned_to() -> None:
    with shapes_only():
        layer = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4))
    assert all(parameter.is_meta for parameter in layer.parameters())
    weights = {name: torch.ones(value.shape) for name, value in layer.state_dict().items()}
    layer.load_state_dict(weights, strict=True, assign=True)
    assert all(bool((parameter == 1).all()) for parameter in layer.parameters())
    assert bool(torch.nn.Linear(3, 3).weight.any()), "outside, modules are initialised as ever"


def test_loading_a_model_imports_no_compiler(tiny_model_file: Path) -> None:
    path = str(tiny_model_file)
    code = f"import sys, sfumato; sfumato.load({path!r}); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0

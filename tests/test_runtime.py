"""Devices and number formats by name."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import InputError, ResourceError
from sfumato.runtime import resolve_device, resolve_dtype


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

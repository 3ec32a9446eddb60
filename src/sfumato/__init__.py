"""Stable Diffusion to read, to train and to run (Rombach et al. 2022).

Public names are imported when first used, so `import sfumato` costs milliseconds and touches nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.generation import Result, generate, stream
    from sfumato.model import StableDiffusion, load
    from sfumato.request import Request

__version__ = "0.1.0"
__all__ = ["Request", "Result", "StableDiffusion", "__version__", "generate", "load", "stream"]

_HOMES = {
    "Request": "sfumato.request",
    "Result": "sfumato.generation",
    "StableDiffusion": "sfumato.model",
    "generate": "sfumato.generation",
    "load": "sfumato.model",
    "stream": "sfumato.generation",
}


def __getattr__(name: str) -> object:
    """The public name `name`, imported from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

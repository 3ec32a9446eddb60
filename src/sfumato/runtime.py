"""Devices and number formats: the only place that knows which are there and which are fast."""

from __future__ import annotations

import torch

from sfumato.errors import InputError, ResourceError, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; None or "auto" is the first of cuda, mps and cpu that is there.

    Raises `InputError` for a name that torch does not know, `ResourceError` for a device that is not there.
    """
    if device is None or device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if _available(name)))
    try:
        found = torch.device(device)
    except (RuntimeError, ValueError) as error:
        name = str(device)
        raise InputError(
            f"there is no device {name!r}", nearest(name, ["auto", "cpu", "cuda", "mps"])
        ) from error
    if not _available(found.type) or (
        found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    ):
        raise ResourceError(f"the device {str(found)!r} is not there", "Use --device auto, or --device cpu.")
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format asked for; None or "auto" is float16 on cuda and float32 elsewhere.

    A CPU is slower in half precision, and mps is not reliable in it. `InputError` for another name.
    """
    if dtype is None or dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise InputError(f"there is no dtype {str(dtype)!r}", nearest(str(dtype), ["auto", *DTYPES]))
    assert found is not None
    return found


def _available(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return kind == "cpu"

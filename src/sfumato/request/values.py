"""What the fields of a request are written as: names, options and lists, read from texts and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from sfumato.errors import InputError, nearest

Answer = TypeVar("Answer")
PIXEL_UPSCALERS = ("illustrations", "lanczos")
Options = dict[str, float | str]


class Fields(BaseModel):
    """Some fields of a request: frozen, without unknown ones, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def sampler_key(name: str) -> str:
    from sfumato.diffusion.names import resolve  # imports torch, which help texts do without

    return told(resolve, name)[0]


def spacing_key(name: str) -> str:
    from sfumato.diffusion.names import resolve_spacing

    return told(resolve_spacing, name)


def upscaler_key(name: str) -> str:
    from sfumato.diffusion.resize import LATENTS  # imports torch, as above

    known = (*PIXEL_UPSCALERS, *LATENTS)
    if name not in known:
        raise ValueError(f"there is no upscaler {name!r}. {nearest(name, known)}")
    return name


def told(read: Callable[[str], Answer], text: str) -> Answer:
    try:
        return read(text)
    except InputError as error:  # as pydantic takes it
        raise ValueError(f"{error.message}. {error.hint}") from error


def options(value: Any) -> Any:
    """A mapping, or its text form: name=value with white space between."""
    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    for word in value.split():
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise ValueError(f"{word!r} is no option. Options are written name=value, with spaces between")
        found[name] = number(text)
    return found


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def words(value: Any) -> Any:
    """Names, or a text of them with commas between."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def numbers(value: Any) -> Any:
    """Numbers, or a text of them with commas between."""
    return [number(part.strip()) for part in value.split(",")] if isinstance(value, str) else value


def path_or_values(value: Any) -> Any:
    """A path to a .npy or .safetensors file, or anything with a shape (a tensor, an array)."""
    if isinstance(value, str | Path):
        return Path(value)
    if not hasattr(value, "shape"):
        raise ValueError(f"{type(value).__name__} is neither a path nor a tensor")
    return value


def path_or_object(value: Any) -> Any:
    """A path or name to load from as text, or what was loaded."""
    return str(value) if isinstance(value, Path) else value


def folder(value: Any) -> Any:
    """A place on the disk as text, which recipes can hold."""
    return str(value) if isinstance(value, Path) else value


def pictures(value: Any) -> Any:
    """A path, the bytes of a file or a PIL picture, or one of them for each picture to draw."""
    if isinstance(value, list | tuple):
        return tuple(pictures(one) for one in value)
    if isinstance(value, str | Path):
        return Path(value)
    latents = getattr(value, "ndim", 0) == 4  # (n, z, h, w): a tensor
    if (
        not latents and not isinstance(value, bytes) and not hasattr(value, "getexif")
    ):  # as PIL's pictures have
        raise ValueError(f"{type(value).__name__} is neither a path nor a picture")
    return value

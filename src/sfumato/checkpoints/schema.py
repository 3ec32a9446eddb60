"""Strangers' JSON files: read within limits, checked by a schema, names in them looked up in tables."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sfumato.errors import CheckpointError, nearest

Schema = TypeVar("Schema", bound=BaseModel)
Built = TypeVar("Built")
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)]
Names = Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]

MAX_TEXT = 16 << 20  # bytes; CLIP's vocabulary has 1 MB, the index of a sharded SDXL 0.2
WRITTEN_FOR = "0.36.0"  # the oldest diffusers that what is written here is tested with


class Record(BaseModel):
    """A table of a stranger's file: keys that do not matter here are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of at most 16 MiB; `CheckpointError` for anything else, devices too."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TEXT:
                raise ValueError(f"it is no file of at most {MAX_TEXT} bytes")
            return file.read(MAX_TEXT).decode("utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot open {path}: {error.strerror or error}", "Check the path and its permissions."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Get the file again.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; `CheckpointError` where there is none."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "Get the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no table", "Get the file again.")
    return values


def parse(schema: type[Schema], values: Mapping[str, Any], place: Path | str) -> Schema:
    """`values` by a schema; `CheckpointError` naming the file, the key and what is wrong with it."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "it"
        given = shown(first["input"])
        raise CheckpointError(
            f"{place}: {key} is {given}; {first['msg']}", "Get the file again, or another version of it."
        ) from error


def shown(value: Any) -> str:
    """A value for a message. Lists are not written out: YAML's aliases can make them endless."""
    if isinstance(value, str):
        return repr(value[:80])
    return f"a {type(value).__name__}" if isinstance(value, Mapping | list | tuple) else str(value)[:80]


def class_name(values: Mapping[str, Any], allowed: Mapping[str, Any], place: Path) -> str:
    """The class that a config names, looked up and never imported; `CheckpointError` names the allowed."""
    for name in (values.get("_class_name"), *architectures(values)):
        if isinstance(name, str) and name in allowed:
            return name
    given = values.get("_class_name", values.get("architectures"))
    raise CheckpointError(
        f"{place} is of the class {str(given)[:80]!r}, which is not known here", nearest("", allowed)
    )


def architectures(values: Mapping[str, Any]) -> Sequence[str]:
    found = values.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def only(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], place: Path) -> None:
    """Refuse options that change the network into one that is not ours."""
    for key, choices in allowed.items():
        if key not in values:
            continue
        given = values[key]
        each = given if isinstance(given, list) and given else [given]
        if any(isinstance(item, list | dict) or item not in choices for item in each):
            raise CheckpointError(
                f"{place}: {key} is {str(given)[:80]!r}; supported is {' or '.join(map(repr, choices))}",
                "This network is of a kind that does not load here.",
            )


def built(make: Callable[[], Built], place: Path) -> Built:
    try:
        return make()
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # InputError is a ValueError
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{place} describes no network: {cause}", "Get the file again.") from error


def expressible(reasons: Mapping[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointError(
                f"the diffusers layout cannot hold {reason}", "Write the ldm layout instead."
            )

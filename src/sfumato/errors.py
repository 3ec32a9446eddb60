"""The errors that people meet: each has a stable code, one line of cause and one line of what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SfumatoError(Exception):
    """Base of every error meant for people.

    `message` says what was given and what is allowed, `hint` what to do next; `code` is stable for programs
    and `exit_status` is what the command line exits with.
    """

    code = "error"
    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(SfumatoError, ValueError):
    """A request, option or configuration that cannot be taken as it is."""

    code = "input"
    exit_status = 2


class CheckpointError(SfumatoError):
    """A model or training-state file that cannot be read, or does not fit."""

    code = "checkpoint"
    exit_status = 3


class UnsafeCheckpointError(CheckpointError):
    """A file of weights that asks for code to be run. Nothing of it was; other programs may run it."""

    code = "unsafe"


class DataError(SfumatoError):
    """Training pictures or captions that cannot be used."""

    code = "data"
    exit_status = 4


class ResourceError(SfumatoError):
    """Disk, memory, permission or a missing optional dependency."""

    code = "resource"
    exit_status = 5


class NumericalError(SfumatoError):
    """A computation that left the finite numbers."""

    code = "numerical"
    exit_status = 6


def nearest(given: str, allowed: Iterable[str]) -> str:
    """The sentence "did you mean ...?" for `given`, or the list of what is allowed where nothing is near."""
    names = sorted(allowed)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Allowed: {', '.join(names)}."

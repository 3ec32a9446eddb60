"""The list of pictures that a run cannot use, kept in its folder so that the run repeats itself exactly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.checkpoints.files import disk_errors
from sfumato.errors import DataError
from sfumato.training.data.dataset import Size


@dataclass(frozen=True)
class Entry:
    """What was known of an unusable picture when it was met, so that its file may change or go.

    bytes, captions: of the record, which the digest of the data is made of. size: (height, width) of the
    picture if its head could be read, for its bucket hangs on it.
    """

    name: str
    reason: str
    bytes: int
    captions: tuple[str, ...]
    size: Size | None = None


class Quarantine:
    """The entries in a file of JSON lines, and those that are added; adding from several threads is safe.

    path: None keeps no list, and then the first unusable picture is an error. warn: is told of each new one.
    """

    def __init__(self, path: Path | None, warn: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.warn = path, warn
        self.entries = {} if path is None else _read(path)
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        """Put a picture on the list, which is on the disk when this returns."""
        with self._lock:
            if entry.name in self.entries:
                return
            self.entries[entry.name] = entry
            if self.path is not None:
                line = json.dumps(
                    {
                        "name": entry.name, "reason": entry.reason, "bytes": entry.bytes,
                        "captions": entry.captions, "size": entry.size,
                    }
                )  # fmt: skip
                with disk_errors(self.path):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    with self.path.open("a", encoding="ascii") as file:
                        file.write(line + "\n")  # one write, so the lines of several processes stay whole
        self.warn(f"not used: {entry.name}: {entry.reason}")


def _read(path: Path) -> dict[str, Entry]:
    """The entries of a list by name; a last line that a kill cut short is passed over."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "Restore it, or begin the run again.") from error
    found: dict[str, Entry] = {}
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            entry = _entry(line, path)
            found.setdefault(entry.name, entry)
    return found


def _entry(line: str, path: Path) -> Entry:
    try:
        values: Any = json.loads(line)
    except ValueError:
        values = None
    match values:
        case {
            "name": str(name), "reason": str(reason), "bytes": int(count), "captions": [*captions],
            "size": None | [int(), int()],
        } if all(isinstance(caption, str) for caption in captions):  # fmt: skip
            size = values["size"]
            return Entry(name, reason, count, tuple(captions), size and (size[0], size[1]))
    raise DataError(
        f"{path} has a line that is no entry: {line[:80]!r}", "Restore the line, or begin the run again."
    )

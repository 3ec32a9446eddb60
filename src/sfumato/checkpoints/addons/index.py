"""LoRA and embedding folders as tables: names are looked up in what a scan found, never joined to paths."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sfumato.checkpoints.layouts.naming import WEIGHT_SUFFIXES
from sfumato.checkpoints.report import printable
from sfumato.errors import InputError, nearest

MAX_FILES = 100_000
MAX_SHOWN = 80  # characters of a name in a message
MAX_HINT = 600  # characters of the names that there are


class AddonIndex:
    """The weight files in some folders and below them, by name.

    A file "style/ink.safetensors" goes by its stem "ink", its place "style/ink", and either with its ending.
    Links that lead out of their folder are left out, and so are hidden files and names of characters that do
    not print. `scan` looks again. Raises `InputError` for a folder that is not there, or that holds more than
    100,000 such files.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)
        self._files: Mapping[str, tuple[Path, ...]] = {}
        self.scan()

    def scan(self) -> None:
        """Look through the folders again."""
        found: dict[str, list[Path]] = {}
        count = 0
        for root in self.folders:
            if not root.is_dir():
                raise InputError(f"the folder {root} is not there", "Check its name.")
            for path in _inside(root):
                count += 1
                if count > MAX_FILES:
                    raise InputError(f"{root} holds more than {MAX_FILES} files", "Give a smaller folder.")
                for name in _spellings(path.relative_to(root)):
                    found.setdefault(name, []).append(path)
        self._files = {name: tuple(paths) for name, paths in found.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @property
    def names(self) -> tuple[str, ...]:
        """The shortest name of every file that only it has, in order."""
        shortest: dict[Path, str] = {}
        for name, paths in self._files.items():
            if len(paths) == 1 and len(name) < len(shortest.get(paths[0], name + " ")):
                shortest[paths[0]] = name
        return tuple(sorted(shortest.values()))

    def find(self, name: str) -> Path:
        """The file of that name; `InputError` for one that is unknown, or means several files."""
        paths = self._files.get(name)
        if paths is None:
            where = ", ".join(map(str, self.folders)) or "no folder"
            raise InputError(f"there is no {_shown(name)} in {where}", self._hint(name))
        first, *others = paths
        if others:
            choices = sorted({each for each, own in self._files.items() if len(own) == 1 and own[0] in paths})
            hint = f"Say which: {', '.join(choices)}." if choices else "Rename one of them."
            raise InputError(f"{_shown(name)} means {len(paths)} files", hint)
        return first

    def _hint(self, name: str) -> str:
        names = self.names
        if not names:
            return "Put the file there."
        hint = nearest(name[:MAX_SHOWN], names)
        return hint if len(hint) <= MAX_HINT else f"Choose one of {len(names)}, such as {names[0]!r}."


def _inside(root: Path) -> Iterator[Path]:
    """The weight files below a folder that lie there in truth, in order."""
    real = root.resolve()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if file.startswith(".") or path.suffix.lower() not in WEIGHT_SUFFIXES:
                continue
            if not str(path.relative_to(root)).isprintable():
                continue
            target = path.resolve()
            if target.is_relative_to(real) and target.is_file():
                yield path


def _spellings(path: Path) -> list[str]:
    """The names of a file at a place in its folder."""
    place = path.as_posix()
    return list(dict.fromkeys([place.removesuffix(path.suffix), path.stem, place, path.name]))


def _shown(name: str) -> str:
    return repr(printable(name[:MAX_SHOWN]))

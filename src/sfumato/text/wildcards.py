"""Wildcard files: a folder of texts, one choice on a line, as an index of names."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import InputError

MAX_BYTES = 16 * 2**20  # of one file


def read_wildcards(folder: Path) -> dict[str, tuple[str, ...]]:
    """The lines of every .txt file under a folder, by its path from there without the suffix: "colours/warm".

    Empty lines and those that begin with # are left out. Links that lead out of the folder are, too: names
    from prompts are looked up here and never become paths. Raises InputError for what is no folder and for
    files above 16 MB.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of wildcards.", "Give a folder with .txt files.")
    root, index = folder.resolve(), dict[str, tuple[str, ...]]()
    for path in sorted(root.rglob("*.txt")):
        if not path.is_file() or not path.resolve().is_relative_to(root):
            continue
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{path} has {path.stat().st_size} bytes; a wildcard file has at most {MAX_BYTES}.",
                "Split it, or move it out of the folder.",
            )
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        words = (line.strip() for line in lines)
        name = path.relative_to(root).with_suffix("").as_posix()
        index[name] = tuple(word for word in words if word and not word.startswith("#"))
    return index

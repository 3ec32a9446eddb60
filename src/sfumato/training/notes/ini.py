"""INI files whose values are Python literals, as the notes' config_SD.ini; nothing in them is ever run."""

from __future__ import annotations

import ast
import configparser
from pathlib import Path
from typing import Any

from sfumato.errors import InputError

MAX_BYTES = 1 << 20  # of a file
MAX_LITERAL = 1000  # characters of a number or list; the notes' longest has 14
NO_SECTION = "[config]\n"


def read_ini(path: Path) -> tuple[dict[str, str], list[str]]:
    """(key -> value as text, warnings) of a file, whatever its sections are called, or without any.

    UTF-8 with or without a byte order mark; GBK (GB 18030), which Chinese Windows writes, with a warning.
    What follows " #" is a comment. Raises `InputError` for what cannot be read, and for a key given twice.
    """
    text, warnings = _decoded(path)
    parser = configparser.ConfigParser(
        inline_comment_prefixes=("#",), interpolation=None, empty_lines_in_values=False, delimiters=("=",),
        default_section="",
    )  # fmt: skip
    parser.optionxform = str  # type: ignore[method-assign]  # keys as they are written
    try:
        parser.read_string(text if _has_section(text) else NO_SECTION + text, str(path))
    except configparser.DuplicateOptionError as error:
        raise InputError(
            f"{path}: the key {error.option!r} is given twice in [{error.section}]", "Leave one out."
        ) from error
    except configparser.DuplicateSectionError as error:
        raise InputError(
            f"{path}: there are two sections [{error.section}]", "Rename one of them; names are free."
        ) from error
    except configparser.Error as error:
        cause = " ".join(error.message.split())
        raise InputError(
            f"{path} is no INI file: {cause}",
            "A line is `key = value # comment`; a comment that goes on needs another #, or an indent.",
        ) from error
    values: dict[str, str] = {}
    for section in parser.sections():
        for key, value in parser.items(section):
            if key in values:
                raise InputError(f"{path}: the key {key!r} is given in two sections", "Leave one out.")
            values[key] = value
    return values, warnings


def literal(key: str, text: str) -> Any:
    """The Python literal of a value; a bare word, as `scaled`, is itself.

    Lines after the first may be part of a list, or the rest of a comment that was wrapped. Raises
    `InputError` for what is neither, as an expression.
    """
    for part in (text, text.partition("\n")[0]):
        shown = part.strip()
        if len(shown) > MAX_LITERAL:
            raise InputError(f"{key} has {len(shown)} characters", f"The most is {MAX_LITERAL}.")
        try:
            return ast.literal_eval(shown)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    word = text.partition("\n")[0].strip()
    if word.isidentifier():
        return word
    raise InputError(
        f"{key} is {word[:80]!r}, which is no Python literal",
        "Write a number, True, False, None, or a list, tuple or set of numbers; nothing is computed.",
    )


def path_text(text: str) -> str:
    """A path as it stands, without the quotes that may be around it; backslashes are no escapes."""
    line = text.partition("\n")[0].strip()
    quoted = len(line) > 1 and line[0] == line[-1] and line[0] in "'\""
    return line[1:-1] if quoted else line


def _decoded(path: Path) -> tuple[str, list[str]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES} bytes", "Give a configuration file.")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "Give the path of an .ini file.") from error
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        place = data[: error.start].count(b"\n") + 1
    if b"\0" in data:
        raise InputError(
            f"{path} is not UTF-8 text: it has zero bytes, as UTF-16 has", "Save it as UTF-8 in your editor."
        )
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is neither UTF-8 (line {place}) nor GBK text", "Save it as UTF-8 in your editor."
        ) from error
    return text, [
        f"{path} is not UTF-8 (line {place}), and was read as GBK; check Chinese paths, save it as UTF-8"
    ]


def _has_section(text: str) -> bool:
    """Whether the first line that says something opens a section."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and line[0] not in "#;"), "")
    return first.startswith("[")

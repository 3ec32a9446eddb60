"""Who drew the pictures and under which licences: the NOTICE and README of a built set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions: The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY
KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR
ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""
APACHE = (
    "Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0, "
    'distributed "AS IS".'
)
CC_BY = "Licensed under Creative Commons Attribution 4.0 International: https://creativecommons.org/licenses/by/4.0/"
FLUENT = (
    "Fluent Emoji, https://github.com/microsoft/fluentui-emoji\n"
    f"Copyright (c) Microsoft Corporation. MIT License.\n\n{MIT}"
)

NOTO = "https://github.com/googlefonts/noto-emoji"
TWEMOJI = "https://github.com/jdecked/twemoji"
CREDITS = {
    "fluent": FLUENT,
    "flat": FLUENT,
    "noto": f"Noto Emoji, {NOTO}\nCopyright Google Inc. {APACHE}",
    "blob": f"Noto Emoji of 2017 (the blobs), {NOTO}\nCopyright Google Inc. {APACHE}",
    "twemoji": f"Twemoji, {TWEMOJI}\nCopyright Twitter and other contributors. {CC_BY}",
}
LABELS = f"""Names of the objects: emojibase-data, https://emojibase.dev.
Copyright (c) Miles Johnson. MIT License:

{MIT}

The names come from Unicode CLDR, copyright Unicode, Inc., Unicode License v3:
https://www.unicode.org/license.txt"""


def notice(styles: Sequence[str], avatars: Sequence[str]) -> str:
    """The credits and licences of exactly the styles that a set holds."""
    parts = ["These pictures were modified: rasterised, padded, and composed on plain backgrounds."]
    parts += [f"{', '.join(s for s in styles if CREDITS[s] == text)}: {text}" for text in unique(styles)]
    parts.append(
        f"Avatars ({', '.join(avatars)}): DiceBear, https://www.dicebear.com, and its artists; CC0 1.0, "
        "https://creativecommons.org/publicdomain/zero/1.0/"
    )
    return "\n\n----\n\n".join([*parts, LABELS]) + "\n"


def unique(styles: Sequence[str]) -> list[str]:
    """The credit texts of the styles, each once, in order."""
    return list(dict.fromkeys(CREDITS[style] for style in styles))


def readme(summary: Mapping[str, Any]) -> str:
    """A page that tells what the folder holds and how to read it."""
    rows = "\n".join(f"| {name} | {count} |" for name, count in summary["rows"].items())
    styles = ", ".join(summary["styles"])
    return f"""# Illustrations ({summary["domain"]} domain, {summary["size"]} px)

{summary["objects"]} objects in the styles {styles}; {summary["pictures"]} pictures, seed {summary["seed"]}.

| rows | count |
| --- | --- |
{rows}

`pictures-*.tar` hold lossless WebP pictures with transparency, `metadata.jsonl` one example a line: captions
(the first is the canonical one), split, kind, background colour, layers (a picture and its box as fractions)
and attributes. `sfumato.data.pictures.Pictures` reads and composes them. Test rows show only combinations
that training rows never show. `summary.json` has the sources and digests, `NOTICE` the credits and licences.
"""

"""The names of weight files in diffusers and transformers folders: variants, shards, preferences."""

from __future__ import annotations

import re
from collections.abc import Iterable

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
STEMS = "diffusion_pytorch_model|pytorch_model|model"
SINGLE = re.compile(rf"(?:{STEMS})(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
INDEX = re.compile(
    rf"(?:{STEMS})(?:\.(?P<first>\w+))?\.(?P<kind>safetensors|bin)(?:\.(?P<second>\w+))?"
    r"\.index(?:\.(?P<third>\w+))?\.json"
)
SHARD = re.compile(
    rf"(?:{STEMS})(?:\.(?P<first>\w+))?-\d+-of-\d+(?:\.(?P<second>\w+))?\.(?P<kind>safetensors|bin)"
)


def weight_file(names: Iterable[str], variant: str | None) -> str | None:
    """The weights of a component, a file or the index of its shards; None where there are none.

    Safetensors come before .bin, a whole file before shards. The variant that is asked for comes first, then
    the plain one, then fp16, then any.
    """
    found: dict[str | None, dict[tuple[bool, bool], str]] = {}
    for name in names:
        match = SINGLE.fullmatch(name) or INDEX.fullmatch(name)
        if match is not None:
            rank = (match["kind"] != "safetensors", name.endswith(".json"))
            found.setdefault(_variant(match), {})[rank] = name
    for wanted in (variant, None, "fp16", *found):
        if wanted in found:
            return found[wanted][min(found[wanted])]
    return None


def variant_of(name: str) -> str | None:
    """The variant in the name of a weight file or of an index; None for the plain one."""
    match = SINGLE.fullmatch(name) or INDEX.fullmatch(name)
    return None if match is None else _variant(match)


def weight_files(names: Iterable[str], variant: str | None) -> list[str]:
    """The file that `weight_file` chooses and, where it is an index, the shards beside it."""
    names = list(names)
    chosen = weight_file(names, variant)
    if chosen is None:
        return []
    index = INDEX.fullmatch(chosen)
    if index is None:
        return [chosen]
    shards = (SHARD.fullmatch(name) for name in names)
    same = (_variant(index), index["kind"])
    return [chosen, *(shard[0] for shard in shards if shard and (_variant(shard), shard["kind"]) == same)]


def _variant(match: re.Match[str]) -> str | None:
    groups = match.groupdict()
    return next((groups[key] for key in ("variant", "first", "second", "third") if groups.get(key)), None)

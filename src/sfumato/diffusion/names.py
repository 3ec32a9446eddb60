"""The community's names of samplers and spacings, alone and together, and ours: one way in, one way out.

Neither case nor punctuation matters: "DPM++ 2M Karras", "dpm++2m_karras" and "k_dpmpp_2m_ka" are the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from sfumato import errors
from sfumato.diffusion.samplers import SAMPLERS, Sampler, sampler
from sfumato.diffusion.spacing import SPACINGS, SpacingRow, spacing

AUTOMATIC = "auto"  # the spacing that is the sampler's own
LONGEST = 80  # letters of a name that are looked at

# Written as `_letters` gives them: lower case without punctuation, "++" as "pp", "ancestral" as "a".
SAMPLER_ALIASES = {
    "dpmad": "dpm_adaptive",  # AUTOMATIC1111's k_dpm_ad
    "unipcbh1": "unipc",
    "unipcbh2": "unipc",
    "kdpm2": "dpm2",  # InvokeAI and diffusers, also without the "k"
    "kdpm2a": "dpm2_a",
    "pndm": "plms",
    "dpmsolverpp": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmpp2s": "dpmpp_2s_a",
    "dpmsingle": "dpmpp_2s_a",
    "dpmsolversinglestep": "dpmpp_2s_a",
    "dpmsolversde": "dpmpp_sde",
    "sdedpmsolverpp": "dpmpp_2m_sde",
    "dpmpp2msdebt": "dpmpp_2m_sde",  # stable-diffusion.cpp, with a Brownian tree
    "deismultistep": "deis",
    "unipcmultistep": "unipc",
}
IMPLIED = {  # what an alias says beyond the sampler
    "unipcbh1": {"variant": "bh1"},
    "unipcbh2": {"variant": "bh2"},
    "dpmpp2s": {"eta": 0.0},  # the singlestep solver without noise
    "dpmsingle": {"eta": 0.0},
    "dpmsolversinglestep": {"eta": 0.0},
}
SPACING_ALIASES = {
    "automatic": AUTOMATIC,
    "auto": AUTOMATIC,
    "linspace": "uniform",  # diffusers
    "discrete": "uniform",  # stable-diffusion.cpp
    "exp": "exponential",
    "ddimquad": "quad",
    "ays": "align_your_steps",
    "alignyoursteps11": "align_your_steps",  # Forge: other tables, for 11 and 32 steps
    "alignyoursteps32": "align_your_steps",
    "aysgits": "gits",
    "alignyourstepsgits": "gits",
    "sdturbo": "turbo",
}
ENDINGS = {"ka": "karras", "k": "karras"}  # of a sampler's name, in AUTOMATIC1111 and InvokeAI


def resolve(name: str) -> tuple[str, str | None]:
    """(key in `SAMPLERS`, key in `SPACINGS` or None where the name says nothing of it).

    name: a key or title of a row, alone or with a spacing's behind it, or what AUTOMATIC1111, ComfyUI,
    InvokeAI, diffusers and k-diffusion call it. `InputError` with the nearest name for any other.
    """
    alone, spacing_key = _split(name)
    return _samplers()[alone], spacing_key


def implied(name: str) -> dict[str, float | str]:
    """The sampler's options that a name says besides, as {"variant": "bh2"} for uni_pc_bh2; often none."""
    return dict(IMPLIED.get(_split(name)[0], {}))


def resolve_spacing(name: str) -> str:
    """The key in `SPACINGS`, or "auto", of a spacing's name in any tool; `InputError` for another."""
    letters = _letters(name[:LONGEST].lower())
    if letters in (spacings := _spacings()):
        return spacings[letters]
    known = [*SPACINGS, *(row.title for row in SPACINGS.values()), AUTOMATIC]
    raise errors.InputError(f"there is no spacing {name[:LONGEST]!r}", _hint(name, known))


def title(sampler_key: str, spacing_key: str | None = None) -> str:
    """The display name, "DPM++ 2M" or "DPM++ 2M Karras", which `resolve` reads; `InputError` for no key."""
    first = sampler(sampler_key).title
    if spacing_key is None or spacing_key == AUTOMATIC:
        return first
    return f"{first} {spacing(spacing_key).title}"


def spacing_title(spacing_key: str) -> str:
    """The display name of a spacing alone, "Automatic" for "auto"; `InputError` for no key."""
    return "Automatic" if spacing_key == AUTOMATIC else spacing(spacing_key).title


def _split(name: str) -> tuple[str, str | None]:
    """The letters of the sampler's name and the key of the spacing behind it."""
    letters = _letters(re.sub(r"^\s*(sample[_ ])?(k[\s_-])?", "", name[:LONGEST].lower()))
    if letters in (samplers := _samplers()):
        return letters, None
    for ending, key in {**_spacings(), **ENDINGS}.items():
        start = letters.removesuffix(ending)
        if start != letters and start in samplers:
            return start, None if key == AUTOMATIC else key
    known = [title(one, two) for one in SAMPLERS for two in (None, *SPACINGS)]
    raise errors.InputError(f"there is no sampler {name[:LONGEST]!r}", _hint(name, [*SAMPLERS, *known]))


def _letters(name: str) -> str:
    """What tells two names apart, of one in lower case."""
    plain = name.replace("++", "pp").replace("ancestral", "a").replace("gpu", "")
    return re.sub(r"(discrete)?scheduler$", "", re.sub(r"[^a-z0-9]", "", plain))


def _rows(table: Mapping[str, Sampler] | Mapping[str, SpacingRow]) -> dict[str, str]:
    titles = {_letters(row.title.lower()): key for key, row in table.items()}
    return {**{_letters(key): key for key in table}, **titles}


def _samplers() -> dict[str, str]:
    return {**_rows(SAMPLERS), **SAMPLER_ALIASES}


def _spacings() -> dict[str, str]:
    return {**_rows(SPACINGS), **SPACING_ALIASES}


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:LONGEST], known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else "`sfumato samplers` lists them."

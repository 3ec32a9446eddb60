"""The text form of AUTOMATIC1111: prompt, negative prompt, and one line of `Name: value`.

Written by many tools (Forge, SD.Next, Fooocus, Civitai, ...), read by more; here both, by our names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sfumato.diffusion.names import implied, resolve, spacing_title, title
from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError
from sfumato.request import Request

DENOISING = "Denoising strength"  # of a picture to start from, or of a second pass
TEXT_FIELDS = {  # ours -> theirs, in the order they are written
    "steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model_digest": "Model hash",
    "model": "Model",
    "variation_seed": "Variation seed",
    "variation_strength": "Variation seed strength",
    "seed_resize": "Seed resize from",
    "clip_skip": "Clip skip",
    "eta_seed_delta": "ENSD",
    "noise_source": "RNG",
    "eta": "Eta",
    "hires": "Hires upscale",
    "hires_upscaler": "Hires upscaler",
    "hires_strength": DENOISING,
}
ENLARGERS = {  # ours -> theirs
    "latent": "Latent", "latent-bilinear-antialiased": "Latent (antialiased)",
    "latent-bicubic": "Latent (bicubic)",
    "latent-bicubic-antialiased": "Latent (bicubic antialiased)", "latent-nearest": "Latent (nearest)",
    "latent-nearest-exact": "Latent (nearest-exact)", "lanczos": "Lanczos",
}  # fmt: skip
OPTION_FIELDS = {  # (field, option) -> theirs
    ("sampler_options", "s_churn"): "Sigma churn",
    ("sampler_options", "s_tmin"): "Sigma tmin",
    ("sampler_options", "s_tmax"): "Sigma tmax",
    ("sampler_options", "s_noise"): "Sigma noise",
    ("spacing_options", "rho"): "Schedule rho",
    ("spacing_options", "sigma_min"): "Schedule min sigma",
    ("spacing_options", "sigma_max"): "Schedule max sigma",
}
HASHES = {"loras": "Lora hashes", "embeddings": "TI hashes"}  # {name: sha256} -> their first letters
SIZES = {"size": ("width", "height"), "seed_resize": ("seed_resize_width", "seed_resize_height")}
SOURCES = {"cpu": "CPU", "philox": "NV"}
SHORT, SHORT_ADDON = 10, 12  # letters of a model's digest (AUTOV2) and of a LoRA's
PROMPTS = ("prompt", "negative_prompt")
NEGATIVE = "Negative prompt:"
# Our fields that are not among theirs, by names in their manner: perp_neg is "Perp neg".
OWN_FIELDS = {
    name: name.replace("_", " ").capitalize()
    for name in Request.model_fields
    if name not in TEXT_FIELDS and name not in (*PROMPTS, "num_images")
    and not any(name in pair for pair in SIZES.values())
}  # fmt: skip
OURS = {theirs.lower(): ours for ours, theirs in {**OWN_FIELDS, **TEXT_FIELDS}.items()} | {
    "subseed": "variation_seed",
    "subseed strength": "variation_strength",
    "eta ddim": "eta",
    "skip early cfg": "guidance_start",  # AUTOMATIC1111 1.10: no negative branch in the first share of steps
    "rescale cfg": "rescale",
    "cfg rescale": "rescale",
    "scheduler": "spacing",  # Fooocus
}
TEXTS = {"model", "model_digest", "vae", "vae hash", "version", "model hash"}  # never taken for numbers
NAME = r"[\w ./+()-]{1,100}?"
FIELD = re.compile(rf'({NAME}):\s*("(?:\\.|[^"\\])*"|(?=[\[{{])|[^,]*)(?:,|$)?')
SIGNS = {"Sampler", "Seed", "CFG scale", "Model hash"}  # a line of fields has one, "style: oil" has none
MAX_LENGTH = 1_000_000  # characters that are looked at
TOOLS = (  # (what "Version" or another field looks like, tool)
    (re.compile(r"sfumato\b"), "sfumato"),
    (re.compile(r"Fooocus\b"), "Fooocus"),
    (re.compile(r"ComfyUI\b"), "ComfyUI"),
    (re.compile(r"f\d"), "Forge"),
    (re.compile(r"neo\b"), "Forge Neo"),
)


def to_text(values: Mapping[str, Any]) -> str:
    """A recipe's values as AUTOMATIC1111 writes them; the same values always give the same text.

    Its names are used where it has one; our other fields follow where they are not at their default.
    """
    fields = {theirs: _written(ours, values) for ours, theirs in TEXT_FIELDS.items()}
    rest = {name: dict(values.get(name) or {}) for name in ("sampler_options", "spacing_options")}
    for (name, option), theirs in OPTION_FIELDS.items():
        fields[theirs] = rest[name].pop(option, None)
    for name, theirs in OWN_FIELDS.items():
        value = rest.get(name, values.get(name))
        default = Request.model_fields[name].default
        same = value in (None, {}, default) or (isinstance(default, tuple) and value == list(default))
        fields[theirs] = None if same else value
    for name, theirs in HASHES.items():
        known = values.get(name) if isinstance(values.get(name), Mapping) else None
        fields[theirs] = ", ".join(
            f"{each}: {str(sha)[:SHORT_ADDON]}" for each, sha in sorted((known or {}).items())
        )
    fields["Version"] = f"sfumato {values.get('version') or ''}".rstrip()
    prompt, negative = (values.get(f"drawn_{name}", values.get(name)) for name in PROMPTS)
    lines = [str(prompt or ""), *([f"{NEGATIVE} {negative}"] if negative else [])]
    words = [f"{name}: {_quoted(value)}" for name, value in fields.items() if value not in (None, "")]
    text = "\n".join([*lines, ", ".join(words)]).replace("\0", " ")
    return text.encode("utf-8", "replace").decode()  # half a character has no place in a file


def _written(ours: str, values: Mapping[str, Any]) -> Any:
    """What is written for one of `TEXT_FIELDS`, None where nothing is."""
    value = values.get(ours)
    if ours in SIZES:
        width, height = (values.get(side) for side in SIZES[ours])
        return f"{width or 0}x{height or 0}" if width or height else None
    if ours.startswith("hires") and not values.get("hires"):
        return None
    if ours == "hires_upscaler":
        return ENLARGERS.get(str(value), value)
    if ours == "sampler":
        return title(value) if value in SAMPLERS else value
    if ours == "spacing":
        return spacing_title(value) if value == "auto" or value in SPACINGS else value
    if ours == "model_digest":
        return str(value or "")[:SHORT]
    if ours == "noise_source":
        return SOURCES.get(str(value), value)
    return None if ours in ("variation_strength", "eta_seed_delta") and not value else value


def from_text(text: str) -> dict[str, Any]:
    """The values of any text at all, by our names where we have one: unknown names are kept as they are.

    A text without a line of fields is a prompt. Values of the request's fields stay text, for the request to
    read. Takes time in proportion to the text; of a very long one only the first million letters are read.
    """
    lines = text[:MAX_LENGTH].replace("\r\n", "\n").strip().split("\n")
    if lines == [""]:
        return {}
    start = next((i for i in reversed(range(len(lines))) if re.match(r"\s*Steps:\s*\d", lines[i])), None)
    if start is None and _fields(lines[-1]).keys() & SIGNS:
        start = len(lines) - 1
    found = {} if start is None else _fields(", ".join(lines[start:]))
    body = lines[:start]
    below = next((i for i, line in enumerate(body) if line.strip().startswith(NEGATIVE)), len(body))
    values: dict[str, Any] = {"prompt": "\n".join(body[:below])}
    if below < len(body):
        values["negative_prompt"] = "\n".join(body[below:]).strip().removeprefix(NEGATIVE).strip()
    for name, value in found.items():
        _take(name, value, values)
    if "hires" not in values and "hires_strength" in values:
        values[DENOISING] = _number(values.pop("hires_strength"))
    _older(values, found)
    return values


def tool_of(values: Mapping[str, Any]) -> str:
    """Which tool wrote the values of `from_text`, by what it says of itself; AUTOMATIC1111 if nothing."""
    version = str(values.get("Version", ""))
    for pattern, tool in TOOLS:
        if pattern.match(version):
            return tool
    if "App" in values:
        return str(values["App"])[:40]
    return "Civitai" if "Civitai resources" in values and not version else "AUTOMATIC1111"


def _fields(line: str) -> dict[str, Any]:
    """The `Name: value` pairs of a line; values that are JSON lists or objects are read as such."""
    found: dict[str, Any] = {}
    place, decoder = 0, json.JSONDecoder()
    while match := FIELD.search(line, place):
        name, value, place = match[1].strip(), match[2].strip(), max(match.end(), match.start() + 1)
        if line[match.end(2) : match.end(2) + 1] in ("{", "["):
            try:
                value, place = decoder.raw_decode(line, match.end(2))
            except (ValueError, RecursionError):
                place = line.find(",", match.end(2))
                place = len(line) if place < 0 else place
                value = line[match.end(2) : place]
            place += line[place : place + 1] == ","
        elif value.startswith('"'):
            value = _unquoted(value)
        found.setdefault(name, value)
    return found


def _take(name: str, value: Any, values: dict[str, Any]) -> None:
    """Put one field of theirs among the values, by our name if we have one."""
    ours = OURS.get(name.lower())
    option = next((pair for pair, theirs in OPTION_FIELDS.items() if theirs == name), None)
    addons = next((mine for mine, theirs in HASHES.items() if theirs == name), None)
    if ours in SIZES:
        if isinstance(value, str) and (sides := re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)):
            values |= {side: sides[i + 1] for i, side in enumerate(SIZES[ours]) if int(sides[i + 1])}
        else:
            values[name] = value
    elif addons is not None:
        pairs = (each.rpartition(":") for each in str(value).split(","))
        values[addons] = {key.strip(): sha.strip() for key, _, sha in pairs if key.strip()}
    elif option is not None:
        _options(values, option[0])[option[1]] = _number(value)
    elif ours in ("sampler_options", "spacing_options"):
        read = _json(value)
        _options(values, ours).update(read if isinstance(read, dict) else {})
    elif ours == "noise_source":
        values[ours] = {"cpu": "cpu", "nv": "philox", "gpu": "philox"}.get(str(value).lower(), value)
    elif ours == "hires_upscaler":
        values[ours] = next((mine for mine, theirs in ENLARGERS.items() if theirs == value), value)
    elif ours is not None:
        values[ours] = value if ours in TEXTS else _json(value)
    else:
        values[name] = value if name.lower() in TEXTS else _number(value)


def _older(values: dict[str, Any], found: Mapping[str, Any]) -> None:
    """What a text means by leaving it out.

    Before its version 1.9 AUTOMATIC1111 wrote no schedule type: "DPM++ 2M Karras" has one in its name, and
    plain "DPM++ 2M" took k-diffusion's. It draws its noise on the GPU, unless it says otherwise.
    """
    if found and str(found.get("Version", "")).startswith("sfumato"):
        return
    if "seed" in values:
        values.setdefault("noise_source", "philox")
    if "sampler" not in values or "spacing" in values:
        return
    try:
        key, spacing = resolve(str(values["sampler"]))
    except InputError:
        return
    if spacing is None and SAMPLERS[key].spacing in ("karras", "exponential") and key != "restart":
        values["spacing"] = "uniform"
    if not implied(str(values["sampler"])) and spacing is not None:
        values["sampler"], values["spacing"] = key, spacing


def _options(values: dict[str, Any], name: str) -> dict[str, Any]:
    return values.setdefault(name, {})


def _quoted(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        text = str(int(value))
    else:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    mixed = re.search(r'[,:\n"\\]|^[\[{]|^\s|\s$', text)
    return json.dumps(text, ensure_ascii=False) if mixed else text


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _json(value: Any) -> Any:
    """A list or object that was written as JSON, and any other text as it is."""
    if not isinstance(value, str) or not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"-?\d{1,18}", value):
        return int(value)
    if re.fullmatch(r"-?\d{1,30}\.?\d{0,30}(e[+-]?\d{1,2})?", value):
        return float(value)
    return value

"""InvokeAI's metadata, `invokeai_metadata` since its version 3 and `sd-metadata` before, under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfumato.recipes.recipe import Recipe, recipe

FIELDS = {  # theirs -> ours
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "cfg_scale": "guidance",
    "cfg_rescale_multiplier": "rescale",
    "steps": "steps",
    "scheduler": "sampler",
    "sampler": "sampler",  # before 3
    "sampler_name": "sampler",
    "app_version": "tool_version",
}
NOISE = {"cpu": "cpu", "cuda": "philox"}  # rand_device
# Compel's weights, which mean nothing here: word+, word--, (some words)1.2
WEIGHTS = re.compile(r"\w[+-]{1,9}(?=[\s,.)]|$)|\)[+-]?\d|\)[+-]")
IN_BRACKETS = re.compile(r"\[([^\[\]]{0,10000})\]")


def from_invokeai(metadata: Mapping[str, Any]) -> Recipe:
    """The recipe of metadata read from JSON; never fails."""
    values: dict[str, Any] = {}
    warnings: list[str] = []
    flat = dict(metadata)
    image = flat.pop("image", None)
    if isinstance(image, Mapping):  # before 3 the picture's own settings stand apart
        flat |= image
    prompt = flat.pop("prompt", None)
    if prompt is not None and "positive_prompt" not in flat:
        flat |= _older_prompt(prompt)
    for name, value in flat.items():
        _take(name, value, values)
    if values.get("rescale") == 0:
        del values["rescale"]
    for loaded in _listed(flat.get("loras")):
        warnings.append(f"drawn with the LoRA {loaded}: put its tag into the prompt to take it")
    if WEIGHTS.search(f"{values.get('prompt')} {values.get('negative_prompt')}"):
        warnings.append("weights in InvokeAI's way, word+ or (words)1.2, are read as words")
    values["emphasis"] = "plain"
    mode = flat.get("generation_mode", flat.get("type", "txt2img"))
    if isinstance(mode, str) and "txt2img" not in mode:
        warnings.append(f"it was made from another picture ({mode[:40]}), which is left out")
    return recipe("InvokeAI", values, warnings)


def _take(name: str, value: Any, values: dict[str, Any]) -> None:
    if name in FIELDS:
        values[FIELDS[name]] = value
    elif name == "clip_skip" and isinstance(value, int):
        values["clip_skip"] = value + 1  # it counts the layers left out
    elif name == "rand_device":
        values["noise_source"] = NOISE.get(str(value), value)
    elif name in ("model", "model_weights"):
        _model(value, values)
    elif name == "model_hash":
        values["model_digest"] = value
    else:
        values[name] = value


def _model(value: Any, values: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        values["model"] = value.get("name", value.get("model_name"))
        if value.get("hash"):
            values["model_digest"] = value["hash"]
    else:
        values["model"] = value


def _listed(loras: Any) -> list[str]:
    """`<lora:name:weight>` for every LoRA of the metadata."""
    tags = []
    for each in loras[:100] if isinstance(loras, list) else ():
        entry = each if isinstance(each, Mapping) else {}
        model = next((entry[key] for key in ("model", "lora") if isinstance(entry.get(key), Mapping)), {})
        name = model.get("name", model.get("model_name"))
        if name:
            tags.append(f"<lora:{str(name)[:80]}:{str(entry.get('weight', 1))[:20]}>")
    return tags


def _older_prompt(prompt: Any) -> dict[str, Any]:
    """A text or a list of {prompt, weight}; what stands in square brackets is the negative prompt."""
    if isinstance(prompt, list):
        parts = [each.get("prompt") if isinstance(each, Mapping) else each for each in prompt]
        prompt = " ".join(part for part in parts if isinstance(part, str))
    text = str(prompt)
    found = {"positive_prompt": IN_BRACKETS.sub("", text).strip()}
    negative = ", ".join(part.strip() for part in IN_BRACKETS.findall(text))
    return found | ({"negative_prompt": negative} if negative else {})

"""InvokeAI's metadata of all its versions, made by hand from its documentation."""

from __future__ import annotations

import json
from typing import Any

from sfumato.recipes import from_texts
from sfumato.request import Request

CURRENT: dict[str, Any] = {
    "app_version": "5.4.0", "generation_mode": "txt2img", "positive_prompt": "a fox in snow",
    "negative_prompt": "blurry", "width": 512, "height": 640, "seed": 2890012303, "rand_device": "cpu",
    "cfg_scale": 7.5, "cfg_rescale_multiplier": 0, "steps": 30, "scheduler": "dpmpp_2m_k", "clip_skip": 1,
    "model": {"key": "1b2c", "hash": "blake3:b6e7", "name": "dreamshaper-8", "base": "sd-1", "type": "main"},
    "loras": [{"model": {"name": "ink", "key": "a", "base": "sd-1"}, "weight": 0.75}],
    "seamless_x": False, "controlnets": [],
}  # fmt: skip
OLD: dict[str, Any] = {
    "model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc6cb27103417325",
    "app_id": "invoke-ai/InvokeAI", "app_version": "2.3.0",
    "image": {
        "prompt": [{"prompt": "a fox in snow [blurry] [dark, grey]", "weight": 1.0}], "steps": 50,
        "cfg_scale": 7.5, "threshold": 0, "perlin": 0, "height": 512, "width": 448, "seed": 42,
        "seamless": False, "hires_fix": False, "type": "txt2img", "postprocessing": None,
        "sampler": "k_euler_a", "variations": [],
    },
}  # fmt: skip


def test_current_metadata() -> None:
    found = from_texts({"invokeai_metadata": json.dumps(CURRENT)})
    assert found.tool == "InvokeAI"
    assert found.request == Request(
        prompt="a fox in snow", negative_prompt="blurry", width=512, height=640, seed=2890012303,
        guidance=7.5, steps=30, sampler="dpmpp_2m", spacing="karras", clip_skip=2, noise_source="cpu",
        emphasis="plain",
    )  # fmt: skip
    assert (found.values["model"], found.values["model_digest"]) == ("dreamshaper-8", "blake3:b6e7")
    assert found.values["tool_version"] == "5.4.0"
    assert found.warnings == ["drawn with the LoRA <lora:ink:0.75>: put its tag into the prompt to take it"]
    assert set(found.ignored) == {"generation_mode", "seamless_x", "controlnets"}


def test_metadata_of_version_2() -> None:
    found = from_texts({"sd-metadata": json.dumps(OLD)})
    assert found.request == Request(
        prompt="a fox in snow", negative_prompt="blurry, dark, grey", width=448, height=512, seed=42,
        guidance=7.5, steps=50, sampler="euler_a", emphasis="plain",
    )  # fmt: skip
    assert (found.values["model"], found.values["model_digest"]) == (
        "stable-diffusion-1.5", "cc6cb27103417325",
    )  # fmt: skip
    plain = {**OLD, "image": {**OLD["image"], "prompt": "a fox"}}
    request = from_texts({"sd-metadata": json.dumps(plain)}).request
    assert request is not None and request.prompt == "a fox"


def test_the_first_form_was_a_command_line() -> None:
    text = '"a fox, sitting [blurry]" -s 50 -S1234 -W 512 -H 768 -C 7.5 -A k_lms --seamless'
    found = from_texts({"Dream": text})
    assert found.request == Request(
        prompt="a fox, sitting", negative_prompt="blurry", steps=50, seed=1234, width=512, height=768,
        guidance=7.5, sampler="lms", emphasis="plain",
    )  # fmt: skip
    assert from_texts({"Dream": '"a fox'}).request == Request(prompt='"a fox', emphasis="plain")


def test_what_is_told() -> None:
    changes = {"positive_prompt": "a fox++ (in snow)1.2", "generation_mode": "img2img", "rand_device": "cuda",
               "loras": [{"lora": {"model_name": "old"}, "weight": 1}, {}, 3], "clip_skip": None}  # fmt: skip
    found = from_texts({"invokeai_metadata": json.dumps(CURRENT | changes)})
    assert found.request is not None and found.request.noise_source == "philox"
    assert [warning.split(",")[0][:40] for warning in found.warnings] == [
        "drawn with the LoRA <lora:old:1>: put it",
        "weights in InvokeAI's way",
        "it was made from another picture (img2im",
    ]

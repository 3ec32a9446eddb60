"""AUTOMATIC1111's text form: what we write, byte by byte, and what others wrote, whatever it is."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.recipes.text_form import from_text, to_text, tool_of

VALUES: dict[str, Any] = {
    "prompt": "a fox, red\nin snow 🦊", "negative_prompt": "blurry: very", "steps": 20, "sampler": "euler_a",
    "spacing": "karras", "guidance": 7.0, "seed": 0, "width": 64, "height": 32, "model": "tiny, v1",
    "model_digest": "0123456789abcdef", "version": "0.1.0", "clip_skip": 2, "noise_source": "philox",
    "eta": 0.5, "eta_seed_delta": 31337, "variation_seed": 5, "variation_strength": 0.25, "rescale": 0.7,
    "sampler_options": {"s_noise": 1.003}, "spacing_options": {"rho": 5.0}, "deterministic": True,
    "loras": {"ink": "ab" * 32}, "attention_layers": ["middle_block"], "mimic": None, "apg": False,
}  # fmt: skip
TEXT = (
    "a fox, red\nin snow 🦊\nNegative prompt: blurry: very\n"
    "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 0, Size: 64x32, "
    'Model hash: 0123456789, Model: "tiny, v1", Variation seed: 5, Variation seed strength: 0.25, '
    "Clip skip: 2, ENSD: 31337, RNG: NV, Eta: 0.5, Sigma noise: 1.003, Schedule rho: 5, Rescale: 0.7, "
    'Deterministic: true, Lora hashes: "ink: abababababab", Version: sfumato 0.1.0'
)
FULL = (  # AUTOMATIC1111 1.9, with the habits of its extensions
    "masterpiece, <lora:ink:0.8> a (red:1.2) fox\nsitting, Steps: none\n"
    "Negative prompt: lowres,\nbad hands\n"
    "Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, "
    "Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: c6a580b13a, "
    "Variation seed: 77, Variation seed strength: 0.3, Seed resize from: 512x512, Denoising strength: 0.45, "
    "Clip skip: 2, ENSD: 31337, RNG: CPU, Eta: 0.67, Sigma churn: 10, Sigma tmin: 0.05, Sigma tmax: 50, "
    "Sigma noise: 1.003, Schedule rho: 5, Schedule min sigma: 0.1, Schedule max sigma: 10, "
    'Hires upscale: 2, Hires upscaler: Latent, Lora hashes: "ink: aabbccddeeff, film: 001122334455", '
    'TI hashes: "easy: 99aabbccddee", ControlNet 0: "Module: canny, Weight: 1, Mode: \\"Balanced\\"", '
    'Civitai resources: [{"type":"checkpoint","modelVersionId":11745}], Version: v1.9.4'
)


def test_what_is_written() -> None:
    assert to_text(VALUES) == TEXT
    assert to_text(dict(reversed(VALUES.items()))) == TEXT, "the order of the values does not matter"
    one, two = ({"sampler_options": {"r": 1, "order": 2}}, {"sampler_options": {"order": 2, "r": 1}})
    assert to_text(one) == to_text(two)
    assert to_text({}) == "\nVersion: sfumato"
    assert to_text({"prompt": "a\0b \ud800"}) == "a b ?\nVersion: sfumato"


def test_what_is_written_is_read_back() -> None:
    read = from_text(TEXT)
    assert read.pop("Version") == "sfumato 0.1.0"
    assert read == {
        "prompt": "a fox, red\nin snow 🦊", "negative_prompt": "blurry: very", "steps": "20",
        "sampler": "Euler a", "spacing": "Karras", "guidance": "7", "seed": "0", "width": "64",
        "height": "32", "model": "tiny, v1", "model_digest": "0123456789", "variation_seed": "5",
        "variation_strength": "0.25", "clip_skip": "2", "eta_seed_delta": "31337", "noise_source": "philox",
        "eta": "0.5", "sampler_options": {"s_noise": 1.003}, "spacing_options": {"rho": 5},
        "rescale": "0.7", "deterministic": "true", "loras": {"ink": "abababababab"},
    }  # fmt: skip


def test_a_full_text_of_automatic1111() -> None:
    read = from_text(FULL)
    assert tool_of(read) == "AUTOMATIC1111"
    assert read == {
        "prompt": "masterpiece, <lora:ink:0.8> a (red:1.2) fox\nsitting, Steps: none",
        "negative_prompt": "lowres,\nbad hands", "steps": "28", "sampler": "DPM++ 2M SDE",
        "spacing": "Karras", "guidance": "6.5", "seed": "1234567890", "width": "512", "height": "768",
        "model_digest": "6ce0161689", "model": "v1-5-pruned-emaonly", "VAE hash": "c6a580b13a",
        "variation_seed": "77", "variation_strength": "0.3", "seed_resize_width": "512",
        "seed_resize_height": "512", "hires_strength": "0.45", "clip_skip": "2",
        "eta_seed_delta": "31337", "noise_source": "cpu", "eta": "0.67",
        "sampler_options": {"s_churn": 10, "s_tmin": 0.05, "s_tmax": 50, "s_noise": 1.003},
        "spacing_options": {"rho": 5, "sigma_min": 0.1, "sigma_max": 10}, "hires": "2",
        "hires_upscaler": "latent", "loras": {"ink": "aabbccddeeff", "film": "001122334455"},
        "embeddings": {"easy": "99aabbccddee"},
        "ControlNet 0": 'Module: canny, Weight: 1, Mode: "Balanced"',
        "Civitai resources": [{"type": "checkpoint", "modelVersionId": 11745}], "Version": "v1.9.4",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("written", "sampler", "spacing"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),  # before 1.9
        ("Sampler: DPM++ 2M", "DPM++ 2M", "uniform"),  # k-diffusion's own, then
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "DPM++ 2M", "Automatic"),
        ("Sampler: Restart", "Restart", None),  # which was Karras's without saying so
        ("Sampler: Euler a", "Euler a", None),
        ("Sampler: My own", "My own", None),
    ],
)
def test_samplers_of_older_versions(written: str, sampler: str, spacing: str | None) -> None:
    read = from_text(f"fox\nSteps: 5, {written}")
    assert (read["sampler"], read.get("spacing")) == (sampler, spacing)


@pytest.mark.parametrize(
    ("field", "tool"),
    [
        ("Version: f2.0.1v1.10.1-previous-659-gc055f2d4", "Forge"),
        ("Version: sfumato 1.0", "sfumato"),
        ("Version: Fooocus v2.5.5", "Fooocus"),
        ("Version: ComfyUI", "ComfyUI"),
        ("App: SD.Next, Version: e6d1a5c", "SD.Next"),
        ('Civitai resources: [{"a": 1}]', "Civitai"),
        ("Version: v1.10.1", "AUTOMATIC1111"),
        ("Size: 8x8", "AUTOMATIC1111"),
    ],
)
def test_tools_are_told_apart(field: str, tool: str) -> None:
    assert tool_of(from_text(f"fox\nSteps: 5, {field}, Seed: 1")) == tool


def test_texts_without_a_line_of_fields_are_prompts() -> None:
    assert from_text("portrait: woman, style: oil, mood: dark") == {
        "prompt": "portrait: woman, style: oil, mood: dark"
    }
    assert from_text("fox\nNegative prompt: dog") == {"prompt": "fox", "negative_prompt": "dog"}
    assert from_text("") == {} and from_text(" \n ") == {}
    assert from_text("fox\nSampler: Euler, Seed: 3")["seed"] == "3", "fields in another order"
    assert from_text("fox\r\nSteps: 5, Seed: 3\r\n")["prompt"] == "fox"
    assert from_text("fox\nSteps: 5, Size: 8 by 8") == {"prompt": "fox", "steps": "5", "Size": "8 by 8"}


MARKS = ["Steps: 5, ", "Steps: ", ",", '"', "\\", "\n", ":", "{", "[", "]", "}", "0", "x", "Size: 1x1", "a: ",
         "Negative prompt:", "Sampler: ", "Euler", "Sampler options: ", '"{\\"a\\": 1}"', "Lora hashes: ",
         "Version: ", "-", "1e999", "9" * 400, "🦊", "\ud800"]  # fmt: skip


@given(st.text(max_size=120) | st.lists(st.sampled_from(MARKS), max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_reading_never_fails(text: str) -> None:
    assert isinstance(from_text(text), dict)


@pytest.mark.parametrize(
    "unit", ["a: [", 'a:"', 'a: ["x', "a: {", ", ", " ", "a", "a:", '\\"', "Steps: 1\n", "[[", '"\\', "\n"]
)
def test_reading_takes_linear_time(unit: str) -> None:
    text = "x\nSteps: 1, " + (unit * 100_000)[:100_000]
    started = time.process_time()
    from_text(text)
    assert time.process_time() - started < 10, "0.2 s where nothing else runs"

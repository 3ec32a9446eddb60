"""Recipes in files: ours come back equal, those of strangers are checked, and nothing makes reading fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sfumato.diffusion.samplers import SAMPLERS
from sfumato.diffusion.spacing import SPACINGS
from sfumato.errors import InputError
from sfumato.recipes import embed, from_texts, read
from sfumato.recipes.recipe import PATHS
from sfumato.request import MAX_SEED, Request

WORDS = st.text(st.characters(codec="utf-8"), max_size=60)
SHARE = st.floats(0, 1)
SIDES = st.none() | st.integers(1, 16_384)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any valid request that names no file."""
    sampler = draw(st.sampled_from(sorted(SAMPLERS)))
    spacing = draw(st.sampled_from(["auto", *sorted(SPACINGS)]))
    numbers = {"s_noise", "s_churn", "r", "gamma", "rtol", "order"} & set(SAMPLERS[sampler].options)
    options = {name: draw(st.floats(1e-9, 50)) for name in sorted(numbers) if draw(st.booleans())}
    levels = {"rho", "sigma_min", "sigma_max"} & SPACINGS[spacing].options.keys() if spacing != "auto" else ()
    fields: dict[str, st.SearchStrategy[Any]] = {
        "prompt": st.none() | WORDS, "negative_prompt": WORDS, "label": st.none() | st.integers(0, 1000),
        "clip_skip": st.none() | st.integers(1, 12), "zeros_for_empty": st.none() | st.booleans(),
        "steps": st.none() | st.integers(1, 10_000), "sampler": st.just(sampler),
        "spacing": st.just(spacing), "sampler_options": st.just(options),
        "spacing_options": st.just({name: draw(st.floats(0.1, 9)) for name in sorted(levels)}),
        "eta": st.none() | SHARE if "eta" in SAMPLERS[sampler].options else st.none(),
        "guidance": st.none() | st.floats(0, 30), "guidance_start": SHARE, "guidance_stop": SHARE,
        "rescale": SHARE, "dynamic_threshold": st.none() | st.floats(0.1, 1), "apg": st.booleans(),
        "apg_options": st.fixed_dictionaries({}, optional={"eta": SHARE, "momentum": st.floats(-1, 1)}),
        "perp_neg": st.none() | SHARE, "pag": st.floats(0, 9), "freeu": st.none() | st.tuples(*[SHARE] * 4),
        "attention_layers": st.lists(st.from_regex(r"[a-z_]{1,8}(\.[0-9])?", fullmatch=True)).map(tuple),
        "emphasis": st.sampled_from(["a1111", "comfyui", "plain"]), "width": SIDES, "height": SIDES,
        "original_width": SIDES, "crop_left": SIDES, "seed_resize_width": SIDES, "seed_resize_height": SIDES,
        "sigmas": st.none() | st.lists(st.floats(0, 100), max_size=4).map(tuple),
        "deterministic": st.booleans(), "noise_source": st.sampled_from(["cpu", "philox"]),
        "eta_seed_delta": st.integers(0, MAX_SEED), "variation_seed": st.none() | st.integers(0, MAX_SEED),
        "variation_strength": SHARE, "shared_start": st.booleans(), "num_images": st.integers(1, 8),
        "seed": st.integers(0, MAX_SEED - 8),
    }  # fmt: skip
    return Request(**{name: draw(strategy) for name, strategy in fields.items()})


def values_of(request: Request, index: int) -> dict[str, Any]:
    """What a picture of it has for a recipe, as `generation.recipe` makes it."""
    assert request.seed is not None
    values = json.loads(request.model_dump_json(exclude=set(PATHS)))
    size = values.pop("num_images")
    about = {"model": "tiny", "model_digest": "ab" * 32, "version": "0.1.0", "device": "cpu"}
    return {**values, **about, "seed": request.seed + index, "batch_index": index, "batch_size": size}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests(), index=st.integers(0, 7))
def test_our_recipes_come_back_equal(tmp_path: Path, suffix: str, request: Request, index: int) -> None:
    values = values_of(request, index % request.num_images)
    path = tmp_path / f"a.{suffix}"
    embed.save(Image.new("RGB", (2, 2)), path, values)
    found = read(path)
    assert found.request == request and found.index == index % request.num_images
    assert found.tool == "sfumato" and found.warnings == [] and found.ignored == []
    assert {name: value for name, value in found.values.items() if name != embed.DIGEST} == values


@settings(max_examples=70, deadline=None)
@given(request=requests())
def test_the_text_alone_says_all_but_the_prompts_edges(request: Request) -> None:
    plain = {"prompt": "a fox", "negative_prompt": "dog", "num_images": 1}
    values = {**values_of(request, 0), **plain}
    expected = {name: value for name, value in values.items() if value is not None}
    found = from_texts({"parameters": embed.to_text(values)}).request
    assert found is not None
    loose = json.loads(found.model_dump_json(exclude=set(PATHS)))
    for name, default in Request().model_dump(mode="json", exclude=set(PATHS)).items():
        assert loose[name] == expected.get(name, default), name


def test_ours_comes_before_every_other_form() -> None:
    texts = {
        "sfumato": '{"prompt": "ours", "seed": 1}', "parameters": "theirs\nSteps: 5",
        "prompt": '{"1": {"class_type": "KSampler", "inputs": {}}}', "invokeai_metadata": '{"seed": 3}',
    }  # fmt: skip
    tools = []
    for name in [None, "sfumato", "parameters", "prompt", "invokeai_metadata"]:
        texts.pop(name or "", None)
        tools.append(from_texts(texts).tool)
    assert tools == ["sfumato", "AUTOMATIC1111", "ComfyUI", "InvokeAI", ""]


def test_values_that_cannot_be_taken_stay_and_are_told() -> None:
    text = "fox\nSteps: 0, Sampler: Nobody's, CFG scale: 7, Seed: 99999999999999999999, Size: 8x8, Odd: 1"
    found = from_texts({"parameters": text})
    assert found.request == Request(prompt="fox", guidance=7, width=8, height=8, noise_source="philox")
    assert found.ignored == ["steps", "sampler", "seed", "Odd"] and found.values["steps"] == "0"
    assert 'there is no sampler "Nobody\'s"' in found.warnings
    assert any(warning.startswith("steps is '0'") for warning in found.warnings)


def test_options_that_the_sampler_does_not_have_are_left_out() -> None:
    found = from_texts({"parameters": "fox\nSteps: 5, Sampler: DPM++ 2M, Eta: 0.5, Sigma churn: 3, RNG: CPU"})
    assert found.request is not None
    assert (found.request.sampler_options, found.request.eta) == ({}, None)
    assert found.warnings == ["DPM++ 2M has no option 's_churn'"]


def test_a_picture_never_says_which_files_are_read() -> None:
    paths = dict.fromkeys(PATHS, "/etc/passwd") | {"lora": ["/etc/passwd:1"]}
    found = from_texts({"sfumato": json.dumps({"prompt": "fox", "seed": 1, **paths})})
    assert found.request == Request(prompt="fox", seed=1)
    assert (set(found.ignored) == PATHS) and {
        "weak_model", "classifier", "start_noise", "lora", "lora_dir", "embedding_dir", "wildcards",
        "styles_file",
    } <= PATHS  # fmt: skip
    assert len(found.warnings) == len(PATHS)


@pytest.mark.parametrize(
    "batch", [{"batch_size": 0}, {"batch_index": 5}, {"batch_size": "x"}, {"batch_size": 10**30},
              {"batch_size": 1e9, "batch_index": 9}, {"batch_index": None}, {"batch_size": [1]}, {"seed": -4}]
)  # fmt: skip
def test_a_batch_that_cannot_be_is_no_batch(batch: dict[str, Any]) -> None:
    found = from_texts({"sfumato": json.dumps({"prompt": "fox", "seed": 3, "batch_size": 2, **batch})})
    assert found.request is not None and found.request.num_images in (1, 2) and found.index == 0


NESTED = '{"a":' * 50_000
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        *Request.model_fields, "inputs", "class_type", "1", "2", "model", "positive", "image", "loras",
        "text", "latent_image", "sampler_name", "sigmas", "clip", "batch_size", "batch_index", "prompt",
    ]), inner, max_size=5), max_leaves=20,
)  # fmt: skip
NAMES = ["sfumato", "parameters", "prompt", "invokeai_metadata", "sd-metadata", "Dream", "UserComment",
         "ImageDescription", "Make"]  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=60) | JSONS.map(json.dumps), max_size=3))
def test_reading_never_fails(texts: dict[str, str]) -> None:
    found = from_texts(texts)
    assert found.request is None or isinstance(found.request, Request)
    json.dumps(found.values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [NESTED, "{" + '"a":' * 9, '{"a": NaN}', "[]", "9" * 6000, "prompt:{", "\0"])
def test_damaged_texts(name: str, text: str) -> None:
    assert from_texts({name: text}).tool in ("", "sfumato", "AUTOMATIC1111", "InvokeAI", "ComfyUI")


def test_a_picture_without_a_recipe(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    found = read(tmp_path / "plain.png")
    assert (found.tool, found.request, found.values) == ("", None, {})


def test_json_that_is_damaged_falls_back_to_the_text(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", "{not json")
    info.add_text("parameters", "cat\nSteps: 5, Version: sfumato 0.1.0")
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    found = read(tmp_path / "a.png")
    assert found.tool == "sfumato" and found.request == Request(prompt="cat", steps=5)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:40])
    (tmp_path / "bent.png").write_bytes(data[:20] + b"!" + data[21:])
    (tmp_path / "text.png").write_text("fox\nSteps: 5")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("cut", "bent", "text", "empty", "folder", "missing"):
        with pytest.raises(InputError, match=f"{name}.png cannot be read as a picture"):
            read(tmp_path / f"{name}.png")

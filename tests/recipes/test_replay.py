"""Which request repeats a picture, and what is said of one that came out differently."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sfumato.errors import InputError
from sfumato.recipes import embed, read
from sfumato.recipes.read import from_texts
from sfumato.recipes.recipe import Recipe, recipe
from sfumato.recipes.replay import again, check_model, compare, files_needed, open_picture
from sfumato.request import Request

ABOUT = {"version": "0.1.0", "torch": "2.13", "model_digest": "ab" * 32, "threads": 2}


def ours(**values: Any) -> Recipe:
    return from_texts({"sfumato": json.dumps({"prompt": "fox", "seed": 12, **values})})


def test_a_batch_is_repeated_whole() -> None:
    plan = again(ours(batch_size=4, batch_index=2, deterministic=False))
    assert plan.request == Request(prompt="fox", seed=10, num_images=4, deterministic=False)
    assert plan.index == 2


def test_a_deterministic_one_stands_alone() -> None:
    plan = again(ours(batch_size=4, batch_index=2, deterministic=True, variation_seed=7))
    assert plan.request == Request(prompt="fox", seed=12, deterministic=True, variation_seed=9, num_images=1)
    assert plan.index == 0
    for shared in ({"shared_start": True}, {"start_noise_sha256": "ab" * 32}):
        assert again(ours(batch_size=4, batch_index=2, deterministic=True, **shared)).request.num_images == 4


def test_what_cannot_be_repeated() -> None:
    with pytest.raises(InputError, match="holds no recipe"):
        again(Recipe("", None, {}))
    with pytest.raises(InputError, match="a sheet of several"):
        again(ours(grid=4))


def test_a_picture_does_not_choose_the_model() -> None:
    here = "0123456789" + "ab" * 27
    assert check_model(ours(model="tiny", model_digest=here), "tiny", here, False) == []
    assert check_model(recipe("Forge", {"model_digest": here[:10].upper()}), "tiny", here, False) == []
    assert check_model(ours(), "tiny", here, False) == []
    other = ours(model="other", model_digest="ff" * 32)
    with pytest.raises(InputError, match=r"drawn with other \(ffffffffff\)"):
        check_model(other, "tiny", here, False)
    (warning,) = check_model(other, "tiny", here, True)
    assert warning == "the picture was drawn with other (ffffffffff), not with tiny (0123456789)"
    assert check_model(recipe("A", {"model_digest": here[:4]}), "tiny", here, True), "too few letters to tell"


def test_files_are_asked_for() -> None:
    for name in ("weak_model", "classifier", "lora"):
        with pytest.raises(InputError, match="drawn with a file for") as caught:
            files_needed(ours(**{name: "x"}), [])
        assert f"--{name.replace('_', '-')}" in caught.value.hint
        assert files_needed(ours(**{name: "x"}), [name]) == {}
    with pytest.raises(InputError, match="start_noise"):
        files_needed(ours(start_noise_sha256="ab"), [])
    assert files_needed(ours(lora_dir="x"), []) == {}
    assert files_needed(ours(embedding_dir="x", embeddings={}), []) == {}
    with pytest.raises(InputError, match="embedding_dir"):
        files_needed(ours(embedding_dir="x", embeddings={"q": "ab"}), [])


def test_prompts_drawn_from_files_are_taken_as_drawn() -> None:
    drawn = {"prompt": "a __colour__ fox", "drawn_prompt": "a red fox", "wildcards": "x", "styles": ["ink"]}
    assert files_needed(ours(**drawn), []) == {"prompt": "a red fox", "styles": ()}
    assert files_needed(ours(**drawn), ["wildcards"]) == {}
    with pytest.raises(InputError, match="wildcards"):
        files_needed(ours(**drawn, batch_size=3), [])


# Comparisons


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_equal_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    embed.save(picture(), path, {"prompt": "fox", "seed": 1, "quality": 60}, 60)
    found = compare(path, read(path), picture(), {})
    assert found.equal and found.psnr == math.inf and found.reasons == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_reasons_for_a_difference(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    embed.save(picture(), path, {"prompt": "fox", "seed": 1, **ABOUT})
    near = Image.fromarray(np.maximum(np.array(picture()), 1) - 1)  # type: ignore[arg-type]
    found = compare(path, read(path), near, {**ABOUT, "torch": "2.14", "model_digest": "cd" * 32})
    assert not found.equal and found.psnr is not None and found.psnr > 35
    assert found.reasons == [
        "other weights: ababababab then, cdcdcdcdcd now", "another version of torch: 2.13 then, 2.14 now",
    ]  # fmt: skip
    assert compare(path, read(path), picture(size=(8, 16)), ABOUT).psnr is None


def test_a_picture_that_was_changed_since(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    embed.save(picture(), path, {"prompt": "fox", "seed": 1})
    with Image.open(path, formats=["PNG"]) as image:
        texts = image.info["sfumato"]
    info = PngImagePlugin.PngInfo()
    info.add_text("sfumato", texts)
    picture(1).save(path, pnginfo=info)
    found = compare(path, read(path), picture(), {})
    assert found.equal and found.reasons == ["the picture in the file was changed after it was drawn"]


def test_pictures_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    theirs = from_texts({"parameters": "fox\nSteps: 5, Version: v1.9"})
    assert compare(path, theirs, picture(), {}).equal
    assert compare(path, theirs, picture(1), {}).reasons == ["it was drawn by AUTOMATIC1111"]


def test_pictures_that_are_too_large_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (1, 1)).save(path)
    data = path.read_bytes()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    path.write_bytes(data[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[33:])
    with pytest.raises(InputError, match="20000x20000 pixels"):
        open_picture(path)
    embed.save(picture(), path, {})
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT") + 8
    data[place : place + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        open_picture(path)

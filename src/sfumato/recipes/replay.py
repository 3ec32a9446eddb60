"""Drawing a picture again: which request repeats it, and whether and why what comes out differs."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.errors import InputError
from sfumato.recipes.containers import read_container
from sfumato.recipes.embed import DIGEST, QUALITY, digest, encode
from sfumato.recipes.recipe import PATHS, Recipe, printable
from sfumato.request import Request

WORDS = ("wildcards", "styles_file")  # what is taken from these stands in the prompts as drawn
MAX_PIXELS = 16_384 * 16_384
# What decides how numbers are rounded, by what people call it.
CAUSES = {
    "model_digest": "other weights",
    "version": "another version of sfumato",
    "torch": "another version of torch",
    "device": "another device",
    "hardware": "another processor",
    "dtype": "another number format",
    "threads": "another number of threads",
    "float32_retries": "other stages repeated in float32",
    "loras": "other LoRA weights",
    "embeddings": "other embeddings",
    "weak_model_digest": "another weak model",
    "classifier_digest": "another classifier",
    "start_noise_sha256": "another start noise",
    "init_sha256": "another picture to start from",
    "mask_sha256": "another mask",
    "region_masks_sha256": "other masks of regions",
    "control_sha256": "another control",
    "image_encoder_digest": "another image encoder",
    "hires_network_digest": "another network that enlarges",
}


@dataclass(frozen=True)
class Again:
    """A request whose picture at `index` is the one of a recipe."""

    request: Request
    index: int


@dataclass(frozen=True)
class Comparison:
    """Two pictures, the old one and that drawn anew.

    psnr: in dB over all 8-bit values, infinite for equal ones, None for pictures of other sizes. reasons:
    what is known to be otherwise than it was; none where nothing is.
    """

    equal: bool
    psnr: float | None
    reasons: list[str]


def again(recipe: Recipe) -> Again:
    """What to ask for to get the picture of a recipe: its whole batch, or it alone where that is the same.

    `InputError` for a picture without a recipe, and for a sheet of several.
    """
    request = recipe.request
    if request is None:
        raise InputError("the picture holds no recipe", "`sfumato info` shows what a picture's file says.")
    if "grid" in recipe.values:
        raise InputError("this is a sheet of several pictures", "Replay one of them, or draw the sheet anew.")
    batch = request.num_images > 1 and not request.deterministic
    given = any(f"{name}_sha256" in recipe.values for name in PATHS)  # one for all, or one for each
    if batch or given or request.shared_start or request.seed is None:
        return Again(request, recipe.index)
    alone: dict[str, Any] = {"num_images": 1, "seed": request.seed + recipe.index}
    if request.variation_seed is not None:
        alone["variation_seed"] = request.variation_seed + recipe.index
    return Again(request.model_copy(update=alone), 0)


def files_needed(recipe: Recipe, given: Collection[str]) -> dict[str, Any]:
    """Fields of the request to change for want of the files that the picture was drawn with.

    given: the fields of files that someone has named. Prompts that were drawn from files are taken as they
    were drawn, where the picture stands alone. A folder of LoRA is asked for by drawing, where a prompt has
    tags, and one of embeddings is not where none was used. `InputError` for what cannot be done without
    its file.
    """
    values, changes = recipe.values, dict[str, Any]()
    alone = recipe.request is not None and (recipe.request.num_images == 1 or recipe.request.deterministic)
    for name in sorted(PATHS):
        named = values.get(name, values.get(f"{name}_sha256"))
        used = values.get("embeddings") if name == "embedding_dir" else name != "lora_dir"
        if not named or name in given or used in ({}, False):
            continue
        if name in WORDS and alone:
            for field in ("prompt", "negative_prompt"):
                if f"drawn_{field}" in values:
                    changes[field] = values[f"drawn_{field}"]
            changes["styles"] = ()
            continue
        raise InputError(
            f"the picture was drawn with a file for {name}, {_short(named)!r}",
            f"Give it with --{name.replace('_', '-')}{_as_written(values) if name == 'control' else ''}.",
        )
    return changes


def _as_written(values: Mapping[str, Any]) -> str:
    """The controls of a recipe as texts, without the files that a picture must not name."""
    texts = []
    for one in values.get("controls", ()):
        if not isinstance(one, Mapping):
            continue
        given = {name: one[name] for name in ("weight", "start", "end", "mode", "resize") if name in one}
        more = one.get("options")
        given |= more if isinstance(more, Mapping) else {}
        words = " ".join(f"{name}={value}" for name, value in given.items())
        texts.append(printable(f' "{one.get("kind")}:PICTURE model=FILE {words}"'))
    return ", and again with".join(texts)


def check_model(recipe: Recipe, name: str, found: str | None, given: bool) -> list[str]:
    """What to say of the model that a recipe is to be drawn with, of this name and digest.

    given: whether someone chose it. `InputError` where nobody did and it is not the recipe's: a picture never
    decides which weights are loaded.
    """
    wanted, model = recipe.values.get("model_digest"), recipe.values.get("model")
    if _same_digest(wanted, found) or (wanted is None and model in (None, name)):
        return []
    label = f"{_short(model or 'another model')}" + (f" ({_short(wanted)[:10]})" if wanted else "")
    if not given:
        raise InputError(f"the picture was drawn with {label}", "Give its file or name with --model.")
    return [f"the picture was drawn with {label}, not with {name} ({str(found)[:10]})"]


def _same_digest(wanted: Any, found: str | None) -> bool:
    """Whether a digest, or the first letters of one as other tools write them, is that of the model."""
    short = str(wanted).lower().removeprefix("sha256:")
    return found is not None and len(short) >= 8 and found.startswith(short)


def open_picture(path: Path) -> Image.Image:
    """The pixels of a PNG, JPEG or WebP file; `InputError` where it is damaged or larger than 16384x16384."""
    container = read_container(path)
    if container.width * container.height > MAX_PIXELS:
        raise InputError(
            f"{path} has {container.width}x{container.height} pixels", "That is too many to open."
        )
    try:
        with Image.open(path, formats=[container.format]) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}", "Give a whole file.") from error


def compare(
    path: Path, recipe: Recipe, image: Image.Image, values: Mapping[str, Any], quality: int = QUALITY
) -> Comparison:
    """The picture of a file and its recipe against one drawn anew, with the recipe `values` of that.

    Where the file says which pixels were drawn, equal means those. Otherwise its own are compared, with the
    new picture put through the same lossy format at `quality`.
    """
    drawn, old = recipe.values.get(DIGEST), open_picture(path)
    kind = read_container(path).format
    packed = recipe.values.get("quality")
    quality = packed if isinstance(packed, int) and 1 <= packed <= 100 else quality
    through = image if kind == "PNG" else _through(image, kind, quality)
    psnr = _psnr(old, through)
    equal = drawn == digest(image) if drawn else psnr == math.inf
    reasons = [] if equal else _differences(recipe, values)
    if drawn and kind == "PNG" and drawn != digest(old):
        reasons.append("the picture in the file was changed after it was drawn")
    return Comparison(equal, psnr, reasons)


def _differences(recipe: Recipe, values: Mapping[str, Any]) -> list[str]:
    if recipe.tool != "sfumato":
        return [f"it was drawn by {recipe.tool}"]
    old = recipe.values
    changed = [name for name in CAUSES if name in old and old[name] != values.get(name)]
    return [f"{CAUSES[name]}: {_short(old[name])} then, {_short(values.get(name))} now" for name in changed]


def _short(value: Any) -> str:
    text = printable(str(value))
    return text[:10] if len(text) == 64 else text[:80]


def _through(image: Image.Image, kind: str, quality: int) -> Image.Image:
    with Image.open(io.BytesIO(encode(image, kind, {}, quality)), formats=[kind]) as coded:
        coded.load()
        return coded.copy()


def _psnr(one: Image.Image, two: Image.Image) -> float | None:
    if one.size != two.size:
        return None
    mode = one.mode if one.mode == two.mode and one.mode in ("L", "RGB", "RGBA") else "RGB"
    first, second = (np.asarray(each.convert(mode), dtype=np.float64) for each in (one, two))
    error = float(np.square(first - second).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)

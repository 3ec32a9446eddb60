"""`sfumato replay`: a picture drawn again by the recipe in its file."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.options import Ema, Offline, Prediction, Vae

FILE = Parameter(metavar="FILE", help="That of the recipe, if it names one: pictures choose no files.")
CONTROL = Parameter(metavar="TEXT", negative=(), help="A control, as in `sfumato generate`.")
LORA = Parameter(metavar="TEXT", help="LoRA to apply, as in `sfumato generate`.")


def replay(
    image: Annotated[Path, Parameter(help="A PNG, JPEG or WebP file with a recipe.")],
    *,
    check: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="Compare with the picture: exit code 0 if equal, 1 if not. Writes nothing without -o.",
        ),
    ] = False,
    output: Annotated[
        Path | None, Parameter(alias="-o", help="File or folder to write; NAME-replay.png here if not given.")
    ] = None,
    model: Annotated[
        str | None,
        Parameter(metavar="MODEL", help="As in `sfumato generate`; else the embedded one."),
    ] = None,
    init: Annotated[Path | None, FILE] = None,
    mask: Annotated[Path | None, FILE] = None,
    start_noise: Annotated[Path | None, FILE] = None,
    weak_model: Annotated[str | None, FILE] = None,
    classifier: Annotated[str | None, FILE] = None,
    control: Annotated[list[str] | None, CONTROL] = None,
    control_dir: Annotated[Path | None, FILE] = None,
    image_encoder: Annotated[str | None, FILE] = None,
    region_masks: Annotated[list[Path] | None, FILE] = None,
    hires_network: Annotated[str | None, FILE] = None,
    lora: Annotated[str | None, LORA] = None,
    lora_dir: Annotated[Path | None, FILE] = None,
    embedding_dir: Annotated[Path | None, FILE] = None,
    wildcards: Annotated[Path | None, FILE] = None,
    styles_file: Annotated[Path | None, FILE] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    offline: Offline = False,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, Parameter(metavar="NAME", help="float32, float16, bfloat16, or auto.")] = "auto",
) -> int:
    """Draw a picture again by its recipe: our own pictures exactly, those of other tools as near as it goes.

    A picture of a batch is drawn with its whole batch, on which the last bits depend, unless it was drawn
    with --deterministic.
    """
    # These import torch, which a help text can do without.
    from sfumato import images
    from sfumato.cli.draw import drawn
    from sfumato.cli.outputs import picture_place, write
    from sfumato.generation import complete
    from sfumato.model import load
    from sfumato.recipes import read
    from sfumato.recipes.prompts import with_values
    from sfumato.recipes.replay import again, check_model, compare, files_needed

    recipe = read(image)
    plan = again(recipe)
    files = {
        "init": init, "mask": mask, "start_noise": start_noise, "weak_model": weak_model,
        "classifier": classifier, "lora": lora, "lora_dir": lora_dir, "embedding_dir": embedding_dir,
        "wildcards": wildcards, "styles_file": styles_file, "control": control, "control_dir": control_dir,
        "image_encoder": image_encoder, "region_masks": region_masks, "hires_network": hires_network,
    }  # fmt: skip
    given = {name: value for name, value in files.items() if value is not None}
    changes = {**files_needed(recipe, given), **given}
    where = None if check and output is None else picture_place(output)
    loaded = load(model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, offline=offline)
    for warning in [*recipe.warnings, *check_model(recipe, loaded.name, loaded.digest, model is not None)]:
        _warn(warning)
    request = complete(loaded, with_values(plan.request, changes))
    result = drawn(loaded, request)
    picture, values = result.images[plan.index], result.parameters[plan.index]
    for name in given:
        if values.get(f"{name}_sha256") != recipe.values.get(f"{name}_sha256"):
            _warn(f"{given[name]} is not what the picture was drawn with")
    if where is not None:
        stem = where.stem or f"{image.stem}-replay"
        path = where.folder / f"{stem}{where.suffix}" if where.stem else None
        path = path or images.free_path(where.folder, stem, where.suffix)
        write(picture, path, values, where)
        print(path)
    if not check:
        return 0
    compared = compare(image, recipe, picture, values)
    if compared.equal:
        print("equal")
    else:
        print(f"different: {_distance(compared.psnr)}")
    for reason in compared.reasons:
        print(f"  {reason}")
    if not compared.equal and not compared.reasons:
        print("  nothing that the recipe records is otherwise")
    return 0 if compared.equal else 1


def _distance(psnr: float | None) -> str:
    if psnr is None:
        return "another size"
    return "equal pixels in the file" if psnr == math.inf else f"PSNR {psnr:.1f} dB"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)

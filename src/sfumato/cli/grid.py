"""`sfumato grid`: one sheet of pictures over two or three axes of any fields of a request."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sfumato.cli.options import Ema, Offline, Prediction, Vae, takes_request
from sfumato.errors import InputError
from sfumato.request import Request

if TYPE_CHECKING:
    from sfumato.model import StableDiffusion

AXIS = "as sampler=euler,heun or guidance=4..10/3 or prompt:apple=pear,fox"


@takes_request
def grid(
    request: Request,
    *,
    x: Annotated[str | None, Parameter(metavar="AXIS", help=f"From left to right, {AXIS}.")] = None,
    y: Annotated[str | None, Parameter(metavar="AXIS", help="From top to bottom.")] = None,
    z: Annotated[
        str | None, Parameter(metavar="AXIS", help="From one part of the sheet to the next.")
    ] = None,
    output: Annotated[Path | None, Parameter(alias="-o", help="File (.png, .jpg, .webp) to write.")] = None,
    quality: Annotated[int, Parameter(metavar="INT", help="1 to 100, of jpg and webp.")] = 95,
    cells_too: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Also write every picture by itself.")
    ] = False,
    model: Annotated[
        str | None,
        Parameter(metavar="MODEL", help="As in `sfumato generate`; else the embedded one."),
    ] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    offline: Offline = False,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, Parameter(metavar="NAME", help="float32, float16, bfloat16, or auto.")] = "auto",
) -> None:
    """Draw a labelled sheet over axes.

    An axis is FIELD=VALUE,VALUE of any option of this command; values with commas stand in double quotes.
    Numbers in even steps are A..B (by ones) or A..B/N (N of them, both ends included).
    prompt:WORD=OTHER,OTHER replaces a word of the prompt, sampler_options.s_churn=0,10 sets one option.
    All cells have one seed, unless an axis is of seeds.
    """
    started = time.perf_counter()
    # These import torch, which a help text can do without.
    from sfumato import images
    from sfumato.cli.draw import drawn
    from sfumato.cli.outputs import picture_place, save, write
    from sfumato.generation import complete
    from sfumato.model import load
    from sfumato.recipes.axes import cells, read_axis
    from sfumato.recipes.sheet import Labels, check_size, labelled

    texts = {name: text for name, text in (("x", x), ("y", y), ("z", z)) if text is not None}
    if not texts:
        raise InputError("no axis is given", "Give --x, --y or both, as --x sampler=euler,heun.")
    if request.num_images != 1:
        raise InputError(f"num_images is {request.num_images}; a cell holds one picture", "Leave it out.")
    axes = {name: read_axis(text) for name, text in texts.items()}
    order = [name for name in "zyx" if name in axes]
    asked = [each for _, each in cells(request, [axes[name] for name in order])]
    where = picture_place(output, None, quality)
    loaded = load(model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, offline=offline)
    first = complete(loaded, asked[0])
    plans = [
        complete(loaded, each if each.seed is not None else each.model_copy(update={"seed": first.seed}))
        for each in asked
    ]
    for plan in plans:
        _check(loaded, plan)
    labels = {
        name: Labels(axes[name].title, axes[name].values) if name in axes else Labels() for name in "xyz"
    }
    sizes = {(plan.width, plan.height) for plan in plans}
    if len(sizes) > 1:
        raise InputError("the cells have different sizes", "Draw those pictures one by one.")
    assert first.width is not None and first.height is not None
    sheet_of = (labels["x"], labels["y"], labels["z"], request.prompt or "")
    check_size((first.width, first.height), *sheet_of)
    pictures, parameters = [], []
    for index, plan in enumerate(plans):
        result = drawn(loaded, plan, f"drawing {index + 1}/{len(plans)}")
        pictures += result.images
        parameters += result.parameters
        if cells_too:
            for path in save(result, where.numbered(index, len(plans))):
                print(path)
    described: dict[str, Any] = {name: {"axis": texts[name], "values": axes[name].values} for name in order}
    values = {**parameters[0], "prompt": request.prompt, "grid": described}
    stem = where.stem or f"{images.file_stem(request.prompt, parameters[0]['seed'])}-grid"
    path = where.folder / f"{stem}{where.suffix}"
    if where.stem is None:
        path = images.free_path(where.folder, stem, where.suffix)
    write(labelled(pictures, *sheet_of), path, values, where)
    print(path)
    seconds = time.perf_counter() - started
    print(f"{len(plans)} pictures in {seconds:.1f} s, seed {first.seed}, {loaded.name}", file=sys.stderr)


def _check(model: StableDiffusion, plan: Request) -> None:
    """`InputError` for what only drawing would find out: options of the sampler and noise levels."""
    from sfumato.diffusion.samplers import sampler
    from sfumato.diffusion.spacing import custom, space
    from sfumato.errors import nearest

    assert plan.sampler is not None and plan.steps is not None
    assert plan.height is not None and plan.width is not None
    row = sampler(plan.sampler)
    given = {"eta": plan.eta, "variance": plan.variance, **plan.sampler_options}
    for name, value in given.items():
        if value is not None and name not in row.options:
            hint = nearest(name, row.options) if row.options else "It has no options."
            raise InputError(f"{plan.sampler} has no option {name!r}", hint)
    if plan.sigmas is not None:
        custom(plan.sigmas)
    else:
        space(
            plan.spacing, model.schedule, plan.steps, plan.spacing_options,
            discard_penultimate=row.discard_penultimate,
        )  # fmt: skip
    model.latent_shape(plan.height, plan.width)

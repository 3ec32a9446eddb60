"""`sfumato generate`: pictures from a prompt, or from many, into files that carry their recipes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sfumato.cli.options import (
    Ema,
    Offline,
    Prediction,
    Revision,
    Vae,
    Variant,
    Vocab,
    takes_request,
)
from sfumato.errors import InputError
from sfumato.request import Request


@takes_request
def generate(
    request: Request,
    *,
    output: Annotated[
        Path | None, Parameter(alias="-o", help="File (.png, .jpg, .webp) or folder to write.")
    ] = None,
    format: Annotated[
        Literal["png", "jpg", "webp"] | None,
        Parameter(help="Format, where no file's name says it; png if nothing does."),
    ] = None,
    quality: Annotated[
        int, Parameter(metavar="INT", help="1 to 100, of jpg and webp; at 100 webp loses nothing.")
    ] = 95,
    grid: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Also write one sheet of all pictures.")
    ] = False,
    watch: Annotated[
        Path | None, Parameter(metavar="FILE", help="PNG file that shows the pictures as they come to be.")
    ] = None,
    matrix: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="Draw 'a|b|c' as every choice of b and c behind a, with equal seeds.",
        ),
    ] = False,
    from_file: Annotated[
        Path | None,
        Parameter(
            metavar="FILE",
            help="Draw the prompt of each line, which may set options: a fox --seed 3 --steps 20.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Parameter(
            metavar="MODEL",
            help="Model file, diffusers folder or name on the hub; the embedded one if not given.",
        ),
    ] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    vocab: Vocab = None,
    variant: Variant = None,
    offline: Offline = False,
    revision: Revision = None,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, Parameter(metavar="NAME", help="float32, float16, bfloat16, or auto.")] = "auto",
) -> None:
    """Draw pictures from a prompt."""
    started = time.perf_counter()
    # These import torch, which a help text can do without.
    from sfumato.cli.draw import drawn
    from sfumato.cli.outputs import check_recipe, picture_place, save, save_sheet
    from sfumato.generation import complete
    from sfumato.model import load

    requests = _requests(request, from_file, matrix)
    where = picture_place(output, format, quality)
    for each in requests:
        check_recipe(each, where)
    loaded = load(
        model, device=device, dtype=dtype, vae=vae, prediction=prediction, ema=ema, offline=offline,
        revision=revision, variant=variant, vocab=vocab,
    )  # fmt: skip
    plans = [complete(loaded, each) for each in requests]
    if matrix:
        plans = [plan.model_copy(update={"seed": plans[0].seed}) for plan in plans]
    results, steps = [], ""
    for index, plan in enumerate(plans):
        result = drawn(
            loaded, plan, f"drawing {index + 1}/{len(plans)}" if len(plans) > 1 else "drawing", watch
        )
        own = where if len(plans) == 1 else where.numbered(index, len(plans))
        if isinstance(plan.init, Path) and request.init != plan.init and plan.num_images == 1:
            own = own.after(plan.init)
        for path in save(result, own, grid and len(plans) == 1):
            print(path)
        if grid and len(plans) > 1:
            results.append(result)
        if plan.init is not None:
            steps = f"{result.parameters[0]['steps_run']} steps from strength {plan.strength:g}, "
    if results:
        print(save_sheet(results, where, request.prompt if matrix else None))
    drawings = sum(plan.num_images for plan in plans)
    count = f"{drawings} pictures" if drawings > 1 else "1 picture"
    seconds = time.perf_counter() - started
    seed = f"seed {plans[0].seed}, " if len({plan.seed for plan in plans}) == 1 else ""
    print(f"{count} in {seconds:.1f} s, {seed}{steps}{loaded.name}", file=sys.stderr)


def _requests(request: Request, from_file: Path | None, matrix: bool) -> list[Request]:
    """What a request, a file of prompts, or a prompt matrix asks for."""
    from sfumato.recipes import prompts  # imports torch, as above

    if matrix and from_file is not None:
        raise InputError("--matrix and --from-file are both given", "Give one of them.")
    if from_file is not None:
        if request.prompt is not None:
            raise InputError("a prompt and --from-file are both given", "Give one of them.")
        return prompts.read_prompts(from_file, request)
    if not matrix:
        return _for_each_picture(request)
    if not request.prompt:
        raise InputError("--matrix has no prompt", "Give one such as 'a fox|in snow|at night'.")
    return [prompts.with_values(request, {"prompt": text}) for text in prompts.matrix(request.prompt)]


def _for_each_picture(request: Request) -> list[Request]:
    """The request; one for each picture, where it starts from a folder of them."""
    from sfumato.intake import is_picture  # imports numpy, which a help text can do without

    if not isinstance(request.init, Path) or not request.init.is_dir():
        return [request]
    found = sorted(path for path in request.init.iterdir() if is_picture(path))
    if not found:
        raise InputError(
            f"{request.init} holds no pictures", "Give a picture, or a folder of them, to --init."
        )
    return [request.model_copy(update={"init": path}) for path in found]

"""`sfumato convert`: a model in another layout, number format or selection of its parts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sfumato.cli.options import Ema, Offline, Prediction, Revision, Vae, Variant, Vocab


def convert(
    source: Annotated[str, Parameter(help="A file of any format, a diffusers folder, or a name on the hub.")],
    out: Annotated[Path, Parameter(help="A .safetensors file, or a folder, to write.")],
    *,
    layout: Annotated[
        Literal["ldm", "diffusers"] | None,
        Parameter(help="One file as the original's, or a diffusers folder. Default: by the name of OUT."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        Parameter(help="Number format of the weights. Default: as they are."),
    ] = None,
    only: Annotated[
        Literal["unet", "vae", "text"] | None, Parameter(help="One part alone. Default: all of it.")
    ] = None,
    force: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Replace OUT where it is there already.")
    ] = False,
    lora: Annotated[
        list[str] | None,
        Parameter(
            metavar="LORA",
            negative=(),
            help="Merge this LoRA's file, or its name in --lora-dir: FILE, FILE:0.8, or FILE:0.8:0.5 for "
            "U-Net and text encoders. May be given several times.",
        ),
    ] = None,
    lora_dir: Annotated[
        Path | None, Parameter(metavar="FOLDER", help="Where --lora finds names, in folders below it too.")
    ] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    vocab: Vocab = None,
    variant: Variant = None,
    offline: Offline = False,
    revision: Revision = None,
) -> None:
    """Write a model in another layout; tensors that both layouts hold stay bit-equal, the rest is listed."""
    # These import torch, which a help text can do without.
    from sfumato.checkpoints.addons.apply import merged, read_weighted
    from sfumato.checkpoints.convert import check_out
    from sfumato.checkpoints.convert import convert as write
    from sfumato.checkpoints.load import open_model
    from sfumato.checkpoints.report import some
    from sfumato.runtime import DTYPES

    check_out(out, layout, force)
    loras = [read_weighted(text, lora_dir) for text in lora or ()]
    opened = open_model(
        source, vae=vae, prediction=prediction, ema=ema, offline=offline, revision=revision,
        variant=variant, vocab=vocab,
    ).opened  # fmt: skip
    done = write(
        merged(opened, loras), out, layout=layout, dtype=None if dtype is None else DTYPES[dtype],
        only=only, force=force,
    )  # fmt: skip
    print(f"{done.path}: {done.layout}, {done.size / 1e9:.2f} GB, {opened.family}")
    for part, count in done.parts.items():
        print(f"  {part}: {count} tensors")
    for rule, names in done.left_out.items():
        print(f"  left out, {rule}: {len(names)} tensors ({some(list(names))})")
    for each in loras:
        print(f"  merged, {each.lora.name}: U-Net {each.unet:g}, text encoders {each.text:g}")
    if opened.config.unet is not None and only is None:
        print(f"prediction {opened.config.prediction}: {opened.evidence}", file=sys.stderr)

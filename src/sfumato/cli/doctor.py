"""`sfumato doctor`: what is wrong with a model, found by asking its networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.options import Ema, Offline, Prediction, Vae

SIGNS = {"good": "ok   ", "note": "?    ", "fault": "FAULT"}
MOST = 16  # pictures of a folder that are looked at


def doctor(
    model: Annotated[
        str | None,
        Parameter(metavar="MODEL", help="As --model of `sfumato generate`; else the embedded one."),
    ] = None,
    *,
    pictures: Annotated[
        Path | None,
        Parameter(metavar="FOLDER", help="Pictures of what it was trained on; simple drawings if not given."),
    ] = None,
    vae: Vae = None,
    prediction: Prediction = None,
    ema: Ema = False,
    offline: Offline = False,
    device: Annotated[str, Parameter(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
) -> int:
    """Examine a model: its weights, what it predicts, its schedule, the scale of its latents.

    It is asked about forty times about eight drawings, or 16 of the pictures: seconds for the embedded model.
    The exit code is 1 where there is a fault.
    """
    # These import torch, which a help text can do without.
    from sfumato import images
    from sfumato.doctor import drawings, examine
    from sfumato.errors import InputError
    from sfumato.intake import is_picture, open_picture
    from sfumato.model import load

    loaded = load(
        model, device=device, dtype="float32", vae=vae, prediction=prediction, ema=ema, offline=offline
    )
    shown = None
    if pictures is not None:
        found = sorted(path for path in pictures.iterdir() if is_picture(path)) if pictures.is_dir() else []
        if not found:
            raise InputError(f"{pictures} holds no pictures", "Give a folder of some that it should draw.")
        channels, height, width = drawings(loaded).shape[1:]
        size, mode = (width, height), images.MODES[channels]
        chosen = found[:: -(-len(found) // MOST)]
        shown = images.to_tensor([open_picture(path).convert(mode).resize(size) for path in chosen], mode)
    faults = 0
    for finding in examine(loaded, shown):
        print(
            f"{SIGNS[finding.level]} {finding.found}"
            + (f"\n      {finding.remedy}" if finding.remedy else "")
        )
        faults += finding.level == "fault"
    return 1 if faults else 0

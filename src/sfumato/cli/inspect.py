"""`sfumato inspect`: what is in a model file, without loading it."""

from __future__ import annotations

import json as text
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli.options import Ema, Offline, Prediction, Revision, Variant


def inspect(
    model: Annotated[str, Parameter(help="A file of any format, a diffusers folder, or a name on the hub.")],
    *,
    digest: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Also its sha256, which reads all of it.")
    ] = False,
    json: Annotated[bool, Parameter(negative=(), show_default=False, help="Print JSON.")] = False,
    ema: Ema = False,
    prediction: Prediction = None,
    variant: Variant = None,
    offline: Offline = False,
    revision: Revision = None,
) -> None:
    """Show family, parts, prediction and why, tensors used and left out, metadata.

    No tensor is read. The exit code is 3 where the file is no model that loads, with a report of what it is.
    """
    # These import torch, which a help text can do without.
    from sfumato.checkpoints.detect.plan import explain_unknown
    from sfumato.checkpoints.files import open_file
    from sfumato.checkpoints.open import locate, name_of, open_path
    from sfumato.checkpoints.report import as_text, report, unknown_report
    from sfumato.errors import CheckpointError

    def show(values: dict[str, object]) -> None:
        print(text.dumps(values, indent=2, ensure_ascii=False) if json else as_text(values), flush=True)

    path = locate(model, offline=offline, revision=revision, variant=variant)
    try:
        opened = open_path(
            path, prediction=prediction, ema=ema, variant=variant, mmap=True, name=name_of(model, path)
        )
    except CheckpointError as error:
        if path.is_file():
            show(unknown_report(open_file(path), error.message, digest=digest))
        raise
    show(report(opened, digest=digest))
    if opened.unknown:
        raise explain_unknown(opened.unknown, opened.place, opened.parts)

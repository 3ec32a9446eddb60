"""The released network that a damaged one is nearest to, so that what is missing can be named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.checkpoints.detect.families import UNETS
from sfumato.checkpoints.detect.locate import Found
from sfumato.checkpoints.layouts.tables import generate
from sfumato.families import AUTOENCODERS

KNOWN: Mapping[str, Mapping[str, Any]] = {"unet": UNETS, "autoencoder": AUTOENCODERS}
ENOUGH = 0.4  # of a network's tensors, there in their shapes, for the rest to be called missing
FEW = 40  # tensors, after which a network that has less than enough is given up


def nearest_known(found: Found) -> Any | None:
    """The released configuration that most tensors of the part speak for; None where too few do."""
    best, share = None, ENOUGH
    for config in KNOWN.get(found.part, {}).values():
        there = _overlap(found, config)
        if there > share:
            best, share = config, there
    return best


def _overlap(found: Found, config: Any) -> float:
    """The share of tensors, of the part's or the network's if that has more, that are in both; 0 for few."""
    total = there = 0
    for pair in generate(found.part, config, found.layout):
        for name, shape in zip(pair.foreign, pair.foreign_shapes(), strict=True):
            total += 1
            there += found.shapes.get(name) == shape
        if total > FEW and there < ENOUGH * total:
            return 0.0
    return there / max(total, len(found.shapes))

"""What a token's weight does to the text encoder's states, in the two ways that prompts are written for."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.text.emphasis import Dialect


def weighted(states: Tensor, weights: Tensor, empty: Tensor | None, dialect: Dialect) -> Tensor:
    """States (rows, n, width) with the weights (rows, n) of their tokens; a row of weights 1 stays as it is.

    "a1111" scales the states and then the whole row so that its mean is what it was; "comfyui" goes from the
    empty prompt's states (n, width) through the given ones, 1 being there. In float32 at least, returned in
    the states' own type.
    """
    changed = (weights != 1).any(dim=1)
    if not bool(changed.any()):
        return states
    exact = torch.promote_types(states.dtype, torch.float32)
    rows, factors = states[changed].to(exact), weights[changed].to(states.device, exact)[..., None]
    if dialect == "a1111":
        result = restore_mean(rows * factors, rows)
    else:
        assert empty is not None
        start = empty.to(exact)
        # Where the weight is 1 the state itself, not what rounding leaves of it.
        result = torch.where(factors == 1, rows, start + (rows - start) * factors)
    joined = states.clone()
    joined[changed] = result.to(states.dtype)
    return joined


def restore_mean(scaled: Tensor, original: Tensor) -> Tensor:
    """`scaled` (rows, n, width) times one number a row that gives it the mean of `original`.

    A row whose scaled mean is 0 stays as it is: no number would do.
    """
    wanted = original.mean(dim=(1, 2), keepdim=True)
    mean = scaled.mean(dim=(1, 2), keepdim=True)
    ratio = torch.where(mean == 0, torch.ones_like(mean), wanted / torch.where(mean == 0, 1, mean))
    return scaled * ratio

"""All that a run goes on from, as tensors by name, and back into its networks, averages and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import CheckpointError
from sfumato.training.config import TrainingConfig
from sfumato.training.ema import Ema
from sfumato.training.sharding import put
from sfumato.training.state import State

PLACES = ("path", "conditions", "masks")
# What may change in a recipe while its run is under way.
RESUME_FREE = {"out", "device", "notices", "name"}
LOOP_FREE = {
    "images", "log_images", "save_images", "preview_images", "keep", "write_retries", "bad_steps",
    "score_raw", "parallel", "tensorboard",
}  # fmt: skip


def fingerprint(config: TrainingConfig, digest: str) -> dict[str, Any]:
    """What a state must agree with to go on from it; digest: of the data and files that training reads."""
    values = config.model_dump(mode="json", exclude=RESUME_FREE)
    values["loop"] = {key: value for key, value in values["loop"].items() if key not in LOOP_FREE}
    for source in (values["data"], *values["data"]["folders"]):
        for place in PLACES:  # what is there, the digest says
            source.pop(place)
    return (
        {"data_digest": digest}
        | {f"{k}.{n}": v for k, t in values.items() if isinstance(t, dict) for n, v in t.items()}
        | {key: value for key, value in values.items() if not isinstance(value, dict)}
    )


def averages_of(modules: Mapping[str, nn.Module], half_lives: tuple[int, ...]) -> dict[str, Ema]:
    """An average of each length by the name that its tensors begin with; the first is the model's."""
    names = ["ema", *(f"ema-{length}" for length in half_lives[1:])]
    return {name: Ema(modules, length) for name, length in zip(names, half_lives, strict=True)}


def tensors_of(
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Ema],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> dict[str, Tensor]:
    """Weights, averages and the optimizers' memories by name."""
    tensors = _live(modules, averages)
    for part, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{part}.{index}.{key}": value
                for key, value in values.items()
                if isinstance(value, Tensor)
            }
    return tensors


def _live(modules: Mapping[str, nn.Module], averages: Mapping[str, Ema]) -> dict[str, Tensor]:
    tensors = {
        f"module.{part}.{name}": value
        for part, module in modules.items()
        for name, value in module.state_dict().items()
    }
    for prefix, average in averages.items():
        tensors |= {f"{prefix}.{name}": value for name, value in average.average.items()}
    return tensors


def restore(
    state: State,
    modules: Mapping[str, nn.Module],
    averages: Mapping[str, Ema],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    """Put a state back, in place; `CheckpointError` if it is of other networks."""
    live = _live(modules, averages)
    given = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("optimizer.")}
    wrong = sorted(
        f"{name}: {_shape(given.get(name))} for {_shape(live.get(name))}"
        for name in live.keys() | given.keys()
        if _shape(given.get(name)) != _shape(live.get(name))
    )
    if wrong:
        raise CheckpointError(
            f"the state at image {state.seen} does not fit, {len(wrong)} tensors differ: "
            + "; ".join(wrong[:10]),
            "It belongs to other networks: restore the recipe, or choose another `out` folder.",
        )
    for name, tensor in live.items():
        put(tensor, given[name])
    for part, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        prefix = f"optimizer.{part}."
        optimizer.state.clear()
        for name in state.tensors:
            if name.startswith(prefix):
                index, key = name.removeprefix(prefix).split(".")
                like = parameters[int(index)]
                optimizer.state[like][key] = _beside(like, state.tensors[name])


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"


def _beside(like: nn.Parameter, value: Tensor) -> Tensor:
    """A copy of an optimizer's memory of a weight, on its device, and sharded if it is of the same shape.

    In the layout of the weight, not the file's: fused AdamW walks through memory, not indices.
    """
    if value.shape != like.shape or like.ndim == 0:
        return value.to(like.device, copy=True)
    memory = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    put(memory, value)
    return memory

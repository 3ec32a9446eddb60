"""The optimizers of a run, by name, and their learning rates over the images seen."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.errors import InputError, nearest
from sfumato.training.eight_bit import Adam8bit
from sfumato.training.settings_loop import OptimizerConfig

Group = dict[str, Any]


def make_optimizers(
    config: OptimizerConfig,
    parameters: Mapping[str, list[nn.Parameter]],
    modules: Mapping[str, nn.Module],
) -> dict[str, Optimizer]:
    """An optimizer for each name of `parameters`.

    Raises `InputError` where `learning_rates` names neither one of them nor a network.
    """
    for name in config.learning_rates.keys() - parameters.keys() - modules.keys():
        raise InputError(
            f"optimizer.learning_rates names {name!r}, which this run does not train",
            nearest(name, {*parameters, *modules}),
        )
    own = {
        parameter: rate
        for name, rate in config.learning_rates.items()
        if name in modules and name not in parameters
        for parameter in modules[name].parameters()
    }
    made = {}
    for name, trained in parameters.items():
        default = config.learning_rates.get(name, config.learning_rate)
        made[name] = KINDS[config.name](_groups(trained, own, default, config.weight_decay), config)
    return made


def light(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """The same optimizer without the decorators that import torch's compiler at its first call.

    They only matter where a step itself is compiled, which no run does; the import takes 70 MB and a second.
    """
    methods = {
        name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "state_dict", "zero_grad")
    }
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), {**methods, "step": step})


def _groups(
    parameters: list[nn.Parameter], own: Mapping[nn.Parameter, float], default: float, decay: float
) -> list[Group]:
    """By learning rate, and weight decay on matrices and kernels only, as is common for norms and biases."""
    groups = []
    for rate in dict.fromkeys([default, *(own.get(parameter, default) for parameter in parameters)]):
        alike = [parameter for parameter in parameters if own.get(parameter, default) == rate]
        kinds = (  # numbers apart from vectors, which may be sharded: kernels do not mix them
            ([p for p in alike if p.ndim > 1], decay),
            ([p for p in alike if p.ndim == 1], 0.0),
            ([p for p in alike if p.ndim == 0], 0.0),
        )
        groups += [{"params": p, "weight_decay": d, "lr": rate, "rate": rate} for p, d in kinds]
    return groups


def set_rates(config: OptimizerConfig, optimizer: Optimizer, seen: int, images: int) -> None:
    """Give every group of an optimizer its rate at image `seen` of a run of `images`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, seen, images, group["rate"])


def learning_rate(config: OptimizerConfig, seen: int, images: int, peak: float | None = None) -> float:
    """Linear warm-up to `peak` (by default the recipe's), then by `config.decay`: constant, cosine to 0,

    straight to 0, or constant with the last fifth straight to 0.
    """
    warm = min(1.0, (seen + 1) / (config.warmup_images + 1))
    done = min(1.0, seen / images)
    fall = {
        "constant": 1.0,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * done),
        "linear": 1 - done,
        "trapezoid": min(1.0, (1 - done) * 5),
    }[config.decay]
    return (config.learning_rate if peak is None else peak) * warm * fall


class Lion(Optimizer):
    """Evolved sign momentum (Chen et al. 2023, algorithm 2): steps of one size, one moment.

    It wants a learning rate three to ten times smaller than AdamW's, and as much more weight decay.
    """

    def __init__(self, groups: Iterable[Group], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            of_step, of_moment = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                moment = state["exp_avg"]
                direction = moment.lerp(parameter.grad, 1 - of_step).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                moment.lerp_(parameter.grad, 1 - of_moment)


class Adafactor(Optimizer):
    """Second moments as the product of a row and a column (Shazeer and Stern 2018, algorithm 4).

    Kernels are matrices (out, in x height x width). The learning rate is the recipe's: no relative steps, no
    scaling by the weight; no first moment.
    """

    CLIP = 1.0  # of the root mean square of an update; section 6 of the paper
    TINY = 1e-30  # added to squared gradients; its epsilon_1
    DECAY = 0.8  # beta_2 of step t is 1 - t^-0.8; its section 7.2

    def __init__(self, groups: Iterable[Group]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(self.state[parameter], parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"])

    def _update(self, state: dict[str, Tensor], gradient: Tensor) -> Tensor:
        matrix = gradient.flatten(1) if gradient.ndim > 1 else gradient
        squared = matrix.square().add_(self.TINY)
        moments = {"row": squared.mean(1), "col": squared.mean(0)} if matrix.ndim > 1 else {"all": squared}
        step = state.setdefault("step", torch.zeros((), device=gradient.device)).add_(1)
        kept = 1 - float(step) ** -self.DECAY
        for name, now in moments.items():
            moment = state.setdefault(f"exp_avg_sq_{name}", torch.zeros_like(now))
            moments[name] = moment.mul_(kept).add_(now, alpha=1 - kept)
        if matrix.ndim > 1:
            row, column = moments["row"], moments["col"]
            update = matrix * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()
        else:
            update = matrix * moments["all"].rsqrt()
        update /= (update.square().mean().sqrt() / self.CLIP).clamp(min=1)
        return update.view_as(gradient)


KINDS: Mapping[str, Callable[[list[Group], OptimizerConfig], Optimizer]] = {
    "adamw": lambda groups, config: light(torch.optim.AdamW)(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
    ),
    "adam8bit": lambda groups, config: light(Adam8bit)(groups, config.betas, config.eps),
    "adafactor": lambda groups, config: light(Adafactor)(groups),
    "lion": lambda groups, config: light(Lion)(groups, config.betas),
    "sgd": lambda groups, config: light(torch.optim.SGD)(
        groups, lr=config.learning_rate, momentum=config.betas[0]
    ),
}

"""Weights of which each process has its rows: FSDP2, and the arithmetic of rows (Zhao et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.training.settings_loop import OptimizerConfig

ELEMENTWISE = ("adamw", "lion", "sgd")  # a weight's step is its own affair: its rows can be stepped
ALONE = ("final_layer_norm",)  # of text encoders, which `hidden_state` calls when they themselves have ended
UNCALLED = (nn.Module.forward, nn.ModuleList.forward)  # what modules have that only hold others

# torch.distributed.tensor takes half a second to import, so it is not asked for by name before it is needed.


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only its rows (first dimension) of a tensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, sharing its memory."""
    return cast(Any, tensor.detach()).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes, which must call this together."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def rows(size: int, rank: int, world: int) -> tuple[int, int]:
    """(begin, end) of a process's rows out of `size`, as FSDP2 and `torch.chunk` deal them out."""
    chunk = -(-size // world)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if is_sharded(target):
        mesh = cast(Any, target).device_mesh
        begin, end = rows(target.shape[0], mesh.get_local_rank(), mesh.size())
        value = value[begin:end]
    local(target).copy_(value)


def shard(
    modules: Mapping[str, nn.Module], device: torch.device, world: int, optimizer: OptimizerConfig
) -> None:
    """Leave each process its rows of every trained weight, in place; numbers without rows stay whole.

    A block (a child of a module list that is called) is gathered when it is called and let go afterwards; so
    is what is outside of blocks, with its network. Methods named `encode` and `decode` count as calls.
    Raises `InputError` for an optimizer that needs whole weights, and for weights that are no network's.
    """
    if optimizer.name not in ELEMENTWISE:
        raise InputError(
            f"optimizer.name is {optimizer.name!r}, which needs whole weights; loop.parallel is 'fsdp'",
            f'Use one of {", ".join(ELEMENTWISE)}, or loop.parallel = "ddp".',
        )
    for part, module in modules.items():
        if type(module).forward in UNCALLED:  # as LoRA's changes and a word's vectors
            raise InputError(
                f'loop.parallel is "fsdp", and what is trained ({part}) is small weights beside a network',
                'Use loop.parallel = "ddp".',
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world,))
    for module in modules.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # rows of channels_last weights are none of memory
        scalars = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        for block in (*_blocks(module), module):
            # Let go even by the outermost: gathered weights would outlive a change, as of averages lent.
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        for method in ("encode", "decode"):
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost children of module lists that can be called themselves, and `ALONE`."""
    for name, child in module.named_children():
        if name in ALONE or (isinstance(module, nn.ModuleList) and type(child).forward not in UNCALLED):
            yield child
        else:
            yield from _blocks(child)


def clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that their norm is at most `limit`; returns the norm before."""
    if not any(map(is_sharded, parameters)):
        return nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [[g for g in gradients if is_sharded(g) == sharded] for sharded in (True, False)]
    norm = torch.stack([whole(nn.utils.get_total_norm(part)) for part in parts if part]).norm()
    for gradient in gradients:
        local(gradient).mul_((limit / (norm + 1e-6)).clamp(max=1))  # as torch's own
    return norm


def check_trained(parameters: Mapping[str, Sequence[nn.Parameter]], modules: Mapping[str, nn.Module]) -> None:
    """`InputError` for a task that cannot be sharded."""
    known = {parameter for module in modules.values() for parameter in module.parameters()}
    if len(parameters) > 1 or not all(known.issuperset(group) for group in parameters.values()):
        raise InputError(
            'loop.parallel = "fsdp" shards the networks of tasks with one optimizer; this one has '
            f"{', '.join(parameters)}",
            'Use loop.parallel = "ddp", which serves every task.',
        )


@contextmanager
def whole_states(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context state dicts of sharded modules hold whole tensors; all processes ask together."""

    def gather(module: nn.Module, state: dict[str, Tensor], prefix: str, _: dict[str, Any]) -> None:
        state.update({name: whole(value) for name, value in state.items()})

    handles = [module.register_state_dict_post_hook(gather) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

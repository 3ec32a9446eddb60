"""Several processes that train as one: torchrun starts them (Li et al. 2020)."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F

from sfumato.errors import InputError, ResourceError, SfumatoError
from sfumato.runtime import resolve_device
from sfumato.training.data import Share

T = TypeVar("T")
WAIT = timedelta(hours=12)  # the first may encode pictures for hours; a process that dies is noticed at once
BUCKET = 32 << 20  # bytes that are sent together
ADDRESS = "sfumato/port"  # the key under which the first process tells where it is
PATIENCE, RETRY = 5.0, 0.2  # seconds to wait for an answer there, and before asking again
LOST = ("gloo", "Connection", "NCCL")  # words of torch when another process is gone


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def share(self) -> Share:
        """The part of every batch that this process computes."""
        return Share(self.rank, self.world)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes for all."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """What JSON makes of every process's value, in the order of the processes."""
        if self.world == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        distributed.all_gather(sizes, torch.tensor([len(content)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        distributed.all_gather(parts, F.pad(content, (0, longest - len(content))))
        texts = [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
        return [json.loads(text) for text in texts]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of all processes' values, place by place."""
        if self.world == 1:
            return list(values)
        agreed = torch.tensor(values)
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
        return agreed.tolist()

    def together(self, action: Callable[[], T]) -> T:
        """The result of an action that succeeds in every process; else every process raises.

        Where it failed the error is its own, elsewhere a `ResourceError` with the words of the others.
        """
        try:
            result = action()
        except SfumatoError as error:
            self.gathered(str(error))
            raise
        told = self.gathered(None)
        wrong = [f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if wrong:
            raise ResourceError("\n".join(wrong))
        return result

    def first_does(self, action: Callable[[], T]) -> T | None:
        """The result of what the first process alone does, None elsewhere; its failure is everybody's."""
        if self.first:
            return self.together(action)
        self.together(lambda: None)
        return None

    def in_turn(self, action: Callable[[], T]) -> T:
        """As `together`, the first process before the others: what it caches is there for them."""
        if self.world == 1:
            return action()
        if self.first:
            result = self.together(action)
            self.together(lambda: None)
            return result
        self.together(lambda: None)
        return self.together(action)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Set every gradient to its mean over the processes; one that only others have counts as zero."""
        if self.world == 1:
            return
        present = self.largest([int(parameter.grad is not None) for parameter in parameters])
        gradients = []
        for parameter, there in zip(parameters, present, strict=True):
            if there:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        _through(gradients, lambda flat: _mean(flat, self.world))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values, in place."""
        if self.world > 1:
            _through(tensors, lambda flat: distributed.broadcast(flat, 0))


ALONE = Processes()


def _mean(flat: Tensor, world: int) -> None:
    distributed.all_reduce(flat)
    flat.div_(world)


@torch.no_grad()
def _through(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Apply a collective in place to tensors, many at once: a message costs more than its bytes."""
    waiting: list[Tensor] = []
    for place, tensor in enumerate(tensors):
        waiting.append(tensor)
        after = tensors[place + 1] if place + 1 < len(tensors) else None
        size = sum(each.nbytes for each in waiting)
        alike = after is not None and (after.dtype, after.device) == (tensor.dtype, tensor.device)
        if alike and size < BUCKET:
            continue
        flat = torch.cat([each.reshape(-1) for each in waiting])
        collective(flat)
        for each, values in zip(waiting, flat.split([each.numel() for each in waiting]), strict=True):
            each.copy_(values.view(each.shape))
        waiting = []


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """This process among those that torchrun started, and its device; alone where none did.

    Raises `InputError` for a device that several processes cannot have.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, resolve_device(device)
        return
    place = int(os.environ.get("LOCAL_RANK", "0"))
    found = resolve_device(device)
    if found.type not in ("cpu", "cuda") or found.index is not None:
        raise InputError(
            f"device is {device!r}, and {world} processes train together",
            'Use device = "cuda", of which each process takes its own, or "cpu".',
        )
    if found.type == "cuda":
        found = resolve_device(f"cuda:{place}")
        torch.cuda.set_device(found)
    # Gradients go by nccl where they lie on GPUs; what the processes agree on stays on CPUs.
    backend = "gloo" if found.type == "cpu" else "cpu:gloo,cuda:nccl"
    met, rank, _ = next(rendezvous("env://", timeout=WAIT))
    store = _own_store(met, rank, world)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    processes = Processes(rank, world)
    try:
        yield processes, found
    except RuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise ResourceError(
            f"process {processes.rank} lost the others: {str(error).splitlines()[0]}",
            "Another process of the run ended; its own message says why.",
        ) from error
    processes.together(lambda: None)
    distributed.destroy_process_group()


def _own_store(met: Store, rank: int, world: int) -> Store:
    """A store that lives as long as the first process.

    That of torchrun outlives a restart, and in it the addresses of processes that are gone.
    """
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        store = TCPStore(host, 0, world, is_master=True, timeout=WAIT, wait_for_workers=False)
        met.set(ADDRESS, str(store.port))
        return store
    deadline = time.monotonic() + WAIT.total_seconds()
    while True:
        port = int(met.get(ADDRESS))
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
        except OSError:  # nobody is there any more: the first process has yet to tell where it is now
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY)
        else:
            return TCPStore(host, port, world, is_master=False, timeout=WAIT)


def check_batch(batch: int, world: int) -> None:
    """`InputError` unless a batch can be dealt out evenly, as the mean of means needs."""
    if batch % world:
        raise InputError(
            f"loop.batch is {batch}, which {world} processes cannot share evenly",
            f"Choose a multiple of {world}; loop.batch counts the images of all processes together.",
        )

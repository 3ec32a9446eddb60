"""What is trained, as the loop sees it: networks, batches and losses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sfumato.training.data import WHOLE, Share

Report = Callable[[Mapping[str, float | str]], None]
"""Is told each line of metrics, and warnings as {"warning": text}."""
Loss = tuple[str, Tensor, Mapping[str, float | Tensor]]
"""(optimizer, scalar, metrics)."""


class Task(Protocol):
    """What is trained: networks, batches and losses. Everything else is the loop's."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks whose weights are saved and averaged."""
        ...

    @property
    def digest(self) -> str:
        """Changes with the data and the files that training reads."""
        ...

    def optimized(self) -> Mapping[str, list[nn.Parameter]]:
        """The parameters that each optimizer steps."""
        ...

    def batches(self, seen: int, size: int, share: Share = WHOLE) -> Generator[Any, None, None]:
        """This process's share of batches of `size` from image `seen` of the run on.

        They are a function of the seed and `seen` alone.
        """
        ...

    def losses(self, batch: Any, seen: int) -> Iterator[Loss]:
        """Yield losses in turn; the gradient of each goes to the parameters of its optimizer and no others.

        Each is differentiated before the next is asked for; the optimizers step after the last. So a second
        network, such as a discriminator, is a second loss.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the modules as they stand."""
        ...

    def preview(self, path: Path) -> Mapping[str, float] | None:
        """Write a PNG sheet of what the modules can do now; returns what was found out by it, if anything."""
        ...

    def finish(self, path: Path) -> None:
        """Write the model file from the modules as they stand."""
        ...

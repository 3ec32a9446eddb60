"""The second picture that a ControlNet is shown: the data set's condition, or made out of the first."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import InputError
from sfumato.preprocess import preprocess
from sfumato.training.data import Dataset, Part, Placed, Position, ahead, to_tensor
from sfumato.training.settings_finetune import ControlConfig


class Hints:
    """Hints (3, h, w) in 0..1 of a data set's pictures, cut and mirrored as those are.

    Without a preprocessor they are the data set's conditions (`data.conditions`, or a table's column). Raises
    `InputError` for a preprocessor or option that is not there, or a data set without conditions.
    """

    def __init__(self, dataset: Dataset, options: ControlConfig) -> None:
        self.dataset, self.options = dataset, options
        if options.preprocessor is None and not isinstance(dataset, Placed):
            raise InputError(
                "this ControlNet has no preprocessor, and the pictures have no conditions beside them",
                "Give finetune.control.preprocessor, or data.conditions for pictures in files.",
            )
        if len(dataset):
            self.picture(Position(0, -1, 0, 0))  # what is wrong with the recipe is told now

    def picture(self, position: Position) -> Image.Image:
        """The hint of a place as an RGB picture."""
        kind = self.options.preprocessor
        part: Part = "picture" if kind else "condition"
        if isinstance(self.dataset, Placed):
            _, (shown,) = self.dataset.shown(position, (part,))
        else:
            shown = self.dataset.picture(position.index)
        return shown.convert("RGB") if kind is None else preprocess(kind, shown, self.options.options)

    def of(self, places: Sequence[Position]) -> Tensor:
        """(n, 3, h, w) of these places."""
        return torch.stack([(to_tensor(self.picture(place)) + 1) / 2 for place in places])

    def batches(self, order: Iterator[list[Position]], workers: int) -> Generator[Tensor, None, None]:
        """The hints of `groups`; threads make that many batches ahead. Close it to stop them."""
        return ahead(order, self.of, workers)

"""The second picture that a ControlNet is shown: the data set's condition, or made out of the first."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import InputError
from sfumato.preprocess import preprocess
from sfumato.training.data import Dataset, Part, Placed, Position, ahead, to_tensor
from sfumato.training.latents import Source
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
            self.loaded([Position(0, -1, 0, 0)])  # what is wrong with the recipe is told now

    def picture(self, position: Position) -> tuple[Position, Image.Image]:
        """(the place of a picture whose hint can be read, the hint in RGB)."""
        kind = self.options.preprocessor
        part: Part = "picture" if kind else "condition"
        if isinstance(self.dataset, Placed):
            position, (shown,) = self.dataset.shown(position, (part,))
        else:
            shown = self.dataset.picture(position.index)
        return position, shown.convert("RGB") if kind is None else preprocess(
            kind, shown, self.options.options
        )

    def loaded(self, places: Sequence[Position]) -> tuple[list[Position], Tensor]:
        """(the places of pictures whose hints can be read, those hints (n, 3, h, w))."""
        found = [self.picture(place) for place in places]
        hints = torch.stack([(to_tensor(hint) + 1) / 2 for _, hint in found])
        return [place for place, _ in found], hints

    def of(self, places: Sequence[Position]) -> Tensor:
        """(n, 3, h, w) of these places."""
        return self.loaded(places)[1]

    def batches(
        self, order: Iterator[list[Position]], source: Source, workers: int
    ) -> Generator[tuple[list[Position], Tensor, Tensor], None, None]:
        """(places, samples, their hints) of `groups`; threads make that many ahead. Close it to stop them."""
        return ahead(order, lambda group: self._with_samples(group, source), workers)

    def _with_samples(self, places: list[Position], source: Source) -> tuple[list[Position], Tensor, Tensor]:
        """A picture is replaced together with its hint, whichever of the two cannot be read."""
        while True:
            places, hints = self.loaded(places)
            with closing(source.batches(iter([places]))) as batch:
                sound, clean = next(batch)
            if sound == places:
                return places, clean, hints
            places = sound  # one was found to be unusable meanwhile

"""How small pictures get, and whether what is to look at them can."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.errors import InputError
from sfumato.training.data import Dataset, Placed, Size
from sfumato.training.settings_data import DataConfig


@dataclass(frozen=True)
class Smallest:
    """The (height, width) of the smallest pictures of a kind; bucketed: whether `data.buckets` decides it."""

    shape: Size
    bucketed: bool = False

    def check(self, least: int, what: str, remedy: str = "") -> None:
        """`InputError` where a side has less than the `least` pixels that `what` needs."""
        if min(self.shape) >= least:
            return
        given = f"data.buckets has one of {self.shape}" if self.bucketed else f"data.size is {self.shape}"
        raised = "data.buckets.min" if self.bucketed else "data.size"
        raise InputError(
            f"{given}; {what} needs {least} pixels a side", f"Raise {raised} to {least} or more{remedy}."
        )


def smallest(config: DataConfig, dataset: Dataset, factor: int) -> Smallest:
    """Of the pictures that are trained on; `InputError` for a bucket that is no multiple of `factor`."""
    if not (isinstance(dataset, Placed) and dataset.bucketed):
        return Smallest(config.shape)
    found = {dataset.size(index) for index in dataset.order}
    for height, width in sorted(found):
        if height % factor or width % factor:
            raise InputError(
                f"a bucket has {height}x{width} pixels; this autoencoder takes multiples of {factor}",
                "Set data.buckets.step to a multiple of it.",
            )
    return Smallest(min(found, key=min), bucketed=True)

"""What training asks of pictures with captions, told apart by index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.training.data.positions import Position

Size = tuple[int, int]
"""(height, width) in pixels."""
Part = Literal["picture", "condition", "mask"]
PICTURE: tuple[Part, ...] = ("picture",)


class Dataset(Protocol):
    """Pictures with captions, told apart by index.

    `digest` changes with anything that training on them would notice.
    """

    digest: str

    @property
    def order(self) -> Sequence[int]:
        """The indices that one epoch shows, before they are shuffled, so its length is an epoch's.

        An index that stands in it n times is shown n times, one that is not in it never.
        """
        ...

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Image.Image:
        """RGB or grey picture of the size asked for when the data set was opened."""
        ...

    def captions(self, index: int) -> list[str]:
        """Every caption of the picture, the canonical one first; empty where it has none."""
        ...


class View(NamedTuple):
    """How a picture is shown at a place of the run.

    size: of what is shown. original: of the file's picture, upright. crop: (top, left), in pixels of the
    shown scale, of what was cut off there, before any mirroring. These three are what SDXL is told.
    """

    size: Size
    original: Size
    crop: tuple[int, int] = (0, 0)
    flipped: bool = False


@runtime_checkable
class Placed(Protocol):
    """A data set whose pictures depend on the place too: in buckets, cropped, mirrored, replaced.

    `classes` are the names that labels count, empty where there are none. `flip` is the share of mirrored
    pictures, `random_crop` whether crops depend on the place, `bucketed` whether sizes differ, `masked`
    whether there are masks beside the pictures.
    """

    digest: str
    classes: tuple[str, ...]
    flip: float
    random_crop: bool
    bucketed: bool
    masked: bool

    @property
    def order(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def picture(self, index: int) -> Image.Image: ...

    def captions(self, index: int) -> list[str]: ...

    def size(self, index: int) -> Size:
        """The (height, width) that the picture is shown in: its bucket's."""
        ...

    def sound(self, position: Position) -> Position:
        """The same place with another picture of its size, if its own is known to be unusable."""
        ...

    def only(self, indices: Collection[int]) -> None:
        """Take these pictures alone, of those in `order`, to replace unusable ones."""
        ...

    def shown(
        self, position: Position, parts: Sequence[Part] = PICTURE
    ) -> tuple[Position, list[Image.Image]]:
        """(the sound position, those of its pictures as this place shows them); finds out what is unusable.

        All parts are cut and mirrored alike. A condition is RGB, a mask is mode L.
        """
        ...

    def variant(self, index: int, flipped: bool) -> Image.Image | None:
        """The picture in its bucket, cropped around the middle; None where it cannot be used."""
        ...

    def view(self, position: Position) -> View:
        """How the picture of this sound position is shown."""
        ...

    def flipped(self, position: Position) -> bool:
        """Whether it is shown mirrored there."""
        ...

    def unusable(self, index: int, reason: str) -> None:
        """Take note of a picture that was found to be unusable elsewhere."""
        ...

    def label(self, index: int) -> int | None:
        """The number of its class in `classes`; None where it has none."""
        ...

    def prior(self, index: int) -> bool:
        """Whether it is one of the class's pictures that keep a fine-tuned model what it was (DreamBooth)."""
        ...


def to_tensor(picture: Image.Image) -> Tensor:
    """(c, h, w) float32 in -1..1 of an 8-bit picture."""
    pixels = np.asarray(picture, dtype=np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()

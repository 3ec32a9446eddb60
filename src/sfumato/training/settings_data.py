"""The `[data]` table of a recipe: which pictures, how they are cut, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator

from sfumato.training.section import Section, Share

Times = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class BucketConfig(Section):
    """Sizes of many shapes and about one area; what is left out follows from data.size."""

    min: PositiveInt | None = Field(default=None, description="shortest side in pixels; else half of size")
    max: PositiveInt | None = Field(default=None, description="longest side; else twice the size")
    step: PositiveInt | None = Field(
        default=None, description="sides are multiples of it; else 64, or an eighth of the size"
    )
    area: PositiveInt | None = Field(default=None, description="most pixels; else those of data.size")
    enlarge: bool = Field(
        default=True, description="false: small pictures go to sizes they fill, or are left out"
    )
    rarest: int = Field(
        default=16, ge=1, description="a size of fewer pictures is given up for the next nearest"
    )


class CaptionConfig(Section):
    """How captions are read and varied."""

    extension: str = Field(default=".txt", pattern=r"^\.[A-Za-z0-9_.-]+$", description="of caption files")
    lines: bool = Field(default=False, description="a caption file holds a caption a line")
    column: str = Field(default="", description="of captions in tables; else text or caption")
    choose: Literal["random", "first"] = Field(default="random", description="of several captions")
    shuffle: bool = Field(default=False, description="the order of tags")
    separator: str = Field(default=",", min_length=1, description="between tags")
    keep_tokens: int = Field(default=0, ge=0, description="first tags that stay where they are")
    tag_dropout: Share = Field(default=0.0, description="share of the other tags that is left out")
    templates: tuple[str, ...] | Path = Field(
        default=(), description='texts like "a photo of {}", or a file with one a line'
    )
    word: str = Field(default="", description="what fills templates instead of the caption")
    prefix: str = ""
    suffix: str = ""


class FolderConfig(Section):
    """One more source of pictures."""

    path: Path
    repeats: Annotated[int, Field(ge=1)] = Field(default=1, description="how often an epoch shows each")
    prior: bool = Field(
        default=False, description="pictures of the class, which keep the model what it was (DreamBooth)"
    )
    caption: str = Field(default="", description="of pictures that have none")
    conditions: Path | None = None
    masks: Path | None = None


class DataConfig(Section):
    """The pictures."""

    path: Path = Field(
        description="folder of pictures, table, tars or Parquet files; see docs/training-data.md"
    )
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        default=64, description="pixels, side or (height, width)"
    )
    channels: Literal[1, 3] = 3
    repeats: dict[str, Times] = Field(
        default_factory=dict,
        description='how often an epoch shows each "kind" or "kind/style" of an illustration set, or each '
        "first-level sub-folder; else 1",
    )
    workers: int = Field(default=2, ge=0, le=64, description="threads that decode pictures ahead")
    folders: tuple[FolderConfig, ...] = Field(default=(), description="more pictures beside those of path")
    buckets: BucketConfig | None = Field(
        default=None, description="true, or a table: each picture in the size of the most similar shape"
    )
    crop: Literal["center", "random"] = Field(default="center", description="where pictures are cut")
    flip: Probability = Field(default=0.0, description="share of pictures that is mirrored")
    conditions: Path | None = Field(
        default=None, description="folder with a picture of the same name for each: what ControlNet is shown"
    )
    masks: Path | None = Field(default=None, description="folder with a mask of the same name for each")
    max_bad: Share = Field(default=0.01, description="share of pictures that may be unreadable")
    captions: CaptionConfig = CaptionConfig()

    @field_validator("buckets", mode="before")
    @classmethod
    def _switched(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

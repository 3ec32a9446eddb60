"""Opens whatever pictures are in a folder as a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from sfumato.data.pictures import Split
from sfumato.errors import DataError, InputError, nearest
from sfumato.intake import is_picture
from sfumato.training.data.arrow import SPLITS, list_parquet, list_saved
from sfumato.training.data.buckets import Buckets
from sfumato.training.data.captions import CaptionRules, read_templates
from sfumato.training.data.dataset import Dataset
from sfumato.training.data.folder import list_folder
from sfumato.training.data.illustrations import Illustrations
from sfumato.training.data.pictures import PictureSet, Rules
from sfumato.training.data.quarantine import Entry, Quarantine
from sfumato.training.data.records import Listing, Reading
from sfumato.training.data.tables import list_table, table_of
from sfumato.training.data.tars import list_tars
from sfumato.training.data.views import Framing
from sfumato.training.settings_data import CaptionConfig, DataConfig, FolderConfig


def open_dataset(
    root: Path, size: tuple[int, int], channels: int, split: Split, repeats: Mapping[str, int] | None = None
) -> Dataset:
    """The "train" or "test" split of any source of pictures, cut around the middle to one size.

    repeats: how often one epoch shows each kind ("drawing"), or kind and style ("drawing/fluent"), of row of
    an illustration set, or each class of other pictures; 1 where it says nothing, 0 for never. Raises
    `DataError` for pictures that cannot be used, `InputError` for repeats of what is not there.
    """
    if is_illustrations(root):
        return Illustrations(root, size, channels, split, repeats or {})
    return Folder(root, size, channels, split, repeats)


class Folder(PictureSet):
    """The same of pictures that are no illustration set; the first that cannot be read is an error."""

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        channels: int,
        split: Split,
        repeats: Mapping[str, int] | None = None,
    ) -> None:
        listing = _repeated(list_any(root, split, Reading()), repeats or {}, root)
        super().__init__(listing, split, Rules(size, channels))
        self.root = root


def open_data(
    config: DataConfig,
    split: Split,
    out: Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """The pictures of a recipe's `[data]` table: those to train on, or those held out.

    Those held out are all of `data.size`, cut around the middle and never mirrored, so that scores compare.
    out: the run's folder, where unusable pictures are listed and indices kept; without it the first unusable
    picture is an error. warn: is told of each. Errors as `open_dataset`.
    """
    if is_illustrations(config.path):
        _only_plain(config)
        return Illustrations(config.path, config.shape, config.channels, split, config.repeats)
    quarantine = Quarantine(None if out is None else out / "quarantine.jsonl", warn)
    cache = None if out is None else out / "index"
    main = FolderConfig(path=config.path, conditions=config.conditions, masks=config.masks)
    listings = []
    for number, folder in enumerate((main, *config.folders)):
        prefix = f"{number}//" if number else ""
        listing = _listed(folder, config, split, cache, prefix, quarantine.entries)
        listings.append(_repeated(listing, config.repeats, folder.path) if number == 0 else listing)
    buckets = bucket_rules(config) if split == "train" else None
    framing = Framing(config.crop, config.flip) if split == "train" else Framing()
    rules = Rules(config.shape, config.channels, framing, buckets, config.max_bad)
    return PictureSet(_joined(listings), split, rules, quarantine)


def bucket_rules(config: DataConfig) -> Buckets | None:
    """The sizes of the recipe's buckets, what it leaves open following from `data.size`; None without any."""
    given, (height, width) = config.buckets, config.shape
    if given is None:
        return None
    side = math.isqrt(height * width)
    step = given.step or max(1, min(64, side // 8))
    least = given.min or max(step, side // 2 // step * step)
    most = given.max or side * 2 // step * step
    return Buckets(least, most, step, given.area or height * width, given.enlarge, given.rarest)


def caption_rules(config: CaptionConfig) -> CaptionRules:
    """How the recipe varies captions, its file of templates read."""
    templates = config.templates
    return CaptionRules(
        config.choose,
        config.shuffle,
        config.separator,
        config.keep_tokens,
        config.tag_dropout,
        read_templates(templates) if isinstance(templates, Path) else templates,
        config.word,
        config.prefix,
        config.suffix,
    )


def list_any(
    root: Path, split: Split, reading: Reading, entries: Mapping[str, Entry] | None = None
) -> Listing:
    """The records of whatever kind of source a folder is; `DataError` where it is none."""
    if not root.is_dir():
        raise DataError(
            f"{root} is not a folder", "Set data.path to a folder of pictures; relative paths start here."
        )
    if (table := table_of(root)) is not None:
        return list_table(table, reading)
    saved = (root / "state.json").is_file() or (root / "dataset_dict.json").is_file()
    tars = any(root.glob("*.tar"))
    parquet = sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))
    for what, folder in (("conditions", reading.conditions), ("masks", reading.masks)):
        if (saved or tars or parquet) and folder is not None:
            raise InputError(
                f"data.{what} is {folder}, and {root} holds pictures in archives, which have their own",
                f"Put the {what} into the archives, as docs/training-data.md says, or unpack the pictures.",
            )
    if saved:
        return list_saved(root, split, reading)
    if tars:
        return list_tars(root, reading)
    if parquet:
        return list_parquet(parquet, split, reading)
    if (apart := _folder_of(root, split)) is not None:
        return list_any(apart[0], split, reading, entries)._replace(apart=apart[1])
    return list_folder(root, reading, entries)


def _folder_of(root: Path, split: Split) -> tuple[Path, bool] | None:
    """(the split's folder, whether one is held out) where all that lies in a folder is folders of splits."""
    inside = [path for path in sorted(root.iterdir()) if not path.name.startswith(".")]
    names = {path.name for path in inside if path.is_dir()}
    found = {each: next((word for word in words if word in names), None) for each, words in SPLITS.items()}
    if found["train"] is None or names - {word for words in SPLITS.values() for word in words}:
        return None
    if any(is_picture(path) for path in inside):
        return None
    return root / (found[split] or found["train"]), found["test"] is not None


def is_illustrations(root: Path) -> bool:
    """Whether a folder is a built illustration set: its metadata.jsonl names no files."""
    return (root / "metadata.jsonl").exists() and table_of(root) is None


def _listed(
    folder: FolderConfig,
    config: DataConfig,
    split: Split,
    cache: Path | None,
    prefix: str,
    entries: Mapping[str, Entry],
) -> Listing:
    """The records of one source, by names that no other's have."""
    captions = config.captions
    reading = Reading(
        captions.extension, captions.column, captions.lines, cache, folder.conditions, folder.masks
    )
    own = {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix) and (prefix or "//" not in name)
    }
    if is_illustrations(folder.path):
        raise InputError(
            f"{folder.path} is an illustration set, which stands alone", "Leave data.folders out."
        )
    listing = list_any(folder.path, split, reading, own)
    records = [
        record._replace(
            name=prefix + record.name,
            captions=record.captions if any(record.captions) else (folder.caption,) * bool(folder.caption),
            prior=folder.prior,
            repeats=folder.repeats,
        )
        for record in listing.records
    ]
    findings = tuple(finding._replace(name=prefix + finding.name) for finding in listing.findings)
    return listing._replace(records=records, findings=findings)


def _joined(listings: list[Listing]) -> Listing:
    if len(listings) == 1:
        return listings[0]
    classes = {name: None for listing in listings for name in listing.classes}
    return Listing(
        [record for listing in listings for record in listing.records],
        tuple(classes),
        tuple(finding for listing in listings for finding in listing.findings),
        all(listing.apart for listing in listings),
    )


def _repeated(listing: Listing, repeats: Mapping[str, int], root: Path) -> Listing:
    """The records, each class as often as `repeats` says."""
    for name in repeats.keys() - set(listing.classes):
        if not listing.classes:
            raise InputError(
                f"data.repeats is for illustration sets and classes, and {root} has none",
                "Leave repeats out.",
            )
        raise InputError(
            f"data.repeats names {name!r}, a class that {root} lacks", nearest(name, listing.classes)
        )
    records = [
        record._replace(repeats=record.repeats * repeats.get(record.label or "", 1))
        for record in listing.records
    ]
    return listing._replace(records=[record for record in records if record.repeats])


def _only_plain(config: DataConfig) -> None:
    """`InputError` for what an illustration set has no use for."""
    plain = DataConfig(path=config.path)
    for name in ("folders", "buckets", "crop", "flip", "conditions", "masks"):
        if getattr(config, name) != getattr(plain, name):
            raise InputError(
                f"data.{name} is for pictures in files, and {config.path} is an illustration set",
                "Leave it out.",
            )

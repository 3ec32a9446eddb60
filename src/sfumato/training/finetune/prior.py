"""Pictures of the class that a thing belongs to, drawn before the model learns (Ruiz et al. 2023, 3.2)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sfumato import images
from sfumato.checkpoints.files import write_atomically
from sfumato.errors import InputError
from sfumato.generation import draw
from sfumato.training.data import FORMATS, Dataset, PictureSet, Quarantine, open_dataset
from sfumato.training.data.open import is_illustrations, list_any
from sfumato.training.data.pictures import Rules
from sfumato.training.data.records import Reading
from sfumato.training.finetune.method import Base
from sfumato.training.latents import Progress
from sfumato.training.settings_finetune import PriorConfig

QUARANTINE = "quarantine-prior.jsonl"  # in a run's folder: class pictures that cannot be read
DRAWN = "drawn.json"  # says that the pictures beside it were drawn, and how
TOGETHER = 4  # pictures of one network call


def prior_dataset(base: Base, options: PriorConfig, progress: Progress) -> Dataset:
    """The class pictures of a run, all of them shown in turn; those that lack are drawn now.

    A folder of other pictures is taken as it is; those that cannot be read are put aside and replaced. One
    that was begun goes on where it stopped, with the same pictures. Raises `InputError` for pictures that
    another model or prompt has drawn, `DataError` where more than `data.max_bad` cannot be read.
    """
    path = options.path or base.config.out / "prior"
    given = path.is_dir() and any(each.suffix.lower() in FORMATS for each in path.rglob("*"))
    if not given or (path / DRAWN).is_file():
        _draw(base, options, path, progress)
    data = base.config.data
    if is_illustrations(path):  # whose held-out pictures the builder has chosen
        return open_dataset(path, base.size, data.channels, "train")
    quarantine = Quarantine(base.config.out / QUARANTINE)
    listing = list_any(path, "train", Reading(), quarantine.entries)
    records = [record._replace(prior=True) for record in listing.records]  # so none of them is held out
    rules = Rules(base.size, data.channels, max_bad=data.max_bad)
    return PictureSet(listing._replace(records=records), "train", rules, quarantine)


@torch.no_grad()
def _draw(base: Base, options: PriorConfig, path: Path, progress: Progress) -> None:
    recipe = {"model": base.file.identity, "prompt": options.prompt, "size": list(base.size)}
    marker = path / DRAWN
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != recipe:
        raise InputError(
            f"the pictures in {path} were drawn by another model, for another prompt or size",
            "Delete the folder, or give another finetune.prior.path.",
        )
    text = json.dumps(recipe, indent=1)
    write_atomically(marker, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for start in range(0, options.images, TOGETHER):
        # Whole groups: a picture does not hang on where it began.
        group = range(start, min(start + TOGETHER, options.images))
        places = [path / f"{seed:06d}.png" for seed in group]
        if all(place.is_file() for place in places):
            continue
        samples = draw(base.model, [options.prompt] * len(group), group, base.request)
        for place, sample in zip(places, samples, strict=True):
            picture = images.preview(sample)
            write_atomically(place, lambda temporary, drawn=picture: drawn.save(temporary, "PNG"))
        progress(group.stop, options.images)

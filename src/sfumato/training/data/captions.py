"""What a picture is called at a place of the run: one of its captions, its tags shuffled, in a template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from sfumato.errors import DataError, InputError
from sfumato.training.data.dataset import Dataset
from sfumato.training.data.positions import Position

MAX_TEMPLATES = 10_000


@dataclass(frozen=True)
class CaptionRules:
    """How captions are varied.

    choose: one of a picture's captions by chance, or its first. shuffle: the tags between `separator`s, all
    but the first `keep_tokens`; tag_dropout: the share of those that is left out. templates: one is taken by
    chance and its {} filled with the caption, or with `word` where that is set, as textual inversion does.
    prefix, suffix: are put around the result; a picture without a caption gets them too.
    """

    choose: Literal["random", "first"] = "random"
    shuffle: bool = False
    separator: str = ","
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    templates: tuple[str, ...] = ()
    word: str = ""
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{}") != 1:
                raise InputError(f"the template {template!r} has not one {{}}", "Write it as: a photo of {}")
        if not self.separator.strip() and (self.shuffle or self.tag_dropout):
            raise InputError(f"the separator of tags is {self.separator!r}", "Take a comma or another sign.")


AS_IT_IS = CaptionRules()


def caption(dataset: Dataset, position: Position, rules: CaptionRules = AS_IT_IS) -> str:
    """The caption of the picture at a place of the run: a function of it, so a resumed run says the same."""
    return varied(dataset.captions(position.index) or [""], position, rules)[1]


def varied(choices: Sequence[str], position: Position, rules: CaptionRules = AS_IT_IS) -> tuple[str, str]:
    """(the one of a picture's captions that is taken at a place, what is made of it)."""
    generator = position.generator("caption")
    taken = choices[0]
    if rules.choose == "random" and len(choices) > 1:
        taken = choices[_below(len(choices), generator)]
    text = _tagged(taken, rules, generator)
    template = rules.templates[_below(len(rules.templates), generator)] if rules.templates else ""
    return taken, _framed(text, template, rules)


def fixed_caption(choices: Sequence[str], rules: CaptionRules = AS_IT_IS) -> str:
    """What a held-out picture is called: its first caption with all its tags, in the first template."""
    return _framed((choices or [""])[0], (rules.templates or ("",))[0], rules)


def every_caption(dataset: Dataset, rules: CaptionRules = AS_IT_IS) -> list[str]:
    """All that `caption` can say of these pictures, sorted, each once: what a text cache has to hold.

    Raises `InputError` where tags are shuffled or left out by chance, of which there is no end.
    """
    if rules.shuffle or rules.tag_dropout:
        raise InputError(
            "captions whose tags are shuffled or dropped by chance cannot be encoded ahead",
            "Leave out captions.shuffle and captions.tag_dropout, or the text cache.",
        )
    return sorted(set(_all(dataset, rules)))


def read_templates(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 file of templates, each with one {}; empty lines and # comments are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "Give a text file with a template a line.") from error
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not 0 < len(found) <= MAX_TEMPLATES:
        raise DataError(f"{path} has {len(found)} templates", f"Give 1 to {MAX_TEMPLATES}.")
    return found


def _all(dataset: Dataset, rules: CaptionRules) -> Iterator[str]:
    for index in range(len(dataset)):
        choices = dataset.captions(index) or [""]
        texts = choices[:1] if rules.choose == "first" else choices
        for text, template in product(texts, rules.templates or ("",)):
            yield _framed(text, template, rules)


def _framed(text: str, template: str, rules: CaptionRules) -> str:
    """A caption in a template, if there is one, with what is put around it."""
    return rules.prefix + (template.replace("{}", rules.word or text) if template else text) + rules.suffix


def _tagged(text: str, rules: CaptionRules, generator: torch.Generator) -> str:
    if not rules.shuffle and not rules.tag_dropout:
        return text
    tags = [tag.strip() for tag in text.split(rules.separator) if tag.strip()]
    kept, others = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    if rules.tag_dropout:
        stay = torch.rand(len(others), generator=generator) >= rules.tag_dropout
        others = [tag for tag, stays in zip(others, stay.tolist(), strict=True) if stays]
    if rules.shuffle:
        others = [others[place] for place in torch.randperm(len(others), generator=generator).tolist()]
    return f"{rules.separator.strip()} ".join(kept + others)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))

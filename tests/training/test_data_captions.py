"""Captions at a place of the run: chosen, shuffled, put into templates; the same when the run is resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sfumato.errors import DataError, InputError
from sfumato.training.config import TrainingConfig, read_config
from sfumato.training.data import (
    CaptionRules,
    Position,
    caption,
    caption_rules,
    every_caption,
    fixed_caption,
    open_data,
    varied,
)
from sfumato.training.settings_data import BucketConfig, CaptionConfig, DataConfig


class Texts:
    """A data set of captions alone."""

    digest = ""

    def __init__(self, *texts: list[str]) -> None:
        self.texts, self.order = texts, range(len(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8))

    def captions(self, index: int) -> list[str]:
        return self.texts[index]


TAGS = Texts(["one girl, red hair, smile, hat , blue sky"])


def said(data: Texts, count: int = 400, index: int = 0, **rules: Any) -> Counter[str]:
    made = CaptionRules(**rules)
    return Counter(caption(data, Position(0, 0, place, index), made) for place in range(count))


def test_by_default_captions_are_as_they_stand() -> None:
    assert said(TAGS) == {"one girl, red hair, smile, hat , blue sky": 400}
    several = said(Texts(["a", "b", "c"]))
    assert set(several) == {"a", "b", "c"} and min(several.values()) > 90
    assert said(Texts(["a", "b"]), choose="first") == {"a": 400}
    assert said(Texts([])) == {"": 400}


def test_a_caption_hangs_on_the_place_alone() -> None:
    rules = CaptionRules(shuffle=True, tag_dropout=0.3, templates=("a {}", "the {}"))
    texts = [caption(TAGS, Position(1, 2, place), rules) for place in range(30)]
    assert texts == [caption(TAGS, Position(1, 2, place), rules) for place in range(30)]
    assert texts != [caption(TAGS, Position(1, 3, place), rules) for place in range(30)]


def test_tags_are_shuffled_but_the_first() -> None:
    found = said(TAGS, shuffle=True, keep_tokens=2)
    tags = {"smile", "hat", "blue sky"}
    assert len(found) == 6 and min(found.values()) > 30
    for text in found:
        assert text.startswith("one girl, red hair, ") and set(text.split(", ")[2:]) == tags


def test_tags_are_dropped_as_often_as_asked() -> None:
    found = said(TAGS, count=1000, tag_dropout=0.25, keep_tokens=1)
    left = Counter(tag for text, times in found.items() for tag in text.split(", ") * times)
    assert left.pop("one girl") == 1000
    assert all(0.7 < times / 1000 < 0.8 for times in left.values()) and len(left) == 4
    order = ["red hair", "smile", "hat", "blue sky"]
    for text in found:
        assert [tag for tag in order if tag in text.split(", ")[1:]] == text.split(", ")[1:]


def test_templates_are_filled_with_the_caption_or_the_word() -> None:
    data = Texts(["cat"])
    assert set(said(data, templates=("a photo of {}", "{} art"))) == {"a photo of cat", "cat art"}
    assert set(said(data, templates=("a photo of {}",), word="<my-cat>")) == {"a photo of <my-cat>"}
    assert said(data, prefix="sks ", suffix=", 2024") == {"sks cat, 2024": 400}
    assert set(said(Texts(["{}"]), templates=("a {}",))) == {"a {}"}, "captions are no templates"


def test_a_held_out_picture_is_always_called_the_same() -> None:
    rules = CaptionRules(shuffle=True, tag_dropout=0.5, templates=("a {}", "the {}"), prefix="<", suffix=">")
    assert fixed_caption(["one, two, three", "other"], rules) == "<a one, two, three>"
    assert fixed_caption([], rules) == "<a >" and fixed_caption([]) == ""
    assert fixed_caption(["one"], CaptionRules(templates=("a {}",), word="w")) == "a w"
    choices = ["one", "two"]
    for place in range(20):
        taken, text = varied(choices, Position(0, 0, place), CaptionRules(templates=("a {}",)))
        assert taken in choices and text == f"a {taken}"


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place(template: str) -> None:
    with pytest.raises(InputError, match="has not one"):
        CaptionRules(templates=(template,))


def test_all_captions_are_known_ahead_unless_tags_vary() -> None:
    data = Texts(["b", "a"], [], ["a"])
    rules = CaptionRules(templates=("x {}", "y {}"), prefix="!")
    told = {text for index in range(3) for text in said(data, 200, index, **vars(rules))}
    assert every_caption(data, rules) == sorted(told)
    assert every_caption(data) == ["", "a", "b"]
    assert every_caption(data, CaptionRules(choose="first")) == ["", "a", "b"]
    for changed in (CaptionRules(shuffle=True), CaptionRules(tag_dropout=0.1)):
        with pytest.raises(InputError, match="cannot be encoded ahead"):
            every_caption(data, changed)


def test_the_rules_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("# those of textual inversion\na photo of {}\n\na rendering of {}\n")
    rules = caption_rules(CaptionConfig(templates=path, word="<x>", keep_tokens=2, shuffle=True))
    assert rules.templates == ("a photo of {}", "a rendering of {}") and rules.word == "<x>"
    assert caption_rules(CaptionConfig(templates=("a {}",))).templates == ("a {}",)
    path.write_text("\n# nothing\n")
    with pytest.raises(DataError, match="0 templates"):
        caption_rules(CaptionConfig(templates=path))
    with pytest.raises(DataError, match="cannot read"):
        caption_rules(CaptionConfig(templates=tmp_path / "none.txt"))


def test_caption_files_of_another_kind(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "a.caption").write_text("first\r\n\r\n second \n")
    config = DataConfig.model_validate(
        {"path": tmp_path, "size": 4, "captions": {"extension": ".caption", "lines": True}}
    )
    assert open_data(config, "train").captions(0) == ["first", "second"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[data.buckets]\nstp = 8", r"'data.buckets.stp'. Did you mean 'step'"),
        ("[[data.folders]]\npath = 'a'\nrepeat = 2", r"'data.folders.0.repeat'. Did you mean 'repeats'"),
        ("[data.captions]\nshufle = true", r"'data.captions.shufle'. Did you mean 'shuffle'"),
    ],
)
def test_a_wrong_key_of_the_data_is_named(tmp_path: Path, table: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f"task = 'autoencoder'\nout = 'x'\n[data]\npath = 'a'\n{table}\n")
    with pytest.raises(InputError, match=words):
        read_config(path)
    assert read_config_of(path, "[data.buckets]\nstep = 8").data.buckets == BucketConfig(step=8)


def read_config_of(path: Path, table: str) -> TrainingConfig:
    path.write_text(f"task = 'autoencoder'\nout = 'x'\n[data]\npath = 'a'\n{table}\n")
    return read_config(path, ["--data.flip=0.5"])

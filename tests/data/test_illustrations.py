"""The whole build on synthetic art: byte-equal, honestly split, well worded, clear about what is wrong."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sfumato.data import illustrations
from sfumato.data.drawings import background_is_held_out
from sfumato.data.emoji import FAMILIES, STYLES, Art, IconSet, Label, normal, rasterise
from sfumato.data.illustrations import build
from sfumato.data.objects import Thing, full_domain, small_domain
from sfumato.data.pictures import Pictures, Row
from sfumato.data.scenes import pair_is_held_out
from sfumato.errors import DataError, InputError, ResourceError

BAD_GRAMMAR = re.compile(r"  |\ba [aeio]|\ba un[^i]|\ban [^aeiouhx]|,,| ,|^[ ,]|[ ,]$|None")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, npm_dir: Path, tiny_domain: None) -> Path:
    folder = tmp_path_factory.mktemp("built") / "set"
    build(folder, size=16, npm_dir=npm_dir)
    return folder


def things_by_code(npm_dir: Path) -> dict[str, Thing]:
    return {thing.label.code: thing for thing in small_domain(illustrations.read_labels(npm_dir))}


def test_two_builds_are_byte_equal(built: Path, tmp_path: Path, npm_dir: Path) -> None:
    seen: list[str] = []
    summary = build(
        tmp_path / "again", size=16, npm_dir=npm_dir, progress=lambda what, done, of: seen.append(what)
    )
    names = sorted(path.name for path in built.iterdir())
    assert names == ["NOTICE", "README.md", "metadata.jsonl", "pictures-00000.tar", "summary.json"]
    for name in names:
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert list(dict.fromkeys(seen)) == ["fetching drawings", "drawings", "avatars", "scenes", "done"]
    assert summary.objects == 120
    assert summary.pictures == 120 * 5 + 8
    assert summary.rows["scene/train"] == 450
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_training_never_shows_what_is_held_out(built: Path, npm_dir: Path) -> None:
    pictures = Pictures(built)
    things = things_by_code(npm_dir)
    shown = {layer["picture"] for row in pictures.rows("train") for layer in row["layers"]}
    tested = {r["layers"][0]["picture"] for r in pictures.rows("test") if r["kind"] == "drawing"}
    assert tested and not shown & tested
    held_objects = {key.split("-")[0] for key in tested}
    assert 15 <= len(held_objects) <= 45  # about a quarter of 120
    for code in held_objects:
        styles = {key.split("-")[1] for key in tested if key.startswith(f"{code}-")}
        assert len({FAMILIES[style] for style in styles}) == 1
        assert styles == {style for style in STYLES if FAMILIES[style] == FAMILIES[next(iter(styles))]}
    for row in pictures.rows():
        if row["kind"] == "avatar":
            continue
        inside = things_in(row, things)
        held = [thing for thing in inside if background_is_held_out(thing, row["attributes"]["background"])]
        apart = len(inside) == 2 and pair_is_held_out(*inside)
        if row["kind"] == "drawing" or row["split"] == "train":
            assert not held and not apart, row["id"]
        elif len(inside) == 2:
            assert apart and not held
        else:
            assert held


def things_in(row: Row, things: dict[str, Thing]) -> list[Thing]:
    codes = dict.fromkeys(layer["picture"].split("-")[0].upper() for layer in row["layers"])
    return [things[code] for code in codes]


def test_every_single_value_is_in_training(built: Path) -> None:
    train = [row["attributes"] for row in Pictures(built).rows("train")]
    test = [row["attributes"] for row in Pictures(built).rows("test")]
    for name in ("object", "style", "background", "form", "size", "position", "count", "relation"):
        known = {attributes[name] for attributes in train if name in attributes}
        assert {attributes[name] for attributes in test if name in attributes} <= known


def test_captions_read_well_and_say_what_is_there(built: Path) -> None:
    rows = Pictures(built).rows()
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        attributes = row["attributes"]
        for caption in row["captions"]:
            assert not BAD_GRAMMAR.search(caption), caption
            assert len(caption.split()) <= 20
        assert len(set(row["captions"])) == len(row["captions"])
        if row["kind"] != "avatar":
            named = f"{attributes['background']} background" in row["captions"][0]
            assert named == (attributes["background"] != "white"), row["captions"]
    captions = {caption for row in rows for caption in row["captions"]}
    assert {
        "a fox",
        "a red apple",
        "an owl",
        "a noto drawing of grapes",
        "a twemoji drawing of the sun",
    } <= captions


def test_scene_boxes_fit_their_words(built: Path) -> None:
    for row in Pictures(built).rows():
        boxes, attributes = [layer["box"] for layer in row["layers"]], row["attributes"]
        assert all(x >= 0 and y >= 0 and x + w <= 1 and y + h <= 1 for x, y, w, h in boxes)
        if attributes.get("relation") == "left":
            assert boxes[0][0] + boxes[0][2] <= boxes[1][0]
        if attributes.get("relation") == "above":
            assert boxes[0][1] + boxes[0][3] <= boxes[1][1]
        if "count" in attributes:
            assert len(boxes) == attributes["count"]
        if attributes.get("position") == "right":
            assert boxes[0][0] + boxes[0][2] / 2 > 0.6


def test_notice_credits_exactly_the_styles_used(built: Path, tmp_path: Path, npm_dir: Path) -> None:
    assert all(word in (built / "NOTICE").read_text() for word in ("Microsoft", "Google", "Twitter", "CC0"))
    summary = build(tmp_path / "noto", size=16, styles=["noto"], npm_dir=npm_dir)
    text = (tmp_path / "noto" / "NOTICE").read_text()
    assert "Google" in text and "Twitter" not in text and "Microsoft" not in text
    assert "drawing/test" not in summary.rows  # one family: nothing to hold out
    content = json.loads((tmp_path / "noto" / "summary.json").read_text())
    assert content["styles"] == ["noto"] and str(tmp_path) not in json.dumps(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "size 8"),
        ({"domain": "smal"}, "no domain 'smal'"),
        ({"styles": ["nto"]}, "no drawing style 'nto'"),
    ],
)
def test_arguments_are_checked_first(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build(tmp_path / "set", **options)
    assert caught.value.hint


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(InputError, match="not an empty folder"):
        build(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "dear"


def test_a_failed_build_leaves_nothing(
    tmp_path: Path, npm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(illustrations, "draw", lambda *parts: {})
    with pytest.raises(DataError, match="draw none"):
        build(tmp_path / "set", size=16, npm_dir=npm_dir)
    assert list(tmp_path.iterdir()) == []


def test_equal_drawings_are_kept_once_under_the_shorter_name() -> None:
    body = '<circle cx="8" cy="8" r="5" fill="red"/>'
    icons = {"icons": {"a": {"body": body}, "b": {"body": body}, "c": {"body": body.replace("red", "blue")}}}
    art = Art({"noto": IconSet(icons, {"1F600": "a", "1F601": "b", "1F602": "c"})})
    labels = [
        Label("1F600", "man astronaut", 1),
        Label("1F601", "astronaut", 1),
        Label("1F602", "blue one", 1),
    ]
    things = [Thing(label, label.label, label.label, None) for label in labels]
    kept = illustrations.draw(things, ["noto"], art, 16, illustrations.ignore)
    assert sorted(code for code, _ in kept) == ["1F601", "1F602"]


def test_full_domain_leaves_out_what_is_no_picture() -> None:
    out = [
        "three o’clock",
        "four-thirty",
        "family: man, boy",
        "heart suit",
        "person walking: facing right",
        "water pistol",
    ]
    kept = ["fox", "flag in hole", "one-piece swimsuit", "person in suit levitating", "house", "houses"]
    labels = [Label(f"{number:X}", label, 5) for number, label in enumerate([*out, *kept])]
    labels += [Label("A0", "red circle", 8), Label("A1", "flag: Japan", 9), Label("A2", "curly hair", 2)]
    things = full_domain(labels)
    assert [thing.label.label for thing in things] == kept
    assert {thing.name: thing.plural for thing in things}["house"] is None  # "houses" is another object


def test_code_points_and_aliases_are_normalised() -> None:
    assert normal("0023-fe0f-20e3") == "23-20E3"
    body = '<rect width="4" height="16" fill="red"/>'
    icons = {
        "icons": {"left": {"body": body}},
        "aliases": {
            "right": {"parent": "left", "hFlip": True},
            "plain": {"parent": "left"},
            "turned": {"parent": "left", "rotate": 1},
        },
    }
    icon_set = IconSet(icons, {})
    left, right = (icon_set.find(name) for name in ("left", "right"))
    assert left and right and icon_set.find("plain") == left
    assert icon_set.find("turned") is None and icon_set.find("absent") is None
    pixels = rasterise(right, 32).getchannel("A").load()
    assert pixels is not None and pixels[26, 16] == 255 and pixels[5, 16] == 0


def test_a_missing_rasteriser_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ResourceError, match="resvg_py") as caught:
        rasterise("<svg/>", 16)
    assert "sfumato[data]" in caught.value.hint

"""Every kind of source gives the same pictures, captions, classes and conditions; damaged ones are told."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import DataError, InputError
from sfumato.training.data import Illustrations, PictureSet, Placed, Position, open_data
from sfumato.training.settings_data import DataConfig

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (90, 90, 90)]
WORDS = ["red", "green", "blue", "grey"]


def png(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def opened(root: Path, **keys: Any) -> PictureSet:
    data = open_data(DataConfig.model_validate({"path": root, "size": 4, **keys}), "train")
    assert isinstance(data, PictureSet) and isinstance(data, Placed)
    return data


def assert_four(data: PictureSet) -> None:
    """The four colours in order, each with its word; the split by name may keep some out."""
    for index, record in enumerate(data.records):
        number = WORDS.index(record.captions[0])
        assert data.captions(index) == [WORDS[number]]
        assert np.asarray(data.picture(index))[0, 0].tolist() == list(COLOURS[number])
        position, (shown,) = data.shown(Position(0, 0, 5, index))
        assert position.index == index and shown.size == (4, 4)
    assert len(data) == 4


def files(root: Path) -> Path:
    (root / "a").mkdir(parents=True)
    for word, colour in zip(WORDS, COLOURS, strict=True):
        (root / "a" / f"{word}.png").write_bytes(png(colour))
    return root


def write_table(root: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    if kind == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif kind == "csv":
        with (root / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_names_the_pictures(tmp_path: Path, kind: str) -> None:
    root = files(tmp_path)
    write_table(root, kind, [{"file_name": f"a/{word}.png", "text": word, "label": word} for word in WORDS])
    data = opened(root)
    assert_four(data)
    assert data.classes == tuple(sorted(WORDS))
    assert [data.classes[data.label(index) or 0] for index in range(4)] == [
        r.captions[0] for r in data.records
    ]


def test_a_table_with_several_captions_and_a_chosen_column(tmp_path: Path) -> None:
    root = files(tmp_path)
    rows = [{"file_name": f"a/{word}.png", "text": "x", "words": [word, f"a {word} one"]} for word in WORDS]
    write_table(root, "jsonl", rows)
    data = opened(root, captions={"column": "words"})
    assert sorted(data.captions(index)[1] for index in range(4)) == sorted(f"a {word} one" for word in WORDS)
    with pytest.raises(InputError, match=r"'word', which .* lacks\nDid you mean 'words'"):
        opened(root, captions={"column": "word"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "../secret.png", "text": "x"}, "points out of the folder"),
        ({"file_name": "/etc/passwd", "text": "x"}, "points out of the folder"),
        ({"file_name": "a/none.png", "text": "x"}, "does not exist"),
        ({"file_name": "a/red.png", "text": {"a": 1}}, "caption is no text"),
        ({"file_name": "", "text": "x"}, "file_name is ''"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    (tmp_path / "secret.png").write_bytes(png((0, 0, 0)))
    root = files(tmp_path / "set")
    write_table(root, "jsonl", [{"file_name": "a/blue.png", "text": "blue"}, row])
    with pytest.raises(DataError, match=words):
        opened(root)


@pytest.mark.parametrize("text", ["{", "[1]", '{"file_name": "a/red.png"}\n{"file_name"'])
def test_a_table_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    root = files(tmp_path)
    (root / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"metadata\.jsonl|pictures-"):
        opened(root)


def test_an_illustration_set_is_told_apart(tmp_path: Path) -> None:
    tar_of(tmp_path / "pictures-00000.tar", {"blue.png": png((0, 0, 255), (4, 4))})
    row = {
        "id": "a", "captions": ["a"], "split": "train", "kind": "drawing", "background": [255, 0, 0],
        "layers": [{"picture": "blue", "box": [0, 0, 0.5, 1]}], "attributes": {},
    }  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    config = DataConfig(path=tmp_path, size=4)
    assert isinstance(open_data(config, "train"), Illustrations)
    with pytest.raises(InputError, match=r"data\.flip is for pictures in files"):
        open_data(config.model_copy(update={"flip": 0.5}), "train")


def web(root: Path) -> Path:
    """Two tars as img2dataset writes them."""
    root.mkdir(exist_ok=True)
    for number in range(2):
        members: dict[str, bytes] = {}
        for place in (2 * number, 2 * number + 1):
            key = f"{place:09d}"
            members[f"{key}.json"] = json.dumps({"caption": f"json {WORDS[place]}", "width": 6}).encode()
            members[f"{key}.txt"] = WORDS[place].encode()
            members[f"{key}.png"] = png(COLOURS[place])
            members[f"{key}.cls"] = str(place * 5).encode()
            members[f"{key}.condition.png"] = png(COLOURS[3 - place])
        tar_of(root / f"{number:05d}.tar", members)
    (root / "00000_stats.json").write_text("{}")
    pq.write_table(pa.Table.from_pylist([{"key": "0", "url": "x"}]), root / "00000.parquet")
    return root


def test_tars_of_webdataset(tmp_path: Path) -> None:
    root = web(tmp_path / "web")
    data = opened(root)
    assert_four(data)
    assert data.classes == ("0", "5", "10", "15")
    assert [data.classes[data.label(k) or 0] for k in range(4)] == ["0", "5", "10", "15"]
    _, (picture, condition) = data.shown(Position(0, 0, 0, 1), ("picture", "condition"))
    assert np.asarray(picture)[0, 0].tolist() == list(COLOURS[1])
    assert np.asarray(condition)[0, 0].tolist() == list(COLOURS[2])
    described = opened(root, captions={"column": "caption"})
    assert described.captions(0) == ["json red"]


def test_the_index_of_a_tar_is_kept_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = web(tmp_path / "web"), tmp_path / "run"
    config = DataConfig(path=root, size=4)
    first = open_data(config, "train", out)
    indices = sorted((out / "index").iterdir())
    assert len(indices) == 2

    def refused(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a tar was read again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", refused)
        again = open_data(config, "train", out)
        assert again.digest == first.digest
        assert_four(again)  # type: ignore[arg-type]
    indices[0].write_text('{"state": []}')
    assert open_data(config, "train", out).digest == first.digest
    with tarfile.open(root / "00001.tar", "a") as archive:
        for name, content in (("9.png", png((1, 2, 3))), ("9.txt", b"new")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert open_data(config, "train", out).digest != first.digest


def test_members_that_are_no_files_are_passed_over(tmp_path: Path) -> None:
    from sfumato.training.data.records import Reading
    from sfumato.training.data.tars import list_tars

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (
            ("../up.png", tarfile.REGTYPE), ("/etc/a.png", tarfile.REGTYPE), ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE), ("folder", tarfile.DIRTYPE),
            ("good.png", tarfile.REGTYPE),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            content = png((1, 2, 3)) if kind == tarfile.REGTYPE else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    listing = list_tars(tmp_path, Reading())
    assert [record.name for record in listing.records] == ["a/good"]
    assert sorted(finding.name for finding in listing.findings) == [
        "a.tar/../up.png", "a.tar//etc/a.png", "a.tar/dev.png", "a.tar/hard.png", "a.tar/link.png",
    ]  # fmt: skip


def damaged_tars() -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = 600
        archive.addfile(info, io.BytesIO(bytes(600)))
    whole = buffer.getvalue()
    backwards = tarfile.TarInfo("a.png")
    header = bytearray(backwards.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 8 + (-1024).to_bytes(4, "big", signed=True)  # a size below 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    claims = tarfile.TarInfo("long")
    claims.type, claims.size = tarfile.GNUTYPE_LONGNAME, 5 << 30
    return {
        "cut short": whole[:900], "no tar": b"x" * 2000, "empty": b"",
        "negative size": bytes(header) + bytes(1024),
        "a name of 5 GB": claims.tobuf(tarfile.GNU_FORMAT) + bytes(1024),
    }  # fmt: skip


@pytest.mark.parametrize("content", damaged_tars().values(), ids=list(damaged_tars()))
def test_a_damaged_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar|no pictures in the tars"):
        opened(tmp_path)


def shards(root: Path, features: bool = True) -> Path:
    """Parquet files as `datasets` pushes them, in row groups of one."""
    (root / "data").mkdir(parents=True)
    info = {"info": {"features": {"label": {"names": ["warm", "cold"], "_type": "ClassLabel"}}}}
    for number in range(2):
        rows = [
            {
                "image": {"bytes": png(COLOURS[place]), "path": f"{place}.png"}, "text": WORDS[place],
                "label": place % 2, "conditioning_image": {"bytes": png(COLOURS[3 - place]), "path": None},
            }
            for place in (2 * number, 2 * number + 1)
        ]  # fmt: skip
        table = pa.Table.from_pylist(rows)
        if features:
            table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
        pq.write_table(table, root / "data" / f"train-{number:05d}-of-00002.parquet", row_group_size=1)
    return root


def test_parquet_files_that_hold_pictures(tmp_path: Path) -> None:
    data = opened(shards(tmp_path / "set"))
    assert_four(data)
    assert data.classes == ("warm", "cold")
    assert [data.label(index) for index in range(4)] == [0, 1, 0, 1]
    _, (condition,) = data.shown(Position(0, 0, 0, 0), ("condition",))
    assert np.asarray(condition)[0, 0].tolist() == list(COLOURS[3])


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    def save(folder: Path, places: list[int]) -> None:
        folder.mkdir(parents=True)
        rows = [{"image": {"bytes": png(COLOURS[k]), "path": None}, "caption": WORDS[k]} for k in places]
        table = pa.Table.from_pylist(rows)
        with (
            pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=2)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))

    save(tmp_path / "one", [0, 1, 2, 3])
    assert_four(opened(tmp_path / "one"))
    save(tmp_path / "two" / "train", [0, 1, 2, 3])
    save(tmp_path / "two" / "validation", [2, 1, 3])
    (tmp_path / "two" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert_four(opened(tmp_path / "two"))
    held = open_data(DataConfig(path=tmp_path / "two", size=4), "test")
    assert [held.captions(index) for index in range(len(held))] == [["blue"], ["green"], ["grey"]]


def test_parquet_files_of_splits(tmp_path: Path) -> None:
    for name, places in (("train-0", [0, 1, 2, 3]), ("test-0", [1]), ("validation-0", [2, 3])):
        rows = [{"image": png(COLOURS[place]), "caption": WORDS[place]} for place in places]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert_four(opened(tmp_path))
    held = open_data(DataConfig(path=tmp_path, size=4), "test")
    assert [held.captions(index) for index in range(len(held))] == [["green"], ["blue"], ["grey"]]


@pytest.mark.parametrize("name", ["a.parquet", "state.json", "data.arrow"])
def test_damaged_tables_of_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 nothing")
    if name == "data.arrow":
        state = {"_data_files": [{"filename": "../data.arrow"}]}
        (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="cannot read"):
        opened(tmp_path)


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for word, colour in zip(WORDS, COLOURS, strict=True):
        (tmp_path / word / "deep").mkdir(parents=True)
        for number in range(3):
            (tmp_path / word / "deep" / f"{number}.png").write_bytes(png(colour))
    data = opened(tmp_path, repeats={"red": 3, "grey": 0})
    assert data.classes == tuple(sorted(WORDS))
    for index in range(len(data)):
        name = data.classes[data.label(index) or 0]
        assert np.asarray(data.picture(index))[0, 0].tolist() == list(COLOURS[WORDS.index(name)])
        assert name != "grey" and list(data.order).count(index) == (3 if name == "red" else 1)
    (tmp_path / "loose.png").write_bytes(png((0, 0, 0)))
    assert opened(tmp_path).classes == () and opened(tmp_path).label(0) is None
    with pytest.raises(InputError, match="repeats is for illustration sets and classes"):
        opened(tmp_path, repeats={"red": 3})


def test_conditions_and_masks_are_cut_and_mirrored_with_the_picture(tmp_path: Path) -> None:
    for name in ("pictures", "conditions", "masks"):
        (tmp_path / name).mkdir()
    ramp = np.linspace(0, 255, 40, dtype=np.uint8)[None].repeat(20, axis=0)
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    image.save(tmp_path / "pictures" / "a.png")
    image.resize((80, 40)).save(tmp_path / "conditions" / "a.jpg", quality=95)
    Image.fromarray(ramp).save(tmp_path / "masks" / "a.png")
    keys = {"crop": "random", "flip": 0.5, "conditions": tmp_path / "conditions", "masks": tmp_path / "masks"}
    data = opened(tmp_path / "pictures", size=10, **keys)
    seen = set()
    for place in range(20):
        position = Position(1, 0, place, 0)
        _, (picture, condition, mask) = data.shown(position, ("picture", "condition", "mask"))
        assert condition.mode == "RGB" and mask.mode == "L" and condition.size == mask.size == (10, 10)
        for other in (np.asarray(condition)[..., 0], np.asarray(mask)):
            assert np.abs(np.asarray(picture)[..., 0].astype(int) - other).max() < 12
        view = data.view(position)
        rises = int(np.asarray(picture)[0, -1, 0]) > int(np.asarray(picture)[0, 0, 0])
        assert rises != view.flipped and view.original == (20, 40) and view.crop[0] == 0
        start = np.asarray(picture)[0, 0 if rises else -1, 0]
        assert abs(int(start) - view.crop[1] * 2 / 39 * 255) < 12
        seen.add((view.crop, view.flipped))
    assert len(seen) > 10 and {flipped for _, flipped in seen} == {True, False}
    (tmp_path / "conditions" / "a.jpg").unlink()
    with pytest.raises(DataError, match="a has no picture in"):
        opened(tmp_path / "pictures", size=10, **keys)


def test_several_folders_with_repeats(tmp_path: Path) -> None:
    subject, prior = files(tmp_path / "subject"), tmp_path / "prior"
    prior.mkdir()
    for number in range(30):
        (prior / f"{number}.png").write_bytes(png((number, number, number)))
    folders = [{"path": prior, "prior": True, "caption": "a thing"}, {"path": subject, "repeats": 7}]
    data = opened(subject, folders=folders)
    kinds = [(data.prior(index), data.records[index].name.split("//")[0]) for index in range(len(data))]
    assert kinds.count((True, "1")) == 30, "none of them is held out"
    assert all(
        data.captions(index) == (["a thing"] if data.prior(index) else []) for index in range(len(data))
    )
    for index in range(len(data)):
        assert list(data.order).count(index) == (7 if data.records[index].name.startswith("2//") else 1)
    assert opened(subject).digest != data.digest


@pytest.mark.parametrize("kind", ["tables", "classes"])
def test_folders_of_splits(tmp_path: Path, kind: str) -> None:
    """As Hugging Face's imagefolder has them: what lies under `validation` is never trained on."""
    for split, chosen in (("train", (0, 1, 2)), ("validation", (3,))):
        rows = []
        for number in chosen:
            name = f"{number}.png" if kind == "tables" else f"{WORDS[number]}/{number}.png"
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(COLOURS[number]))
            rows.append(json.dumps({"file_name": name, "text": WORDS[number]}))
        if kind == "tables":
            (tmp_path / split / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "README.md").write_text("A data set.")
    config = DataConfig.model_validate({"path": tmp_path, "size": 4})
    train, held_out = (open_data(config, split) for split in ("train", "test"))
    for data, wanted in ((train, COLOURS[:3]), (held_out, COLOURS[3:])):
        found = [tuple(np.asarray(data.picture(index))[0, 0].tolist()) for index in range(len(data))]
        assert sorted(found) == sorted(wanted)
    if kind == "tables":
        assert [train.captions(i) for i in range(3)] == [[word] for word in WORDS[:3]]
        assert held_out.captions(0) == ["grey"]


def test_conditions_that_cannot_be_are_told_and_no_picture_is_put_aside(tmp_path: Path) -> None:
    """What is wrong with a recipe is no fault of the pictures: mended, it finds all of them."""
    root, out = files(tmp_path / "pictures"), tmp_path / "run"
    config = DataConfig.model_validate({"path": root, "size": 4})
    data = open_data(config, "train", out)
    assert isinstance(data, PictureSet)
    for part in ("condition", "mask"):
        with pytest.raises(InputError, match=f"no picture has a {part}"):
            data.shown(Position(0, 0, 0, 0), (part,))  # type: ignore[arg-type]
    assert not (out / "quarantine.jsonl").exists()
    tar_of(tmp_path / "0.tar", {"a.png": png((1, 2, 3))})
    with pytest.raises(InputError, match="holds pictures in archives"):
        opened(tmp_path, conditions=root)

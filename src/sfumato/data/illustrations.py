"""Builds the illustration set: drawings in several styles, avatars, and scenes composed of the drawings."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfumato.data import notices, shards
from sfumato.data.avatar_styles import SMALL_STYLES
from sfumato.data.avatar_styles_full import FULL_STYLES
from sfumato.data.avatars import Artist, AvatarStyle, avatar_rows
from sfumato.data.drawings import Drawings, drawing_rows
from sfumato.data.emoji import STYLES, Art, Label, rasterise, read_art, read_labels
from sfumato.data.objects import Thing, full_domain, small_domain
from sfumato.data.packages import ART, LABELS, PYTHON_PACKAGES
from sfumato.data.scenes import scene_rows
from sfumato.errors import DataError, InputError, nearest

MIN_SIZE, MAX_SIZE = 16, 512

Progress = Callable[[str, int, int], None]  # (what is being done, how many are done, of how many)


ANIMALS, FOOD, ACTIVITIES, OBJECTS = 3, 4, 6, 7  # CLDR groups whose things stand well on a plain ground


@dataclass(frozen=True)
class Domain:
    """What a set holds: objects, avatar styles, and how many rows of each style and each form of scene."""

    things: Callable[[list[Label]], list[Thing]]
    avatars: tuple[AvatarStyle, ...]
    avatars_train: int
    avatars_test: int
    scenes_train: int
    scenes_test: int
    scene_styles: tuple[str, ...] = STYLES
    scene_groups: frozenset[int] | None = None  # None: all objects stand in scenes


DOMAINS = {
    # What a model trained on a CPU in two hours can learn; fixed before its training.
    "small": Domain(
        small_domain,
        SMALL_STYLES,
        avatars_train=5000,
        avatars_test=150,
        scenes_train=5000,
        scenes_test=200,
        scene_styles=("noto", "twemoji", "fluent"),
    ),
    # Everything; wants a GPU.
    "full": Domain(
        full_domain,
        FULL_STYLES,
        avatars_train=8000,
        avatars_test=150,
        scenes_train=16000,
        scenes_test=300,
        scene_groups=frozenset({ANIMALS, FOOD, ACTIVITIES, OBJECTS}),
    ),
}


@dataclass(frozen=True)
class Summary:
    """What was built: counts of pictures and of rows by "kind/split", and the digests of the files."""

    root: str
    domain: str
    size: int
    seed: int
    styles: tuple[str, ...]
    objects: int
    pictures: int
    rows: dict[str, int]
    sources: dict[str, str]
    sha256: dict[str, str]


def ignore(what: str, done: int, of: int) -> None:
    """Progress that nobody looks at."""


def build(
    out: Path | str,
    *,
    size: int = 64,
    domain: str = "small",
    styles: Sequence[str] | None = None,
    npm_dir: Path | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Summary:
    """Builds the picture set into the folder `out`, which must not exist or be empty.

    `size` is the side of the pictures in pixels (16..512), `domain` "small" (120 objects) or "full", `styles`
    the drawing styles (all five for None). Tarballs in `npm_dir` are used, missing ones are fetched into it;
    without it they are fetched for this run alone. Equal arguments give byte-equal files. Raises InputError
    for arguments, ResourceError for missing programs and packages, DataError for a damaged source.
    """
    out = Path(out)
    chosen = check_arguments(out, size, domain, styles)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        staging = Path(work) / "set"
        staging.mkdir()
        tarballs = Path(npm_dir) if npm_dir is not None else Path(work) / "npm"
        summary = build_into(staging, out, size, domain, chosen, tarballs, seed, progress or ignore)
        if out.exists():
            out.rmdir()
        shutil.move(staging, out)
    return summary


def check_arguments(out: Path, size: int, domain: str, styles: Sequence[str] | None) -> tuple[str, ...]:
    """The styles in the order of the style table; InputError for what cannot be built."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InputError(
            f"size {size} is outside {MIN_SIZE}..{MAX_SIZE}", "64 is what the embedded model knows."
        )
    if domain not in DOMAINS:
        raise InputError(f"there is no domain {domain!r}", nearest(domain, DOMAINS))
    for style in styles or ():
        if style not in STYLES:
            raise InputError(f"there is no drawing style {style!r}", nearest(style, STYLES))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder", "Name a new folder, or remove this one.")
    return tuple(style for style in STYLES if not styles or style in styles)


def build_into(
    root: Path,
    out: Path,
    size: int,
    domain: str,
    styles: tuple[str, ...],
    npm_dir: Path,
    seed: int,
    progress: Progress,
) -> Summary:
    """Builds every file of the set in the existing empty folder `root`."""
    recipe = DOMAINS[domain]
    progress("fetching drawings", 0, 1)
    things = recipe.things(read_labels(npm_dir))
    art = read_art(styles, npm_dir)
    pictures = draw(things, styles, art, size, progress)
    if not pictures:
        raise DataError("the chosen styles draw none of the objects", "Choose more styles.")
    drawings = Drawings.of(things, pictures)
    avatars = [
        (artist, row, values)
        for style, artist in [(style, Artist(style)) for style in recipe.avatars]
        for row, values in avatar_rows(style, seed, recipe.avatars_train, recipe.avatars_test)
    ]

    def encoded() -> Iterator[tuple[str, bytes]]:
        yield from pictures.values()
        for number, (artist, row, values) in enumerate(avatars):
            progress("avatars", number, len(avatars))
            yield row["layers"][0]["picture"], shards.encode(artist.picture(values, row["id"], size))

    count = shards.write_shards(root, encoded())
    progress("scenes", 0, 1)
    in_scenes = [t for t in things if recipe.scene_groups is None or t.label.group in recipe.scene_groups]
    rows = [
        *drawing_rows(drawings, seed),
        *(row for _, row, _ in avatars),
        *scene_rows(
            Drawings.of(in_scenes, pictures),
            recipe.scene_styles,
            seed,
            recipe.scenes_train,
            recipe.scenes_test,
        ),
    ]
    shards.write_rows(root, rows)
    packages = [LABELS, *(ART[style] for style in art.sets)]
    summary = Summary(
        root=str(out),
        domain=domain,
        size=size,
        seed=seed,
        styles=styles,
        objects=len(drawings.things),
        pictures=count,
        rows=dict(sorted(Counter(f"{row['kind']}/{row['split']}" for row in rows).items())),
        sources={package.spec: package.sha256 for package in packages} | PYTHON_PACKAGES,
        sha256=shards.digests(root),
    )
    write_texts(root, summary, [style.name for style in recipe.avatars])
    progress("done", 1, 1)
    return summary


def draw(
    things: Sequence[Thing], styles: Sequence[str], art: Art, size: int, progress: Progress
) -> dict[tuple[str, str], tuple[str, bytes]]:
    """(code point, style) -> (key, encoded picture) of every drawing that exists.

    Where a style draws two objects with equal pixels, the one with the shorter name keeps the drawing.
    """
    wanted = [(thing, style) for thing in things for style in styles]
    encoded: dict[tuple[str, str], tuple[str, bytes]] = {}
    owners: dict[tuple[str, str], Thing] = {}
    for number, (thing, style) in enumerate(wanted):
        progress("drawings", number, len(wanted))
        svg = art.svg(thing.label, style)
        if svg is None:
            continue
        picture = rasterise(svg, size)
        look = (style, hashlib.sha256(picture.tobytes()).hexdigest())
        owner = owners.get(look)
        if owner is not None and len(owner.name) <= len(thing.name):
            continue
        if owner is not None:
            del encoded[owner.label.code, style]
        owners[look] = thing
        encoded[thing.label.code, style] = (f"{thing.label.code.lower()}-{style}", shards.encode(picture))
    return encoded


def write_texts(root: Path, summary: Summary, avatar_names: Sequence[str]) -> None:
    """Writes NOTICE, README.md and summary.json; the summary leaves out where the set lies."""
    content = {name: value for name, value in asdict(summary).items() if name != "root"}
    (root / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (root / "NOTICE").write_text(notices.notice(summary.styles, avatar_names), encoding="utf-8")
    (root / "README.md").write_text(notices.readme(content), encoding="utf-8")

"""Moving pictures: frames written as an animated GIF, WebP or PNG, or as an MP4 video."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import InputError, nearest

FORMATS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".mp4": "MP4"}
VIDEO_CODEC = "libx264"
MAX_MILLISECONDS = 655_350  # GIF counts hundredths of a second in two bytes
COLOURS = 256  # of a GIF's palette


def animation_format(path: Path) -> str:
    """PIL's name of the format that a file of this name gets; `InputError` for another suffix."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"moving pictures are not written as {suffix!r}", nearest(suffix, FORMATS))
    return FORMATS[suffix]


def write_animation(
    frames: Sequence[Image.Image],
    path: Path,
    *,
    milliseconds: int = 80,
    back_and_forth: bool = False,
    repeats: int = 0,
    quality: int = 90,
) -> None:
    """Write frames of equal size as one file that moves, whole or not at all.

    milliseconds: of each frame; GIF knows hundredths of a second, and browsers slow down what is below 20.
    back_and_forth: play the frames backwards after the last. repeats: how often it plays, 0 for ever; a video
    says nothing of it. quality: of WebP and MP4; at 100 a WebP loses nothing. A GIF has one palette of 256
    colours for all frames, without dithering, so that what stands still does not flicker. Raises `InputError`
    for another suffix, no frames, or unequal ones, and for .mp4 without PyAV; `ResourceError` for a place
    that cannot be written.
    """
    kind = animation_format(path)
    if not frames:
        raise InputError("there are no frames to write")
    if len({(frame.size, frame.mode) for frame in frames}) > 1:
        raise InputError("the frames are of different sizes or kinds", "Draw them alike.")
    if not 1 <= milliseconds <= MAX_MILLISECONDS or repeats < 0 or not 1 <= quality <= 100:
        raise InputError(
            f"a frame of {milliseconds} ms, {repeats} repeats, quality {quality}",
            f"Frames last 1 to {MAX_MILLISECONDS} ms, repeats are 0 or more, quality is 1 to 100.",
        )
    shown = [*frames, *frames[-2:0:-1]] if back_and_forth else list(frames)
    if kind == "MP4":
        _write_video(shown, path, milliseconds, quality)
        return
    options = {"save_all": True, "append_images": [], "duration": milliseconds}
    if kind == "GIF":
        shown, options["optimize"] = _one_palette(shown), False
    if kind == "WEBP":
        options |= {"quality": quality, "lossless": quality == 100}
    # GIF's field counts repetitions after the first play, and none means no loop; the others count plays.
    plays = repeats - 1 if kind == "GIF" and repeats else repeats
    if not (kind == "GIF" and repeats == 1):
        options["loop"] = plays
    options["append_images"] = shown[1:]
    write_atomically(path, lambda temporary: shown[0].save(temporary, kind, **options))


def _write_video(frames: Sequence[Image.Image], path: Path, milliseconds: int, quality: int) -> None:
    """As H.264 in a form that every player takes: with even sides, to which a row or column is added."""
    try:
        import av
    except ImportError as error:
        raise InputError(
            "writing .mp4 needs PyAV", "Run: pip install 'sfumato[video]', or write .webp."
        ) from error

    width, height = (side + side % 2 for side in frames[0].size)

    def write(temporary: Path) -> None:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream(VIDEO_CODEC, rate=Fraction(1000, milliseconds))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": str(round((100 - quality) / 2))}  # 0 to 51, the lower the better
            for frame in frames:
                values = np.array(frame.convert("RGB"))
                padding = ((0, height - values.shape[0]), (0, width - values.shape[1]), (0, 0))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.pad(values, padding, "edge"))))
            container.mux(stream.encode())

    write_atomically(path, write)


def _one_palette(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames in the colours that serve all of them best."""
    colours = [frame.convert("RGB") for frame in frames]
    shared = Image.new("RGB", (colours[0].width, colours[0].height * len(colours)))
    for index, frame in enumerate(colours):
        shared.paste(frame, (0, index * frame.height))
    palette = shared.quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in colours]

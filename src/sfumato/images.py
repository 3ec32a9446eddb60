"""Pictures: tensor <-> PIL, file names, and PNG files that carry the parameters they were drawn with."""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from sfumato.checkpoints.files import write_atomically
from sfumato.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> PIL mode
STEM_BYTES = 120  # of a prompt, in UTF-8, that go into a file's name; disks take names of 255 in all
JSON_KEY, TEXT_KEY = "sfumato", "parameters"

# Names in the AUTOMATIC1111 text form, so that other tools read our pictures and we theirs.
SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
}
TEXT_FIELDS = {  # ours -> theirs, in the order they are written
    "steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "guidance": "CFG scale",
    "seed": "Seed",
    "model_digest": "Model hash",
    "model": "Model",
}
_FIELD = re.compile(r'\s*([\w ./+-]+?):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def to_pil(samples: Tensor) -> list[Image.Image]:
    """Pictures of samples (b, c, h, w) in -1..1 (values outside are clipped): c = 1 grey, 3 RGB, 4 RGBA.

    Raises `ValueError` where a value is not finite, `InputError` for another number of channels.
    """
    if samples.shape[1] not in MODES:
        raise InputError(f"{samples.shape[1]} channels are no picture", "Pictures have 1, 3 or 4 channels.")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("samples hold values that are not finite")
    values = (samples.detach().float().cpu() + 1) * 127.5
    rows = values.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in rows]


def to_tensor(images: Sequence[Image.Image], mode: str = "RGB") -> Tensor:
    """Pictures of equal size as (b, c, h, w) float32 in -1..1, converted to a PIL `mode` first."""
    rows = [torch.from_numpy(np.array(image.convert(mode))) for image in images]  # (h, w[, c]) uint8
    return torch.stack([row.reshape(*row.shape[:2], -1) for row in rows]).movedim(-1, 1).float() / 127.5 - 1


def preview(sample: Tensor) -> Image.Image:
    """A picture to look at of one sample (c, ...): of a 1-D one its curves, of a 3-D one all slices.

    Where c is 1, 3 or 4 a 2-D sample is the picture itself; of another number of channels the first is shown.
    """
    if sample.ndim > 2:
        shown = sample if sample.shape[0] in MODES else sample[:1]
        return to_pil(shown[None])[0] if sample.ndim == 3 else grid(to_pil(shown.movedim(1, 0)))
    length = sample.shape[-1]
    height = 64
    picture = np.full((height, length), 255, dtype=np.uint8)
    for channel in sample.float().clamp(-1, 1).cpu():  # (l,)
        row = ((1 - channel) / 2 * (height - 1)).round().long().numpy()
        picture[row, np.arange(length)] = 0
    return Image.fromarray(picture)


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """One sheet of pictures of equal size, as square as it gets unless `columns` are given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet


def file_stem(prompt: str | None, seed: int) -> str:
    """A file name without suffix: the letters and digits of the prompt, of any script, and the seed."""
    text = unicodedata.normalize("NFC", prompt or "")
    kept = "".join(letter if unicodedata.category(letter)[0] in "LNM" else "-" for letter in text)
    words = re.sub("-+", "-", kept).strip("-").lower()
    short = words.encode()[:STEM_BYTES].decode(errors="ignore").rstrip("-")
    return f"{short or 'picture'}-{seed}"


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """`folder/stem.suffix`, or with -1, -2, ... at its end: the first that does not exist."""
    path, count = folder / f"{stem}{suffix}", 0
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}{suffix}"
    return path


def save_png(image: Image.Image, path: Path, parameters: Mapping[str, Any]) -> None:
    """Write a PNG file whole or not at all, with its parameters as JSON and in AUTOMATIC1111's text form.

    Raises `ResourceError` for a full disk or a place that cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_KEY, to_text(parameters))
    info.add_text(JSON_KEY, json.dumps(parameters, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=info)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def save_array(sample: Tensor, path: Path) -> None:
    """Write one sample (c, ...) as a float32 .npy file, whole or not at all; errors as `save_png`."""
    buffer = io.BytesIO()
    np.save(buffer, sample.detach().float().cpu().numpy(), allow_pickle=False)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters in a PNG file: ours, or AUTOMATIC1111's text form under our names; {} without any.

    Raises `InputError` for a file that is no PNG. Nothing in the parameters is acted on.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text may stand behind the pixels
            texts = {key: str(value) for key, value in image.info.items() if key in {JSON_KEY, TEXT_KEY}}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a PNG file: {error}", "Give a whole PNG file.") from error
    try:
        values = json.loads(texts.get(JSON_KEY, ""))
    except (ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else from_text(texts.get(TEXT_KEY, ""))


def to_text(parameters: Mapping[str, Any]) -> str:
    """The parameters as AUTOMATIC1111 writes them: prompt, negative prompt, one line of `Name: value`."""
    lines = [str(parameters.get("prompt") or "")]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    values = {
        **parameters,
        "sampler": SAMPLER_NAMES.get(str(parameters.get("sampler")), parameters.get("sampler")),
    }
    values["spacing"] = str(parameters.get("spacing", "")).capitalize()
    values["model_digest"] = str(parameters.get("model_digest") or "")[:10]
    fields = [f"{theirs}: {_quoted(values[ours])}" for ours, theirs in TEXT_FIELDS.items() if values.get(ours)
              or values.get(ours) == 0]  # fmt: skip
    if parameters.get("width") and parameters.get("height"):
        fields.insert(5, f"Size: {parameters['width']}x{parameters['height']}")
    fields.append(f"Version: sfumato {parameters.get('version', '')}".rstrip())
    return "\n".join([*lines, ", ".join(fields)]).replace("\0", " ")


def from_text(text: str) -> dict[str, Any]:
    """Read AUTOMATIC1111's text form. Never fails: unknown names are kept, text alone is a prompt."""
    lines = text.strip().split("\n")
    if not lines[0] and len(lines) == 1:
        return {}
    found = dict(_FIELD.findall(lines[-1])) if re.match(r"\s*Steps: ", lines[-1]) else {}
    body = lines[:-1] if found else lines
    start = next((i for i, line in enumerate(body) if line.startswith("Negative prompt:")), len(body))
    values: dict[str, Any] = {"prompt": "\n".join(body[:start])}
    if start < len(body):
        values["negative_prompt"] = "\n".join(body[start:]).removeprefix("Negative prompt:").strip()
    ours = {theirs: name for name, theirs in TEXT_FIELDS.items()}
    samplers = {theirs: name for name, theirs in SAMPLER_NAMES.items()}
    for name, written in found.items():
        value = _unquoted(written.strip())
        if name == "Size" and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
            values["width"], values["height"] = (int(side) for side in value.split("x"))
        elif name == "Sampler":
            values["sampler"] = samplers.get(value, value)
        elif name == "Schedule type":
            values["spacing"] = value.lower()
        else:
            values[ours.get(name, name)] = _number(value)
    return values


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> int | float | str:
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,18}\.\d{1,18}", text) else text

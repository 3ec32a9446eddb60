"""Textual inversions (Gal et al. 2022): learned token vectors, as the files of several trainers hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sfumato.checkpoints.addons.read import check_finite
from sfumato.checkpoints.files import open_file
from sfumato.checkpoints.source import Source
from sfumato.errors import CheckpointError
from sfumato.presets import ModelConfig

MAX_VECTORS = 75  # of a chunk of a prompt between its start and its end
# The names that files of two towers give to each part's vectors.
TOWERS = {
    "clip_l": "text", "clip_g": "text2",  # kohya, OneTrainer
    "text_encoders_0": "text", "text_encoders_1": "text2",  # diffusers
}  # fmt: skip
A1111, PLAIN = "string_to_param.", "emb_params"
WIDTHS = {  # of the vectors of each part -> the family whose they are
    (768,): "Stable Diffusion 1",
    (1024,): "Stable Diffusion 2",
    (1280,): "the second text encoder of SDXL alone",
    (768, 1280): "SDXL",
}


@dataclass(frozen=True)
class Embedding:
    """A word and the token vectors that stand for it.

    vectors: for each text encoder, "text" and "text2", (n, width) in float32, of the same n.
    """

    name: str
    vectors: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        """Tokens that it takes in a prompt."""
        return len(next(iter(self.vectors.values())))


def read_embedding(path: Path, config: ModelConfig, *, mmap: bool = True) -> Embedding:
    """The embedding in a file, under the file's name, for the text encoders of a model.

    path: A1111's .pt (`string_to_param`), diffusers' .bin (one token), or .safetensors (`emb_params`, one
    token, or `clip_l` and `clip_g`); of pickles nothing is run. Raises `CheckpointError` for a file that is
    damaged or none of these, and for vectors of another width, naming the models that they are for.
    """
    source = open_file(path, mmap=mmap)
    names = _vectors(source)
    check_finite(source)
    towers = {part: getattr(config, part) for part in ("text", "text2") if getattr(config, part) is not None}
    found = {part: _matrix(source, name) for part, name in names.items()}
    widths = {part: tower.hidden_size for part, tower in towers.items()}
    if {part: vectors.shape[1] for part, vectors in found.items()} != widths:
        given = tuple(vectors.shape[1] for _, vectors in sorted(found.items()))
        base = WIDTHS.get(given)
        wanted = " and ".join(str(width) for width in widths.values()) or "no vectors at all"
        raise CheckpointError(
            f"{path} has vectors of width {' and '.join(map(str, given))}, {config.name!r} takes {wanted}"
            + (f"; it was made for {base}" if base else ""),
            "Choose an embedding that was made for this model's family.",
        )
    if len({len(vectors) for vectors in found.values()}) > 1:
        raise CheckpointError(f"{path} has different numbers of vectors for its encoders", "Get it again.")
    return Embedding(path.stem, found)


def _vectors(source: Source) -> dict[str, str]:
    """part -> the tensor that holds its vectors."""
    names = [name for name, info in source.infos.items() if info.dtype.is_floating_point]
    both = {TOWERS[name]: name for name in names if name in TOWERS}
    if both and len(both) == len(source.infos):
        return both
    own = [name for name in names if name.startswith(A1111) or name == PLAIN]
    # Numbers of A1111's files say which tokens they were started from.
    others = [name for name in source.infos if name not in own and not name.startswith("string_to_token")]
    if len(own) == 1 and not others:
        return {"text": own[0]}
    if len(source.infos) == 1 and len(names) == 1:
        return {"text": names[0]}
    first = ", ".join(list(source.infos)[:10])
    raise CheckpointError(
        f"{source.path} is no textual inversion of one word: its tensors are {first}",
        "Give a textual inversion's file; LoRA are given as <lora:name:weight>.",
    )


def _matrix(source: Source, name: str) -> Tensor:
    vectors = source.tensor(name)
    shape = tuple(vectors.shape)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or not 1 <= len(vectors) <= MAX_VECTORS:
        raise CheckpointError(
            f"{source.path} has vectors of shape {shape}; they should be 1 to {MAX_VECTORS} rows",
            "Get the file again.",
        )
    return vectors.float().clone()

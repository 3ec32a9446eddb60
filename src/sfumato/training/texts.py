"""What frozen text encoders make of captions, computed once and kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sfumato.conditioning import Conditioning
from sfumato.errors import InputError
from sfumato.training.data import WHOLE, Share
from sfumato.training.rows import Columns, Part, columns_of, filled, planned

ENCODE_BATCH = 32
REPORTED = 32 * ENCODE_BATCH  # captions between two reports of progress

Encode = Callable[[list[str]], Conditioning]
Progress = Callable[[int, int], None]


class TextCache:
    """The conditioning of every caption: contexts (tokens, width), and pooled vectors where there are any.

    captions: all that will be asked for, see `data.every_caption`; the empty one is always among them.
    encode: from captions to a conditioning with their rows, of equal length; it is not called where all is
    kept already, so it may load the encoders. path: of the first file, others stand beside it with numbers,
    of 256 MB each, and encoding that was killed goes on with the file it was at. digest: the encoders', and
    that of whatever else the values hang on. progress: is told (encoded, of). share: of several processes
    with one folder each encodes its files. dtype: of what is kept.
    """

    def __init__(
        self,
        captions: Iterable[str],
        encode: Encode,
        path: Path,
        digest: str,
        progress: Progress = lambda done, of: None,
        share: Share = WHOLE,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.captions = sorted({"", *captions})
        self._encode, self._dtype, self._progress = encode, dtype, progress
        self._done = 0
        text = json.dumps([digest, str(dtype), self.captions])
        key = hashlib.sha256(text.encode()).hexdigest()
        columns = columns_of(path, key) or self._columns()
        parts = planned(range(len(self.captions)), columns)
        self._parts = filled(path, key, parts, self._made, share)
        self._where = {
            self.captions[row]: (number, place)
            for number, part in enumerate(parts)
            for place, row in enumerate(part.rows)
        }

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of a batch, in the number format kept; `InputError` for a caption it lacks."""
        unknown = [caption for caption in captions if caption not in self._where]
        if unknown:
            raise InputError(
                f"the caption {unknown[0][:80]!r} was not encoded ahead", "Delete the text cache of the run."
            )
        places = [self._where[caption] for caption in captions]
        found: dict[str, Tensor] = {
            name: torch.stack([self._parts[number][name][place] for number, place in places])
            for name in self._parts[0]
        }
        return Conditioning(context=found.get("context"), vector=found.get("vector"))

    def _columns(self) -> Columns:
        """What the encoders give for one caption."""
        return {name: (tuple(value.shape[1:]), self._dtype) for name, value in self._values([""]).items()}

    def _made(self, part: Part) -> dict[str, Tensor]:
        found: list[dict[str, Tensor]] = []
        for start in range(0, len(part.rows), ENCODE_BATCH):
            captions = [self.captions[row] for row in part.rows[start : start + ENCODE_BATCH]]
            found.append(self._values(captions))
            if self._done % REPORTED < len(captions):
                self._progress(self._done + len(captions), len(self.captions))
            self._done += len(captions)
        return {name: torch.cat([values[name] for values in found]) for name in part.columns}

    @torch.no_grad()
    def _values(self, captions: list[str]) -> dict[str, Tensor]:
        given = self._encode(captions)
        kinds = {"context": given.context, "vector": given.vector}
        if given.concat is not None or given.hints is not None or given.image_tokens is not None:
            raise InputError("a text cache keeps contexts and vectors", "Encode the rest as it is needed.")
        return {name: value.to("cpu", self._dtype) for name, value in kinds.items() if value is not None}

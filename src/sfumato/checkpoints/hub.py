"""Models on the Hugging Face hub: a name becomes files in its cache, by the hub's own library."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.checkpoints.layouts.naming import WEIGHT_SUFFIXES, weight_files
from sfumato.errors import CheckpointError, ResourceError, SfumatoError

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<path>.+))?")
FOLDERS = (  # of a pipeline, that are read
    "unet", "vae", "vqvae", "text_encoder", "text_encoder_2", "bert", "tokenizer", "tokenizer_2", "scheduler",
)  # fmt: skip
TEXTS = (".json", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class HubName:
    """A repository "org/name", and a file or folder in it ("" for all of it)."""

    repo: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}" if self.path else self.repo


def hub_name(text: str) -> HubName | None:
    """`text` as a name on the hub, or None where it can only be a path."""
    found = NAME.fullmatch(text)
    if found is None or ".." in text.split("/"):
        return None
    path = (found["path"] or "").strip("/")
    return None if not path and text.endswith(WEIGHT_SUFFIXES) else HubName(found["repo"], path)


def download(
    name: HubName, *, revision: str | None = None, offline: bool = False, variant: str | None = None
) -> Path:
    """The file or folder of that name in the hub's cache; what is missing of it is fetched.

    Only what a model is made of is fetched, in float32 where there are several. offline: the cache alone is
    asked; so it is where the hub cannot be reached. Raises `CheckpointError` for a repository, revision or
    file that is not there or not open to us, `ResourceError` where neither the hub nor the cache has it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        wanted: list[str] | None = None
        if not offline:
            names = _listed(name, revision)
            wanted = None if names is None else needed(names, name, variant)
        try:
            patterns = None if wanted is None else [glob.escape(file) for file in wanted]
            folder = snapshot_download(
                name.repo, revision=revision, allow_patterns=patterns, local_files_only=wanted is None
            )
        except LocalEntryNotFoundError as error:
            # A snapshot of a part of the repository is what is asked for here: the whole is never fetched.
            folder = getattr(error, "snapshot_path", None)
            if folder is None or wanted is not None:
                raise
    except SfumatoError:
        raise
    except Exception as error:  # the library's own, and its HTTP client's, whose package its version decides
        raise _explained(error, name, revision, offline) from error
    if wanted is None:  # offline: what is in the cache decides
        snapshot = Path(folder)
        files = (path for path in snapshot.rglob("*") if path.is_file())
        wanted = needed([path.relative_to(snapshot).as_posix() for path in files], name, variant)
    single = len(wanted) == 1 and wanted[0].endswith(WEIGHT_SUFFIXES)
    return Path(folder) / (wanted[0] if single else name.path)


def needed(names: Sequence[str], name: HubName, variant: str | None) -> list[str]:
    """Those of a repository's files that a model is made of; one name where the model is a file.

    A path in the name is that file or folder. Else a diffusers folder comes before a component, and both
    before a single file. `CheckpointError` where there is none of them, or several files to choose from.
    """
    if name.path in names:
        return [name.path]
    start = f"{name.path}/" if name.path else ""
    inside = [file.removeprefix(start) for file in names if file.startswith(start)]
    top = [file for file in inside if "/" not in file]
    if "model_index.json" in top:
        chosen = ["model_index.json"]
        for folder in FOLDERS:
            chosen += [f"{folder}/{file}" for file in _needed_of(_within(inside, folder), variant)]
    elif "config.json" in top:
        chosen = _needed_of(top, variant)
    else:
        chosen = [file for file in top if file.endswith(".safetensors")] or [
            file for file in top if file.endswith(WEIGHT_SUFFIXES)
        ]
        if len(chosen) != 1:
            several = f"{len(chosen)} models" if chosen else "no model file"
            raise CheckpointError(
                f"{name} holds {several} on the hub: {', '.join(chosen[:10] or top[:10])}",
                f"Give one of its files, as {name.repo}/FILE.",
            )
    return [start + file for file in chosen]


def _needed_of(files: list[str], variant: str | None) -> list[str]:
    texts = [file for file in files if file.endswith(TEXTS) and not file.endswith(".index.json")]
    texts = [file for file in texts if ".index." not in file]
    return [*texts, *weight_files(files, variant)]


def _within(names: Sequence[str], folder: str) -> list[str]:
    inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    return [name for name in inside if "/" not in name]


def _listed(name: HubName, revision: str | None) -> list[str] | None:
    """The files of the repository, or None where the hub cannot be reached: the cache may have them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        siblings = HfApi().model_info(name.repo, revision=revision).siblings or []
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # no network, a server in trouble: of several packages, by the library's version
        return None
    return [file.rfilename for file in siblings]


def _explained(error: Exception, name: HubName, revision: str | None, offline: bool) -> SfumatoError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    which = f"revision {revision!r} of " if revision else ""
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{name.repo} is gated: its licence has to be accepted first",
            f"Accept it at https://huggingface.co/{name.repo}, then log in with `hf auth login`.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"there is no file or folder {name} here, and no repository {name.repo} on the hub",
            "Check the spelling; to a private one log in with `hf auth login`.",
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"{name.repo} has no revision {revision!r}", "Leave out --revision for its newest."
        )
    if isinstance(error, HFValidationError):
        return CheckpointError(f"{name} is neither a path here nor a name on the hub: {error}", "Check it.")
    if isinstance(error, LocalEntryNotFoundError) or offline:
        return ResourceError(
            f"{which}{name} is neither a path here nor in the hub's cache"
            + ("" if offline else ", and the hub cannot be reached"),
            "Check the spelling; leave out --offline, or try again with a network.",
        )
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(f"{name.repo} has no file {name.path!r}", "Check the spelling.")
    return ResourceError(
        f"{which}{name} could not be fetched: {' '.join(str(error).split())[:300]}",
        "Try again; what was fetched already is kept.",
    )

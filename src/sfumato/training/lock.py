"""One process to a run's folder, and nothing left in it by a process that was killed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sfumato.checkpoints.files import disk_errors
from sfumato.errors import ResourceError

TEMPORARY = ".*.[0-9]*.tmp"  # as `write_atomically` and `save_state` name what is not whole yet
FOLDERS = (".", "states", "previews")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder `out` of a run, made if need be, and remove the temporary files of a killed process.

    The kernel lets go when the process ends, however it ends; Windows has no such lock, and gets none.
    Raises `ResourceError` that names the process holding the folder.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("a+", encoding="ascii")
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ResourceError(
                    f"process {file.read().strip()} is training in {out}",
                    "Wait for it to end, stop it, or choose another `out` folder.",
                ) from error
        with disk_errors(out):
            _remove_temporaries(out)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def _remove_temporaries(out: Path) -> None:
    for folder in FOLDERS:
        for stale in (out / folder).glob(TEMPORARY):
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink()

"""The study notes' `python main.py`: trains by config/config_SD.ini; `--key=value` changes a key of it.

Where the folder of pictures that the file names is not there, the one beside this program is taken.
"""

import sys
from pathlib import Path

from sfumato.cli import main
from sfumato.errors import InputError
from sfumato.training.notes.run import read_notes

HERE = Path(__file__).parent
CONFIG = HERE / "config" / "config_SD.ini"
PICTURES = HERE / "pictures"


def instead(given: list[str]) -> list[str]:
    """What replaces the file's folders by our own, if they are needed."""
    try:
        wanted = read_notes(CONFIG, given)[0].dataset_path
    except InputError:
        return []  # which training says again, in full
    if wanted.is_dir():
        return []
    print(f"there is no folder {wanted}: the pictures in {PICTURES} are taken", file=sys.stderr)
    return [f"--dataset_path={PICTURES}", f"--save_path={PICTURES / 'test_pic'}"]


if __name__ == "__main__":
    words = sys.argv[1:]
    told = any(word.removeprefix("--").startswith("dataset_path=") for word in words)
    sys.exit(main(["train", str(CONFIG), *([] if told else instead(words)), *words]))

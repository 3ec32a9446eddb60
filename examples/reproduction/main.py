"""The study notes' `python main.py`: trains by config/config_SD.ini; `--key=value` changes a key of it."""

import sys
from pathlib import Path

from sfumato.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", str(Path(__file__).parent / "config" / "config_SD.ini"), *sys.argv[1:]]))

"""`python -m sfumato.cli` is the command `sfumato`, as torchrun starts it."""

import sys

from sfumato.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m magi_attention`` is the command ``magi-attention``."""

import sys

from magi_attention.cli import main

if __name__ == "__main__":
    sys.exit(main())

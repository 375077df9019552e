"""python -m mqworker."""

import sys

from mqworker.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Let atheris look for bytes that take a reader or judge new ways.

    pip install atheris  # which nothing else needs
    python -m tests.hostile.coverage JUDGE -max_total_time=600 DIRECTORY

What follows the judge's name is libFuzzer's: directories of inputs to begin with, and to keep new ones in.
"""

import logging
import sys

import atheris

with atheris.instrument_imports(include=["mqworker"]):
    from tests.hostile.judges import JUDGES

logging.disable(logging.CRITICAL)
judge = JUDGES[sys.argv.pop(1)]
atheris.Setup(sys.argv, judge)
atheris.Fuzz()

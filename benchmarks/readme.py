"""Puts what was measured into the README, and has the words that its tables share."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Final

README: Final = Path(__file__).parents[1] / "README.md"
WIDTH: Final = 120


def write(block: str, text: str) -> None:
    """Put a text between the marks of a block."""
    readme = README.read_text(encoding="utf-8")
    between = re.compile(rf"(?<=^<!-- {block} -->\n).*?(?=^<!-- /{block} -->$)", re.MULTILINE | re.DOTALL)
    changed, number = between.subn(lambda _: text, readme)
    if number != 1:
        raise RuntimeError(f"expected one block <!-- {block} --> ... <!-- /{block} --> in {README}, got {number}")
    README.write_text(changed, encoding="utf-8")


def paragraph(words: str, *, indent: str = "") -> list[str]:
    """Return lines as wide as the README's, all but the first one indented."""
    return wrap(words, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def times(number: float) -> str:
    """Say a ratio."""
    return f"{number:,.0f} times" if number >= 10 else f"{number:.2f} times"  # noqa: PLR2004  # two digits tell


def row(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    """Return the first two lines of a table, whose columns but the first are numbers."""
    return [row(*cells), f"| --- |{' ---: |' * (len(cells) - 1)}"]


def milliseconds(seconds: float) -> str:
    """Say a short time."""
    found = seconds * 1e3
    return f"{found:,.0f} ms" if found >= 10 else f"{found:.2g} ms"  # noqa: PLR2004  # two digits tell


def middle(numbers: Sequence[float], digits: int = 0) -> str:
    """Say the median of several measurements, and the lowest and the highest if there are several."""
    found = f"{median(numbers):,.{digits}f}"
    if len(numbers) == 1:
        return found
    return f"{found} ({min(numbers):,.{digits}f} to {max(numbers):,.{digits}f})"

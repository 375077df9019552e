"""Makes the environment in which the peers run: what they need from PyPI, in versions that are named, made once."""

import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

# Celery with SQLAlchemy and psycopg for results in a database; Dramatiq with pika. The newest when this was written.
CELERY: Final = ("celery[sqlalchemy]==5.7.0", "kombu==5.7.0", "psycopg[binary]==3.3.9", "SQLAlchemy==2.1.9")
DRAMATIQ: Final = ("dramatiq[rabbitmq]==2.2.1", "pika==1.4.4")


def environment() -> Path:
    """Return the interpreter of the peers' environment, which is made if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mqworker" / "bench"
    wanted = (*CELERY, *DRAMATIQ)
    home = cache / sha256(repr((wanted, sys.version)).encode()).hexdigest()[:12]
    ready = home / "ready"
    if not ready.exists():
        print(f"installs Celery and Dramatiq into {home}", file=sys.stderr)
        _run([sys.executable, "-m", "venv", "--clear", str(home)])
        _run([str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *wanted])
        ready.touch()
    return home / "bin" / "python"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")

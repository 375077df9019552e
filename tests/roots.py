"""Debians in folders with newer RabbitMQs in them, for nodes that run beside this machine's own.

    python -m tests.roots 4.0 4.3    makes what is not there yet, and prints where each is

Packages come from this machine's own Debian mirror. Signatures and the age of the release files are not checked: this
is for tests, and an old snapshot of a mirror will do.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from mqworker.errors import HostUnfit, OutsideError
from mqworker.privatenode import find_programs

SUITES: Final = {"4.0": "trixie", "4.3": "sid"}  # sid moves on; what is in it is printed, and nothing depends on it
PACKAGES: Final = "rabbitmq-server,dash,coreutils,sed,grep,util-linux,base-files,libc-bin"
SECONDS: Final = 600.0
SOURCES: Final = Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d")


def chosen() -> Path | None:
    """Return where the RabbitMQ is that tests are to run with; None: on this machine itself.

    MQWORKER_TEST_RABBITMQ is a version (4.0, 4.3) or a folder.

    Raises:
        HostUnfit: it is not there.
    """
    what = os.environ.get("MQWORKER_TEST_RABBITMQ")
    root = find(what) if what else None
    find_programs(root)
    return root


def find(what: str) -> Path:
    """Return the root of a version, or of a path, if it is there.

    Raises:
        HostUnfit: it is not; the text says how to make it.
    """
    root = _place(what)
    try:
        find_programs(root)
    except HostUnfit as error:
        raise HostUnfit(f"{error}; `make test-rabbitmq4` makes those of {', '.join(SUITES)}") from error
    return root


def make(what: str) -> Path:
    """Return the root of a version, and make it before if need be.

    Raises:
        HostUnfit: a program is missing, or nobody says where Debian is.
        OutsideError: the mirror does not give the packages.
    """
    root = _place(what)
    if what not in SUITES or root.exists():
        return find(what)
    if shutil.which("mmdebstrap") is None:
        raise HostUnfit("expected mmdebstrap; install it with `apt-get install --no-install-recommends mmdebstrap`")
    began = time.monotonic()
    _tell(f"makes a Debian {SUITES[what]} with RabbitMQ in {root} (150 MB, about 20 s)")
    root.parent.mkdir(parents=True, exist_ok=True)
    made = root.with_name(f"{root.name}.{os.getpid()}")
    try:
        _bootstrap(SUITES[what], made)
        (made / "etc/hosts").write_text("127.0.0.1 localhost\n")
        made.rename(root)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    _tell(f"has made it in {time.monotonic() - began:.0f} s: RabbitMQ {version(root)}")
    return root


def version(root: Path) -> str:
    """Say which RabbitMQ is in a root."""
    found = [path.name for path in (root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*")]
    return found[0].removeprefix("rabbitmq_server-") if found else "of an unknown version"


def _place(what: str) -> Path:
    if what not in SUITES:
        return Path(what)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mqworker" / f"rabbitmq-{what}"


def _bootstrap(suite: str, root: Path) -> None:
    # An ordinary user gets the files as their own by way of an archive: in a folder they would be subordinate ids'.
    archive = root.with_name(f"{root.name}.tar")
    root_user = os.getuid() == 0
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=extract",
        f"--mode={'root' if root_user else 'unshare'}",
        f"--include={PACKAGES}",
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude=/usr/share/{unused}/*" for unused in ("man", "locale", "doc")),
        suite,
        str(root if root_user else archive),
        f"deb [trusted=yes] {_mirror()} {suite} main",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode != 0:
            raise OutsideError(
                f"expected Debian {suite} from this machine's mirror, but: {done.stderr.strip()[-1500:]}"
            )
        if not root_user:
            root.mkdir()
            subprocess.run(["tar", "-x", "-f", archive, "-C", root, "--no-same-owner", "--exclude=./dev/*"], check=True)
    except subprocess.TimeoutExpired as error:
        raise OutsideError(f"expected Debian {suite} from this machine's mirror within {SECONDS:.0f} s") from error
    finally:
        archive.unlink(missing_ok=True)


def _mirror() -> str:
    """Return the first address that this machine's apt has packages of Debian itself from."""
    files = [SOURCES[0], *sorted(SOURCES[1].glob("*.sources")), *sorted(SOURCES[1].glob("*.list"))]
    for file in files:
        text = file.read_text(errors="replace") if file.exists() else ""
        for line in text.splitlines():
            match = re.match(r"(?:URIs:|deb (?:\[[^\]]*\] )?)\s*(\S+)", line)
            if match and "security" not in match[1]:
                return match[1]
    raise HostUnfit("expected an address of Debian's packages in /etc/apt/sources.list or its folder, found none")


def _tell(text: str) -> None:
    sys.stderr.write(f"roots: {text}\n")


def main(wanted: list[str]) -> int:
    """Make what is wanted; exit code 3: something could not be had, and is said."""
    code = 0
    for what in wanted:
        try:
            root = make(what)
        except (HostUnfit, OutsideError) as error:
            _tell(f"RabbitMQ {what} could not be had, and nothing is tested with it: {error}")
            code = 3
        else:
            print(f"{what} {version(root)} {root}")  # noqa: T201  # a command
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

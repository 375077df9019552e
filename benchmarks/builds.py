"""What a build takes longer through mqworker than by plain sbuild on the same host.

    python -m benchmarks.builds                     the whole of it, as JSON
    python -m benchmarks.builds --rounds 1

By turns, the same source package with the same options, in the same chroot, on the same disk. Plain is sbuild from its
start to its end; ours is from the submission until the submitter knows the outcome, with what was built in the store
and in the ledger. The source is Debian's hello, or where no archive answers the small one that mqworker brings along.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.goals import Goal, goal_rows
from benchmarks.readme import head, middle, paragraph, row, times
from benchmarks.systems import Mqworker
from benchmarks.world import world
from mqworker import debianhost
from mqworker.client import Client
from mqworker.errors import MqworkerError
from mqworker.messages import RecordedArtifact
from tasks.debian import read_source_package

SOURCE: Final = "hello"
OFFLINE: Final = ("--no-apt-update", "--bd-uninstallable-explainer=none")
TIMEOUT: Final = 1800.0
PART: Final = 0.01  # longer, at most, of what plain sbuild takes, ...
SECONDS: Final = 1.0  # ... and so much more

Figures = dict[str, Any]


class Builds:
    """Build one source package in both ways."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._suite = debianhost.default_suite()
        self._architecture = debianhost.native_architecture()
        self._chroot = debianhost.ensure_chroot(self._suite, self._architecture, _say)
        self._made = 0
        self.options: Sequence[str] = ()
        try:
            self.dsc = debianhost.fetch_source(SOURCE, directory / "source", self._suite, _say)
        except MqworkerError as error:
            _say(f"the archive does not give {SOURCE} ({error}): takes a small source package")
            self.dsc = debianhost.write_sample_source(directory / "source")
            self.options = OFFLINE

    def imported(self, client: Client) -> RecordedArtifact:
        """Give the source package to the pool."""
        source = read_source_package(self.dsc)
        return client.import_artifact(source.category, source.name, source.data, source.files)

    def plain(self) -> float:
        """Build by sbuild alone; return the seconds."""
        self._made += 1
        home = self._directory / f"plain-{self._made}"
        temporary = home / "tmp"
        for made in (home, temporary):
            made.mkdir(mode=0o711)
        configuration = home / "sbuild.conf"
        configuration.write_text(f"$unshare_tmpdir_template = '{temporary}/chroot.XXXXXXXXXX';\n1;\n")
        command = (
            *("sbuild", "--verbose", "--chroot-mode=unshare", f"--chroot={self._chroot}", "--no-run-lintian"),
            *("--no-clean-source", "--arch-any", "--no-arch-all", "--no-source", f"--arch={self._architecture}"),
            *(f"--dist={self._suite}", "--bd-uninstallable-explainer=apt", *self.options, str(self.dsc)),
        )
        environment = {
            **os.environ,
            "HOME": str(home),
            "SBUILD_CONFIG": str(configuration),
            "TMPDIR": str(temporary),
            "LC_ALL": "C.UTF-8",
        }
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        took = time.monotonic() - began
        if done.returncode != 0 or not list(home.glob("*.deb")):
            raise RuntimeError(f"sbuild ended with {done.returncode}: {done.stdout[-2000:].decode(errors='replace')}")
        return took

    def ours(self, client: Client, source: int) -> float:
        """Build through the pool; return the seconds."""
        data = {
            "input": {"source_artifact_id": source},
            "distribution": self._suite,
            "host_architecture": self._architecture,
            "sbuild_options": list(self.options),
        }
        began = time.monotonic()
        [view] = client.wait([client.submit("sbuild", data)], timeout=TIMEOUT)
        took = time.monotonic() - began
        if view.state != "success" or not any(one.category == "debian:binary-package" for one in view.artifacts):
            raise RuntimeError(f"expected a build that succeeds, got {view.state}: {view.reason}")
        return took


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def run(given: argparse.Namespace) -> Figures:
    """Measure, and put it together."""
    plain, ours = [], []
    with world(()) as shared, shared.place("builds") as place, Mqworker(place) as system, system.client() as client:
        builds = Builds(place.directory)
        system.start_workers()
        system.await_agents(client, 1)
        source = builds.imported(client)
        builds.plain()  # what is read from the disk for the first time is so in neither
        for _ in range(given.rounds):
            plain.append(builds.plain())
            ours.append(builds.ours(client, source.id))
            print(f"plain {plain[-1]:.2f} s, ours {ours[-1]:.2f} s", file=sys.stderr)
    return {"source": builds.dsc.name, "plain": plain, "ours": ours}


def table(found: Figures) -> str:
    """Write the figures down."""
    plain = median(found["plain"])
    longer = median(ours - alone for ours, alone in zip(found["ours"], found["plain"], strict=True))
    goal = Goal(
        f"a build takes longer than by plain sbuild ({PART:.0%} and {SECONDS:g} s are allowed)",
        round(plain * PART + SECONDS, 2),
        at_least=False,
        unit="s",
    )
    words = (
        f"A real build of {found['source']} through mqworker, from the submission until the submitter knows the "
        f"outcome, beside plain sbuild with the same options, by turns, {len(found['plain'])} of each:"
    )
    lines = [
        *paragraph(words),
        "",
        *goal_rows([(goal, longer)]),
        "",
        *head("build", "against plain", "seconds"),
        row("through mqworker", times((plain + longer) / plain), middle(found["ours"], 2)),
        row("plain sbuild", times(1.0), middle(found["plain"], 2)),
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.builds", description=__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--quick", action="store_const", const=1, dest="rounds", help="one round")
    return made


def main() -> None:
    """Measure, and print JSON."""
    print(json.dumps(run(parser().parse_args()), indent=1))


if __name__ == "__main__":
    main()

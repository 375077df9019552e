"""What a run leaves to be judged: gathered from disk and from the ledger's tables; judged elsewhere."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field

from tests.chaos.record import read

MISDEEDS = ("Traceback (most recent call last)", "Task exception was never retrieved", "never awaited")


@dataclass
class Evidence:
    """Hold everything that is known of a run; times are `wall` in seconds and `ns` of CLOCK_BOOTTIME."""

    sent: dict = field(default_factory=dict)  # id to the request as it was first sent
    receipts: list = field(default_factory=list)  # {id, status, wall}
    retried: dict = field(default_factory=dict)  # id of a new request to that of the old one, whether or not confirmed
    commands: list = field(default_factory=list)  # what the commander sent and was answered, in order
    journal: list = field(default_factory=list)
    beats: dict = field(default_factory=dict)  # token to the last sign of life of its run or children, in ns
    tables: dict = field(default_factory=dict)  # as tests.chaos.audit.TABLES names them
    uncounted: list = field(
        default_factory=list
    )  # {request, attempt, worker}: outcomes that a worker was told do not count
    misdeeds: list = field(default_factory=list)  # what no party should have said or done
    left: list = field(default_factory=list)  # what should not be there any more
    spoilt: list = field(default_factory=list)  # artifacts' files that the store does not have as they were recorded
    frozen: list = field(default_factory=list)  # (pids, from, to): they were frozen
    hurt: list = field(default_factory=list)  # (worker or None for all, from, to): an outcome may have died unspooled


def gather(world):
    """Read what is on disk."""
    evidence = Evidence(tables=world.audit.tables())
    records = world.directory / "record"
    for path in sorted(records.glob("s*.jsonl")):
        for line in read(path):
            if line["what"] == "sent":
                evidence.sent.setdefault(line["request"]["id"], line["request"])
            elif line["what"] == "receipt":
                evidence.receipts.append(line)
    evidence.commands = read(records / "commander.jsonl")
    evidence.retried = {line["new"]: line["old"] for line in evidence.commands if line["what"] == "retry"}
    evidence.journal = read(world.box / "journal")
    for path in (world.box / "beats").iterdir():
        token = path.name.partition(".")[0]
        with suppress(ValueError):  # killed between making the file and the first beat
            evidence.beats[token] = max(evidence.beats.get(token, 0), int(path.read_text()))
    for path in sorted((world.directory / "logs").glob("*.log")):
        _read_log(path, evidence)
    _read_harness(read(records / "harness.jsonl"), evidence)
    evidence.spoilt = _spoilt(evidence.tables["files"], world.directory / "store")
    return evidence


def _read_log(path, evidence):
    for line in path.read_text(errors="replace").splitlines():
        if any(misdeed in line for misdeed in MISDEEDS):
            evidence.misdeeds.append(f"{path.name}: {line[:2000]}")
        elif '"an outcome does not count"' in line:
            with suppress(json.JSONDecodeError):
                evidence.uncounted.append({"worker": path.stem, **json.loads(line)})


def _read_harness(lines, evidence):
    harms = {}
    full = []  # when there was no room for state directories
    ends = []
    for line in lines:
        if line["what"] == "harm":
            harms[line["number"]] = line
        elif line["what"] == "heal" and line["number"] in harms:
            harm = harms.pop(line["number"])
            if "pids" in harm:
                evidence.frozen.append((harm["pids"], harm["wall"], line["wall"]))
            if line["scope"] == "worker" or line["target"] == "state":
                worker = line["target"] if line["scope"] == "worker" else None
                evidence.hurt.append((worker, harm["wall"], line["wall"]))
            if line["target"] == "state":
                full.append((harm["wall"], line["wall"]))
        elif line["what"] == "ended":
            evidence.hurt.append((line["party"], line["wall"], line["wall"]))
            ends.append(line)
    # 4: the world outside is unwell. Whoever ends so is to be started again; any other end is somebody's mistake.
    for line in ends:
        if line["by_us"] is None and line["exit"] not in {0, 4, -9} and not _had_no_room(line, full):
            evidence.misdeeds.append(f"{line['party']} ended by itself with exit code {line['exit']}")


def _had_no_room(end, full):
    """Say whether it was a worker that could not begin, because its state directory had no room; that has code 3."""
    return (
        end["exit"] == 3 and end["party"].startswith("w") and any(since <= end["wall"] <= to + 1 for since, to in full)
    )


def _spoilt(files, store):
    spoilt = []
    digests = {}
    for file in files:
        sha256 = file["sha256"]
        if sha256 not in digests:
            found = [*store.glob(f"**/{sha256}")]
            digests[sha256] = hashlib.sha256(found[0].read_bytes()).hexdigest() if found else None
        if digests[sha256] != sha256:
            spoilt.append(f"artifact {file['artifact']}: {sha256} is {digests[sha256] or 'not there'}")
    return spoilt

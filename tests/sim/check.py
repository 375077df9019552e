"""The promises, checked from outside: by messages, the ledger's file, the slots and the plain programs alone."""

import copy
import json
import sqlite3
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from mqworker.messages import Outcomes, Receipt, Report, Submit, Tickets, Verdict, decode
from tests.sim import programs
from tests.sim.loop import START

FINAL = frozenset({"success", "failure", "error", "aborted", "rejected"})
LEGAL = {
    None: {"pending", "rejected", "aborted"},
    "pending": {"offered", "aborted"},
    "offered": {"pending", "running", "aborted"},
    "running": {"pending", "success", "failure", "error", "aborted"},
}
REFS = ("running", "claiming", "unsettled", "void")
IDLE_SECONDS = 0.1  # P5
DOUBT = 0.1  # seconds in which it is known of each request what its class is
STALE_MARGIN = 5.0
EXPIRY_SECONDS = 2.0  # a look of the scheduler's, and two sets
MOST_BEYOND = 4.0  # seconds that a run may take beyond its timeout and its grace, in its slot
MOST_STEPS = 400_000
ROWS = (
    "SELECT id, seq, state, attempt, tried, worker, token, priority, not_before, reason, grp, ckey, unmet, bound, body"
    " FROM requests"
)
HELD = ("offered", "running")
MADE = "SELECT id FROM artifacts WHERE request = ? AND attempt = ? AND category = ?"
ATTEMPTS = "SELECT request, number, token, worker, result, counted, late FROM attempts"


class Violation(NamedTuple):
    promise: str
    text: str


class Row(NamedTuple):
    """A request as the ledger's file has it."""

    id: str
    seq: int
    state: str
    attempt: int
    tried: int
    worker: str | None
    token: str | None
    priority: int
    not_before: float | None
    reason: str | None
    grp: str
    ckey: str | None
    unmet: int
    bound: str | None
    body: str


class Facts(NamedTuple):
    """What a worker has said of itself."""

    at: float  # when the scheduler's process got it
    version: int
    metadata: dict
    tasks: dict


@dataclass
class Turn:
    """One set that the scheduler has committed, with offers in it."""

    offers: list
    accepted: dict  # id to its place among the writes
    places: dict  # offered id to its place
    before: dict
    after: dict
    previous: float  # when the set before it was committed
    judged_at: float  # before this
    first: bool  # of its scheduler
    paused: frozenset  # when it was judged: (kind, name)
    tries: list = field(default_factory=list)  # offers, those that the ledger declined too
    queues: dict = field(default_factory=dict)


class Check:
    """Watch everything, and remember the first promise that is broken."""

    def __init__(self, world):
        self.world = world
        self.loop = world.loop
        self.violation = None
        self.rows = {}
        self.requests = {}  # id to the request as it was submitted
        self.touched = {}  # request or host's name to when something last happened to it
        self.alive = {}  # request to {token: host's name} of its runs
        self.began = {}  # token to when its run began
        self.killed = set()  # tokens of runs that did not end by themselves, nor by their lease
        self.aborts = set()  # requests that somebody has wanted to be stopped
        self.alone = set()  # (request, attempt) that nothing may run beside
        self.outcomes = {}  # token to the outcome that was spooled
        self.claims = {}  # token to the metadata versions it was claimed with
        self.said = {}  # (worker, version) to Facts: all that was ever said
        self.facts = {}  # worker to what the scheduler of now was told
        self.assigned = {}  # worker to queue, by the scheduler of now
        self.heard = {}  # worker's process to (term, queue): the newest word it has had
        self.tickets = {}  # host to deliveries in hand
        self.refused = {}  # request to {(worker, version): tokens} of refusals that the scheduler has settled
        self.due = {}  # request to when its delay is over
        self.turn = None
        self.committed_at = 0.0
        self.offered_at = {}
        self.receipts = set()
        self.terms = 0
        self._answers = {}
        self._file = None
        self._news = 0  # rises with everything that may change who is eligible
        self._eligible = {}  # host's name to (news, rows)
        self.paused = frozenset()  # (kind, name), by the ledger
        self._first_turn = True
        self._doubts = {}  # request to when and how a worse one was preferred to it
        self._bound = {}  # request to its data with what it has taken from others
        self._brief = {}

    # ------------------------------------------------------------ telling

    def fail(self, promise, text):
        if self.violation is None:
            self.violation = Violation(promise, text)
            self.world.note("CHECK", f"{promise}: {text}")
            self.loop.stopped = True

    def _tell(self, process, how, parts):
        """Note a message, unless it says the same as the one before."""
        text = f"{how}: {_brief(parts)}"
        if self._brief.get(text.partition(":")[0] + process.name) != text:
            self._brief[text.partition(":")[0] + process.name] = text
            self.world.note(process.name, text)

    def _touch(self, name):
        self.touched[name] = self.loop.now
        self._news += 1

    def can_run(self, request, metadata, tasks, key):
        """Ask the program of a request about a worker; `key` stands for the worker's facts."""
        known = self._answers.get((request.id, key))
        if known is None:
            known = request.task in tasks and programs.says(
                request.task, self.data(request), metadata, request.requires
            )
            self._answers[request.id, key] = known
        return known

    def data(self, request):
        """Return the data that a run of a request gets: with what it takes, once that is known."""
        return self._bound.get(request.id, request.data)

    def upgraded(self):
        """Forget what tasks of other code have said."""
        self._answers.clear()
        self._news += 1

    def pure(self, request):
        return not programs.Task._sub_tasks[request.task].hidden

    # ------------------------------------------------------------ the ledger

    def open(self, path):
        self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def close(self):
        self._file.close()

    def read(self):
        return {row[0]: Row(*row) for row in self._file.execute(ROWS)}

    def attempts(self):
        return {(row[0], row[1]): row for row in self._file.execute(ATTEMPTS)}

    def opened(self, term):
        """Take the start of a scheduler."""
        if term <= self.terms:
            self.fail("term", f"a new scheduler has term {term}, after {self.terms}")
        self.terms = term
        self.facts.clear()
        self.assigned.clear()
        self.refused.clear()  # a scheduler remembers them, and the ledger does not
        self.turn = None
        self._first_turn = True
        self._doubts.clear()
        self.committed_at = self.loop.now
        wall = self.world.scheduler_wall()
        for row in self.rows.values():
            if row.not_before is not None:
                later = self.loop.now + max(0.0, row.not_before - wall)
                self.due[row.id] = max(self.due.get(row.id, 0.0), later)

    def committed(self, writes, results, judged_at):
        """Take a set that was committed, with its results; it was judged before `judged_at`."""
        before, after = self.rows, self.read()
        self.rows = after
        turn = Turn(
            offers=[],
            accepted={},
            places={},
            before=before,
            after=after,
            previous=self.committed_at,
            judged_at=judged_at,
            first=self._first_turn,
            paused=self.paused,
        )
        self._first_turn = False
        for place, (write, result) in enumerate(zip(writes, results, strict=True)):
            match type(write).__name__:
                case "Accept":
                    turn.accepted.setdefault(write.request.id, place)
                case "Offer":
                    turn.tries.append((write, result))
                    if result:
                        turn.offers.append(write)
                        turn.places[write.request] = place
                        self.offered_at[write.request] = self.loop.now
                        self._offered(write.request, turn)
                case "Rekey":
                    for id_ in [id_ for id_ in self._doubts if after[id_].seq in write.to]:
                        del self._doubts[id_]  # its class was divided, and none could know whether it was better
                case "Pause":
                    self._paused(self.paused | {(write.kind, write.name)})
                case "Resume":
                    self._paused(self.paused - {(write.kind, write.name)})
                case "Grant" if result == "granted":
                    self._granted(write, turn)
                case "End" if result.state is not None:
                    self._ended_in_ledger(write, before.get(write.request), after.get(write.request))
        for id_, row in after.items():
            old = before.get(id_)
            if old is None or old != row:
                self._changed(old, row, turn)
        for id_ in before:
            if id_ not in after:
                self.fail("P1", f"request {id_} is gone from the ledger")
        self._check_limits()
        self._check_needs(before)
        self.turn = turn if turn.offers else None
        self.committed_at = self.loop.now

    def _changed(self, old, row, turn):
        self._touch(row.id)
        if row.ckey is not None:
            self._touch(("key", row.ckey))
        state = None if old is None else old.state
        if self.world.trace is not None:
            self.world.note("ledger", f"{row.id[-4:]} {state} -> {row.state} attempt {row.attempt} on {row.worker}")
        if state in FINAL:
            self.fail("P3", f"request {row.id} was final ({old}) and is now {row}")
        elif state != row.state and row.state not in LEGAL[state] and not self._legal_in_one(state, row, turn):
            self.fail("P3", f"request {row.id} went from {state} to {row.state}")
        if old is not None and (row.attempt < old.attempt or row.tried < old.tried):
            self.fail("P3", f"request {row.id} went back to attempt {row.attempt}, tried {row.tried}, from {old}")
        if row.state in FINAL - {"success"} and not (row.reason and json.loads(row.reason).get("text")):
            self.fail("P3", f"request {row.id} is {row.state} without a reason")
        if row.state == "aborted" and state != "aborted" and json.loads(row.reason).get("stage") == "expiry":
            self._expired(row)
        if row.state in FINAL and row.state != "rejected":
            for token in self.alive.get(row.id, {}):
                self.fail("P2", f"request {row.id} is {row.state}, but its run {token} lives")
        if row.not_before is not None and (old is None or old.not_before != row.not_before):
            self.due[row.id] = self.loop.now + row.not_before - self.world.scheduler_wall()

    def _expired(self, row):
        expires_at = self.requests[row.id].expires_at
        if expires_at is None or (expires_at > self.world.scheduler_wall() and not self.world.clock_steps()):
            self.fail("expiry", f"{row.id} has expired at {expires_at}: {row.reason}")

    def _is_over(self, row):
        """Say whether it is too late to grant a request."""
        expires_at = self.requests[row.id].expires_at
        return expires_at is not None and expires_at <= self.world.scheduler_wall()

    @staticmethod
    def _legal_in_one(state, row, turn):
        """Several moves of one request can be in one set."""
        reached = {state}
        for _ in range(6):
            reached |= {to for at in reached for to in LEGAL.get(at, ())}
        return row.state in reached and (state is not None or row.id in turn.accepted)

    # ------------------------------------------------------------ pauses, limits and needs

    def _paused(self, paused):
        for kind, name in paused ^ self.paused:
            self._touch((kind, name))
        self.paused = paused

    def _is_paused(self, row, paused):
        """Say whether nothing of a request may be offered, on whichever worker."""
        return ("task", self.requests[row.id].task) in paused or ("group", row.grp) in paused

    def limit(self, key):
        limits = self.world.scenario.limits
        return limits.get(key, limits.get("*", 1))

    def held(self, rows):
        """Count by key and by group what is offered and running."""
        keys, groups = {}, {}
        for row in rows.values():
            if row.state in HELD:
                keys[row.ckey] = keys.get(row.ckey, 0) + 1
                groups[row.grp] = groups.get(row.grp, 0) + 1
        return keys, groups

    def _check_limits(self):
        for key, number in self.held(self.rows)[0].items():
            if key is not None and number > self.limit(key):
                self.fail("limit", f"{number} requests with the key {key} are offered or run, of {self.limit(key)}")

    def needs(self, request):
        """Return what a request needs of others, by their ids."""
        found = {}
        for after in request.after:
            found[after.request] = "success" if "success" in (after.need, found.get(after.request)) else "end"
        return found | dict.fromkeys((take.request for take in request.take), "success")

    def _taken(self, request):
        """Return what a request takes, by the place in its data; None: it cannot be had."""
        taken = {}
        for take in request.take:
            made = self._file.execute(MADE, (take.request, self.rows[take.request].attempt, take.category)).fetchall()
            if len(made) != 1:
                return None
            taken[take.into] = made[0][0]
        if any(not isinstance(request.data.get("deep", {}), dict) for _ in taken):
            return None
        return taken

    def _check_needs(self, before):
        """Check that what needs others waits for them, and no longer than it must."""
        for row in self.rows.values():
            old = before.get(row.id)
            request = self.requests[row.id]
            if not (request.after or request.take) or row.state == "rejected":
                continue
            if row.state in FINAL and (old is None or old.state in FINAL):
                continue
            needs = self.needs(request)
            gone = [id_ for id_ in needs if id_ not in self.rows]
            if gone:
                self.fail("needs", f"{row.id} was accepted, and nobody knows {gone}, which it needs")
                return
            open_ = [id_ for id_ in needs if self.rows[id_].state not in FINAL]
            failed = [
                id_
                for id_, need in needs.items()
                if id_ not in open_ and need == "success" and self.rows[id_].state != "success"
            ]
            ended = {take.request for take in request.take} - set(open_) - set(failed)
            known = [take for take in request.take if take.request in ended]
            taken = self._taken(msgspec.structs.replace(request, take=known))
            stage = None if row.reason is None else json.loads(row.reason).get("stage")
            if row.state == "aborted":
                if stage in ("after", "take") and not failed and taken is not None:
                    self.fail("needs", f"{row.id} was given up, and has all that it needs: {row.reason}")
            elif failed or taken is None:
                self.fail("needs", f"{row.id} is {row.state}, and cannot have what it needs: {failed or 'takes'}")
            elif row.state != "pending" and open_:
                self.fail("needs", f"{row.id} is {row.state}, and {open_} that it needs have not ended")
            elif row.unmet != len(open_):
                self.fail("needs", f"{row.id} needs {open_} still, and the ledger says {row.unmet}")
            elif not open_ and row.id not in self._bound:
                if json.loads(row.bound or "{}") != taken:
                    self.fail("needs", f"{row.id} takes {taken}, and the ledger has put {row.bound} into it")
                self._bound[row.id] = _filled(request.data, taken)

    def _offered(self, id_, turn):
        row = turn.after[id_]
        if self._is_paused(row, turn.paused):
            self.fail("paused", f"{id_} was offered, but {sorted(turn.paused)} are paused")
        begins = self.requests[id_].not_before
        if begins is not None and not self.world.clock_steps() and begins > self.world.scheduler_wall():
            self.fail("not before", f"{id_} was offered before {begins}")

    def _granted(self, write, turn):
        request = self.requests[write.request]
        row = turn.after[write.request]
        if self._is_paused(row, turn.paused) or ("worker", write.worker) in turn.paused:
            self.fail("paused", f"{write.request} was granted to {write.worker}, but {sorted(turn.paused)} are paused")
        if request.expires_at is not None and write.at >= request.expires_at:
            self.fail("expiry", f"{write.request} was granted at {write.at}, and expired at {request.expires_at}")
        versions = sorted(self.claims.get(write.token, ()))
        said = [self.said[write.worker, version] for version in versions]
        if not any(self.can_run(request, one.metadata, one.tasks, (write.worker, one.version)) for one in said):
            self.fail("P6", f"{write.request} was granted to {write.worker}, whose metadata {said} it refuses")

    def _ended_in_ledger(self, write, old, row):
        if old is not None and old.state == "running" and old.token != write.token:
            self.fail("P3", f"the outcome of run {write.token} ended {write.request}, which run {old.token} has")
        if write.token in self.alive.get(write.request, {}) and row.state != "running":
            name = self.alive[write.request][write.token]
            self.fail("P2", f"{write.request} has ended ({write.result}) in the ledger while it runs on {name}")
        calm = self.world.calm or self.began.get(write.token, 0.0) > self.world.quiet_from
        if write.result == "lost" and calm and write.token not in self.killed:
            self.fail("P2", f"run {write.token} of {write.request} was lost in a healthy pool: {write.reason}")

    # ------------------------------------------------------------ slots

    def started(self, host, order):
        """Take the order to start a run, at the moment that the agent gives it."""
        request = self.requests[order.request.id]
        self._touch(host.name)
        if order.request.data != self.data(request) or order.request.task != request.task:
            self.fail("P1", f"{request} became {order.request}")
        able = programs.says(request.task, self.data(request), host.seen[0], request.requires)
        if not able or request.task not in host.seen[1] or request.task in host.denied:
            self.fail("P6", f"{request.id} starts on {host.name}, which it refuses: {host.seen[0]}")
        if self.pure(request) is False and host.name in programs.Task._sub_tasks[request.task].hidden:
            self.fail("P6", f"{request.id} starts on {host.name}, which refuses it by its own view")
        if order.deadline_ns <= host.boottime_ns():
            self.fail("P2", f"{request.id} starts on {host.name} behind its lease")

    def runs_now(self, host, order):
        """Take the start of a run in a slot."""
        self._touch(host.name)
        id_, token = order.request.id, order.directory
        others = self.alive.setdefault(id_, {})
        if others:
            self.fail("P2", f"{id_} starts as {token} on {host.name} while it runs: {others}")
        self._check_alone(host, order)
        others[token] = host.name
        self.began[token] = self.loop.now
        self.world.note(host.name, f"runs {id_[-4:]} as {token}")

    def _check_alone(self, host, order):
        """Check that nothing runs beside what has to be alone; one run is begun and not in the list yet."""
        beside = [id_ for id_, runs in self.alive.items() for name in runs.values() if name == host.name]
        if (order.request.id, order.attempt) in self.alone and beside:
            self.fail("alone", f"{order.request.id} has to be alone on {host.name}, and {beside} run there")
        for id_ in beside:
            if (id_, self.rows[id_].attempt) in self.alone and self.rows[id_].state == "running":
                self.fail("alone", f"{order.request.id} starts on {host.name} beside {id_}, which has to be alone")

    def _check_time(self, host, order):
        """Check that a run was not longer than it may, with its grace and what slots have beyond it."""
        timeout = self.requests[order.request.id].timeout
        took = (self.loop.now - self.began[order.directory]) * (1 + host.drift)
        if timeout is not None and took > timeout + programs.Generated.TERMINATE_GRACE + MOST_BEYOND:
            self.fail(
                "timeout", f"{order.directory} of {order.request.id} took {took:.3f} s of {timeout} on {host.name}"
            )

    def ended(self, host, order, word, *, lapsed=False):
        """Take the end of a run in a slot; no word: it was killed, or it has lapsed."""
        self._touch(host.name)
        self._check_time(host, order)
        self.alive.get(order.request.id, {}).pop(order.directory, None)
        if word is None and not lapsed:
            self.killed.add(order.directory)
        self.world.note(host.name, f"has ended {order.directory}: {'killed' if word is None else word.result}")

    def spooled(self, outcome):
        self.outcomes[outcome.token] = outcome
        request = self.requests[outcome.request]
        if outcome.result == "aborted" and outcome.request not in self.aborts:
            self.fail("P3", f"{outcome} was aborted, and nobody has asked for that")
        if outcome.reason is not None and outcome.reason.status == "timeout":
            ran = self.loop.now - self.began[outcome.token]
            if outcome.result != "error" or request.timeout is None or ran < request.timeout * 0.99:
                self.fail("timeout", f"{outcome} of {request}, which ran for {ran:.3f} s")

    def unspooled(self, host, ref):
        outcome = self.outcomes[ref.token]
        fault = self._unrecorded(outcome, self.attempts())
        if fault is not None:
            self.fail("P4", f"{host.name} lets go of an outcome that the ledger does not have: {fault}")

    @staticmethod
    def _unrecorded(outcome, attempts):
        row = attempts.get((outcome.request, outcome.attempt))
        if row is None or row[2] != outcome.token:
            return f"no attempt of {outcome}"
        if row[4] == outcome.result or (row[4] == "lost" and row[6] is not None):
            return None
        if row[4] == "error" and outcome.artifacts:
            return None
        return f"{row} of {outcome}"

    # ------------------------------------------------------------ messages

    def published(self, process, message):
        """Take what a process sends, at the moment that it does."""
        world = self.world
        match message.kind:
            case "tickets":
                for ticket in decode(message.body, Tickets).tickets:
                    self._check_ticket(ticket)
                    if self.turn is not None:
                        self.turn.queues[ticket.request.id, ticket.attempt] = message.key
                        self.loop.after_step = self._judge_turn
                    if world.trace is not None:
                        world.note(process.name, f"offers {ticket.request.id[-4:]}/{ticket.attempt} in {message.key}")
            case "verdict":
                verdict = decode(message.body, Verdict)
                worker = message.key.partition(".")[0]
                for part in verdict.parts:
                    kind = type(part).__name__
                    if kind == "Assign":
                        self.assigned[worker] = part.queue
                        self._touch(worker)
                    elif kind == "Void" and part.reason == "refused":
                        for version in self.claims.get(part.token, ()):
                            runs = self.refused.setdefault(part.request, {}).setdefault((worker, version), set())
                            runs.add(part.token)
                if world.trace is not None:
                    self._tell(process, f"tells {message.key}", verdict.parts)
            case "report":
                report = decode(message.body, Report)
                for part in report.parts:
                    kind = type(part).__name__
                    if kind in ("Claim", "Refusal"):
                        self.claims.setdefault(part.token, set()).add(part.metadata_version)
                    elif kind == "Hello":
                        self.said[report.worker, part.metadata_version] = Facts(
                            self.loop.now, part.metadata_version, part.metadata, part.tasks
                        )
                if world.trace is not None:
                    self._tell(process, "reports", report.parts)
            case "outcomes":
                outcomes = decode(message.body, Outcomes).outcomes
                for outcome in outcomes:
                    if outcome.token not in world.hosts[process.name].spool:
                        self.fail("P4", f"{process.name} sends {outcome}, which is not on its disk")
                if world.trace is not None:
                    world.note(process.name, f"outcomes {[(one.token, one.result) for one in outcomes]}")

    def _check_ticket(self, ticket):
        """Check that the last attempt of what was lost each time is alone, and no other."""
        counted = [
            row[4]
            for (id_, number), row in sorted(self.attempts().items())
            if id_ == ticket.request.id and number < ticket.attempt and row[5] and row[4] not in (None, "handed_back")
        ]
        last = bool(counted) and len(counted) + 1 == self.requests[ticket.request.id].max_attempts
        if ticket.alone != (last and set(counted) == {"lost"}):
            self.fail("alone", f"{ticket} behind attempts that ended {counted}")
        if ticket.alone:
            self.alone.add((ticket.request.id, ticket.attempt))

    def delivered(self, process, delivery):
        """Take what a process gets, at the moment that it does."""
        match delivery.kind:
            case "tickets":
                self.tickets.setdefault(process.name, set()).add((delivery.epoch, delivery.tag))
                self._touch(process.name)
            case "verdict":
                verdict = decode(delivery.body, Verdict)
                term, queue, _ = self.heard.get(process, (0, None, None))
                if verdict.term >= term:
                    for part in verdict.parts:
                        if type(part).__name__ == "Assign":
                            queue = part.queue
                    self.heard[process] = (verdict.term, queue, delivery.epoch)
            case "report" if process.role == "scheduler":
                report = decode(delivery.body, Report)
                for part in report.parts:
                    if type(part).__name__ == "Hello":
                        facts = Facts(self.loop.now, part.metadata_version, part.metadata, part.tasks)
                        known = self.facts.setdefault(report.worker, [])
                        if not known or known[-1].version <= facts.version:
                            if not known or known[-1].version != facts.version:
                                self._touch(report.worker)
                            known.append(facts)
                            del known[:-100]  # a set may have been judged long before it could be committed

    def consumes(self, process, queue):
        """Take that a worker begins to consume."""
        term, assigned, _ = self.heard.get(process, (0, None, None))
        if queue != assigned:
            self.fail("term", f"{process.name} consumes {queue}, but the newest word, of term {term}, was {assigned}")

    def settled(self, process, delivery, acked):
        """Take that a process acknowledges a message, or gives it back."""
        match delivery.kind:
            case "tickets":
                self.tickets.setdefault(process.name, set()).discard((delivery.epoch, delivery.tag))
                self._touch(process.name)
            case "submit" if acked:
                for request in decode(delivery.body, Submit).requests:
                    if request.id not in self.rows:
                        self.fail("P1", f"a submission of {request.id} is acknowledged, but not in the ledger")
            case "outcomes" if acked:
                attempts = self.attempts()
                for outcome in decode(delivery.body, Outcomes).outcomes:
                    fault = self._unrecorded(outcome, attempts)
                    if fault is not None:
                        self.fail("P4", f"an outcome is acknowledged, but not in the ledger: {fault}")

    def put_aside(self, process, delivery, reason):
        self.fail("wire", f"{process.name} could not read {delivery.kind}: {reason}")

    def receipted(self, receipt: Receipt):
        for one in receipt.results:
            self.receipts.add(one.id)
            if one.id not in self.rows:
                self.fail("P1", f"{one} was receipted, but is not in the ledger")
            elif (self.rows[one.id].state == "rejected") != (one.status == "rejected"):
                self.fail("P1", f"{one} was receipted, but the ledger has {self.rows[one.id]}")

    # ------------------------------------------------------------ P8, and matching

    def _possible(self, worker, turn):
        """Return what the scheduler may have known of a worker when it judged a turn."""
        known = self.facts.get(worker, ())
        before = [facts for facts in known if facts.at <= turn.previous]
        return [*before[-1:], *(facts for facts in known if facts.at > turn.previous)]

    def _judge_turn(self):
        turn, self.turn = self.turn, None
        if turn is None:
            return
        members = {}
        for worker, queue in self.assigned.items():
            members.setdefault(queue, []).append(worker)
        waiting = {
            id_: row
            for id_, row in turn.after.items()
            if row.state == "pending" and self._waits(turn.before.get(id_), row, turn)
        }
        for offer in turn.offers:
            waiting[offer.request] = turn.after[offer.request]
        keys, groups = self.held(turn.before)
        for offer, well in turn.tries:
            row = turn.after.get(offer.request)
            if row is None:
                continue
            if well:
                waiting.pop(offer.request)
                self._judge_offer(offer, turn, members=members, waiting=waiting, keys=keys, groups=groups)
            keys[row.ckey] = keys.get(row.ckey, 0) + 1
            groups[row.grp] = groups.get(row.grp, 0) + 1

    def _judge_offer(self, offer, turn, *, members, waiting, keys, groups):
        row = self._as_judged(turn.after[offer.request], turn)
        queue = turn.queues.get((offer.request, offer.attempt))
        workers = members.get(queue, [])
        facts = {worker: self._possible(worker, turn) for worker in workers}
        self._judge_refusals(row, queue, facts)
        if queue is None or not workers or not self.pure(self.requests[row.id]):
            return
        self._judge_match(row, queue, facts)
        shares = None if turn.first else {name: number / self._weight(name) for name, number in groups.items()}
        for each in waiting.values():
            other = self._as_judged(each, turn)
            if other.ckey is not None and keys.get(other.ckey, 0) >= self.limit(other.ckey):
                continue
            if self._is_paused(other, turn.paused):
                continue
            if self._better(other, row, shares) and self._all_can(other, facts) and self._known(other, offer, turn):
                text = (
                    f"{row.id} (priority {row.priority}, group {row.grp}, seq {row.seq}) was offered in {queue} while"
                    f" the better {other.id} (priority {other.priority}, group {other.grp}, seq {other.seq}) waited;"
                    f" shares {shares}"
                )
                self.world.note("CHECK", text)
                self._doubts.setdefault(other.id, (self.loop.now, text))

    def _waits(self, old, row, turn):
        if row.not_before is not None and not self._is_due(row, self.loop.now - turn.judged_at):
            return False
        request = self.requests[row.id]
        if self._is_over(row):
            return False
        if old is None:
            return row.id in turn.accepted and not (request.after or request.take)
        return old.state == "pending" and not old.unmet

    def _as_judged(self, row, turn):
        """Return a request with the priority that it had when a set was judged."""
        old = turn.before.get(row.id)
        return row if old is None else row._replace(priority=old.priority)

    def _weight(self, group):
        weights = self.world.scenario.weights
        return weights.get(group, weights.get("*", 1.0))

    def _is_due(self, row, ago=0.0):
        """Say whether a request's delay is surely over, or was some time ago."""
        margin = ago + 1.0
        return (
            self.due.get(row.id, 0.0) + margin < self.loop.now and row.not_before + margin < self.world.scheduler_wall()
        )

    @staticmethod
    def _better(other, row, shares):
        """Say whether one is surely better; of groups with equal shares either may be, and at first none is known."""
        if other.priority != row.priority:
            return other.priority > row.priority
        if other.grp == row.grp:
            return other.seq < row.seq
        return shares is not None and shares.get(other.grp, 0.0) < shares.get(row.grp, 0.0)

    @staticmethod
    def _known(other, offer, turn):
        return turn.accepted.get(other.id, -1) < turn.places[offer.request]

    def _all_can(self, row, facts):
        request = self.requests[row.id]
        if not self.pure(request) or any(worker in facts for worker, _ in self.refused.get(row.id, ())):
            return False
        return all(
            possible and all(self.can_run(request, one.metadata, one.tasks, (worker, one.version)) for one in possible)
            for worker, possible in facts.items()
        )

    def _judge_match(self, row, queue, facts):
        request = self.requests[row.id]
        able = {
            worker: [one for one in possible if self.can_run(request, one.metadata, one.tasks, (worker, one.version))]
            for worker, possible in facts.items()
        }
        if all(facts.values()) and not any(able.values()):
            self.fail("match", f"{row.id} was offered in {queue}, of whose workers {sorted(facts)} none can run it")

    def _judge_refusals(self, row, queue, facts):
        refused = self.refused.get(row.id, {})
        for worker, possible in facts.items():
            # Once may be in vain: the offer was taken back before the refusal came.
            if len(possible) == 1 and len(refused.get((worker, possible[0].version), ())) > 1:
                self.fail("match", f"{row.id} was offered in {queue}, to {worker}, which has refused it twice")

    # ------------------------------------------------------------ P5, and what must not stay as it is

    def look(self):
        """Look for an idle slot beside a request that it could run, in a quiet pool."""
        now = self.loop.now
        quiet = self.world.quiet_from
        for since, text in self._doubts.values():
            if since + DOUBT < now:
                self.fail("P8", text)
        if self.loop.steps > MOST_STEPS:
            self.fail("steps", f"the pool has made {self.loop.steps} steps, and does not come to rest")
        if now < quiet + IDLE_SECONDS:
            return
        for host in self.world.hosts.values():
            self._look_at(host, quiet)
        for row in self.rows.values():
            if row.state == "offered":
                since = max(self.touched[row.id], quiet)
                if now - since > self.world.scenario.offer_timeout + STALE_MARGIN:
                    self.fail("credit", f"{row.id} is offered since {self.offered_at.get(row.id)}, and nobody takes it")
            if row.state in ("pending", "offered") and now > max(quiet, self.touched[row.id]) + EXPIRY_SECONDS:
                expires_at = self.requests[row.id].expires_at
                if expires_at is not None and expires_at + EXPIRY_SECONDS < self.world.scheduler_wall():
                    self.fail("expiry", f"{row.id} is {row.state}, and should have expired at {expires_at}")

    def _look_at(self, host, quiet):
        process = host.process
        if process is None or process.dead or host.draining or host.seen is None:
            return
        if ("worker", host.name) in self.paused:
            return
        if any(row.state in HELD and row.worker in (None, host.name) for row in self._alone_rows()):
            return
        known = self._eligible.get(host.name)
        if known is None or known[0] != self._news:
            known = self._eligible[host.name] = (self._news, self._eligible_on(host))
        for row, since in known[1]:
            both = max(since, quiet)
            if self.loop.now - both > IDLE_SECONDS and (row.not_before is None or self._is_due(row)):
                self.fail("P5", f"{row.id} waits beside an idle slot of {host.name} since {both - START:.3f}")

    def _alone_rows(self):
        return [self.rows[id_] for id_, attempt in self.alone if self.rows[id_].attempt == attempt]

    def _eligible_on(self, host):
        """List the requests that a host with an idle slot could run, and since when that is so."""
        epochs = {link.epoch for link in host.process.links}
        in_hand = sum(epoch in epochs for epoch, _ in self.tickets.get(host.name, ()))
        known = self.facts.get(host.name)
        if host.idle() <= in_hand or not known or known[-1].metadata != host.metadata or host.seen[0] != host.metadata:
            return []
        facts = known[-1]
        touched = max(self.touched[host.name], facts.at, self.touched.get(("worker", host.name), 0.0))
        keys, _ = self.held(self.rows)
        return [
            (row, max(touched, self.touched[row.id], *(self.touched.get(name, 0.0) for name in self._names(row))))
            for row in self.rows.values()
            if row.state == "pending"
            and not row.unmet
            and not self._is_over(row)
            and not self._is_paused(row, self.paused)
            and (row.ckey is None or keys.get(row.ckey, 0) < self.limit(row.ckey))
            and self.pure(self.requests[row.id])
            and (host.name, facts.version) not in self.refused.get(row.id, ())
            and self.can_run(self.requests[row.id], facts.metadata, facts.tasks, (host.name, facts.version))
        ]

    def _names(self, row):
        """Name what holds back more than one request."""
        return ("key", row.ckey), ("task", self.requests[row.id].task), ("group", row.grp)

    def settled_down(self):
        """Say whether nothing is left to be done."""
        return (
            all(row.state in FINAL or self._may_wait(row) for row in self.rows.values())
            and not self.world.client.waiting
            and not any(host.spool for host in self.world.hosts.values())
        )

    def last(self):
        """Look at what is left when everything has had time to heal."""
        self.rows = self.read()
        attempts = self.attempts()
        for host in self.world.hosts.values():
            for outcome in host.spool.values():
                self.fail("P4", f"{host.name} still has {outcome} in its spool")
        for outcome in self.outcomes.values():
            fault = self._unrecorded(outcome, attempts)
            if fault is not None:
                self.fail("P4", f"an outcome was lost: {fault}")
        for id_ in self.world.client.accepted:
            if id_ not in self.rows:
                self.fail("P1", f"{id_} was receipted, and is not in the ledger")
        for id_ in self.world.client.waiting:
            self.fail("P1", f"{id_} was never receipted")
        counted = {}
        for (id_, _), row in attempts.items():
            counted[id_] = counted.get(id_, 0) + (row[5] and row[4] not in (None, "handed_back"))
        for row in self.rows.values():
            request = self.requests[row.id]
            if row.tried != counted.get(row.id, 0) or row.tried > request.max_attempts:
                self.fail("P3", f"{row} was tried {counted.get(row.id, 0)} times, of at most {request.max_attempts}")
            again = row.state in request.retry_on and row.tried < request.max_attempts
            if again and json.loads(row.reason).get("stage") != "record":
                self.fail("P3", f"{row} was not tried again, as {request.retry_on} asks for")
            if row.state == "rejected" and not self._may_reject(row):
                self.fail("P3", f"{row.id} was rejected without need: {row}")
            if row.state not in FINAL and not self._may_wait(row):
                self.fail("P3", f"{row.id} is still {row.state} at the end: {row}")

    def _may_reject(self, row):
        request = self.requests[row.id]
        return (
            request.data.get("bad")
            or request.requires == programs.BAD_SCHEMA
            or (None not in (request.not_before, request.expires_at) and request.expires_at <= request.not_before)
            or any(id_ not in self.rows or self.rows[id_].seq > row.seq for id_ in self.needs(request))
        )

    def _may_wait(self, row):
        """Say whether a request waits with reason: by the scheduler's or by its own word, no worker can run it."""
        request = self.requests[row.id]
        hidden = programs.Task._sub_tasks[request.task].hidden
        needed = [self.rows[id_] for id_ in self.needs(request) if self.rows[id_].state not in FINAL]
        return row.state == "pending" and (
            (row.unmet > 0 and any(self._may_wait(other) for other in needed))
            or self._is_paused(row, self.paused)
            or (row.ckey is not None and self.limit(row.ckey) <= 0)
            or "scheduler" in hidden
            or not any(
                host.process is not None
                and not host.process.dead
                and host.name not in hidden
                and request.task in host.tasks
                and ("worker", host.name) not in self.paused
                and programs.says(request.task, self.data(request), host.metadata, request.requires)
                for host in self.world.hosts.values()
            )
        )


def _filled(data, taken):
    """Return task data with what was taken in its places."""
    data = copy.deepcopy(data)
    for into, number in taken.items():
        *way, last = into.split("/")[1:]
        place = data
        for part in way:
            place = place.setdefault(part, {})
        place[last] = number
    return data


def _brief(parts):
    """Say in a line what a message says."""
    return "; ".join(
        f"{type(part).__name__}("
        + ", ".join(
            f"{name}={[one.token for one in getattr(part, name)] if name in REFS else getattr(part, name)!r}"
            for name in part.__struct_fields__
            if name not in ("host", "store", "version", "metadata", "inputs", "seq", "since")
            and getattr(part, name) not in (None, [], {})
        )
        + ")"
        for part in parts
    )

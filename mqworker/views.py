"""What the scheduler shows of the pool: requests, workers, classes, and why something waits.

It looks at what is held and changes nothing.
"""

from collections.abc import Mapping, Sequence
from heapq import nsmallest

import msgspec

from mqworker import explain
from mqworker.dispatch import Lane
from mqworker.examiner import Draft
from mqworker.holdings import Entry, Holdings, KnownWorker, Lease
from mqworker.lifecycle import State
from mqworker.matching import Funnel, Question, Requirement
from mqworker.messages import (
    Capability,
    CapabilityList,
    Explanation,
    GetCapabilities,
    Hello,
    ListWorkers,
    RequestView,
    RunProgress,
    WorkerView,
)
from mqworker.messages import Pool as PoolView
from mqworker.metrics import SchedulerMetrics
from mqworker.topology import Topology


class Views:
    """Show what the scheduler holds."""

    def __init__(
        self, held: Holdings, *, term: int, topology: Topology, store_id: str, metrics: SchedulerMetrics
    ) -> None:
        self._held = held
        self._dispatch = held.dispatch
        self._matching = held.matching
        self._entries = held.entries
        self._workers = held.workers
        self._pauses = held.pauses
        self._refused = held.refused
        self._delayed = held.delayed
        self._requirements = held.requirements
        self._examiner = held.examiner
        self._term = term
        self._topology = topology
        self._store_id = store_id
        self._metrics = metrics

    def decorate(self, view: RequestView) -> RequestView:
        """Add what only memory knows: progress, and what a pending request waits for."""
        entry = self._entries.get(view.request.id)
        progress = None if entry is None or entry.lease is None else _shown(entry.lease)
        return msgspec.structs.replace(view, progress=progress, waits=self._waits(view, entry))

    def _waits(self, view: RequestView, entry: Entry | None) -> str | None:
        """Say in a line why a request does not run."""
        if view.state not in (State.PENDING, State.OFFERED):
            return None
        held = self._held_back(view, entry)
        one = self._requirements.get(view.requirement)
        if held is not None or one is None:
            return held
        request, requirement = view.request, one.id if entry is None else entry.requirement
        if not self._matching.capable_classes(requirement):
            if entry is not None and entry.own is not None:
                return explain.DECLINED
            return explain.nobody(self._matching.errors(requirement))
        lane = Lane(requirement, request.priority, request.group, request.concurrency_key)
        if self._dispatch.held_by(lane) is not None:
            return explain.limited(lane.key)
        paused = [name for kind, name in self._pauses if kind == "worker" and self._matching.can_run(name, requirement)]
        if paused and len(paused) == len(self._matching.able(requirement)):
            return explain.PAUSED
        return explain.busy(self._dispatch.ahead(lane, view.seq))

    def _held_back(self, view: RequestView, entry: Entry | None) -> str | None:
        """Say in a line what keeps a request from being offered, whoever could run it."""
        if view.after:
            others = len(view.after) - 1
            return f"waits for {view.after[0]}" + (f" and {others} more" if others else "")
        if view.not_before is not None and view.attempt == 1:
            return f"is not to be offered before {explain.time_of(view.not_before)}"
        if entry is not None and entry.due is not None:
            return "waits out the delay before its next attempt"
        one = self._requirements.get(view.requirement)
        if one is None:
            return None
        for kind, name in (("task", one.kind.task), ("group", view.request.group)):
            if (kind, name) in self._pauses:
                return f"the {kind} {name} is paused"
        if view.state == "offered":
            return "is offered to a worker"
        if one.problem is not None:
            return f"this scheduler cannot configure its task any more: {one.problem}"
        return None

    def explanation(self, draft: Draft, view: RequestView | None) -> Explanation:
        """Say who can run a request, submitted or not, and why it waits."""
        entry = None if view is None else self._entries.get(view.request.id)
        task = draft.task
        one = self._requirements.find(draft.kind, task.data if task is not None else {})
        requirement: Requirement | None = one.id if one is not None else None
        if entry is not None:
            requirement = entry.requirement
        if requirement is not None:
            funnel, able = self._matching.funnel(requirement), self._matching.able(requirement)
        else:
            one = None
            funnel, able = self._matching.survey(self._examiner.passing_question(draft))
        standing = self._standing(draft, able, self._refused.get(view.request.id, frozenset()) if view else frozenset())
        offline = sorted(name for name, worker in self._workers.items() if worker.state != "online")
        lane = Lane(requirement, draft.request.priority, draft.request.group, draft.request.concurrency_key)
        seq = self._held.newest + 1 if view is None else view.seq
        ahead = self._dispatch.ahead(lane, seq) if requirement is not None else self._dispatch.waiting()
        failing = self._matching.errors(requirement) if requirement is not None else None
        verdict = explain.verdict(standing, ahead=ahead, failing=failing)
        if view is not None and view.state in (State.PENDING, State.OFFERED):
            limited = (standing.idle or standing.busy) and self._dispatch.held_by(lane) is not None
            verdict = self._held_back(view, entry) or (explain.limited(lane.key) if limited else verdict)
        elif view is not None:
            verdict = f"it is {view.state}"
        return Explanation(
            request=None if view is None else view.request.id,
            state=None if view is None else view.state,
            task=draft.kind.task,
            verdict=verdict,
            workers=funnel.workers + len(offline),
            steps=explain.steps(funnel, offline=offline),
            able=funnel.able,
            idle=len(standing.idle),
            busy=len(standing.busy),
            paused=len(standing.paused),
            refused=len(standing.refused),
            offline=len(standing.offline),
            ahead=ahead if funnel.able else None,
            advice=[] if funnel.able or task is None else self._advice(draft, funnel),
            requirement=None if one is None else one.id,
            escaped=requirement in self._matching.escaped(),
            failing=failing,
            classes=sorted(self._matching.capable_classes(requirement)) if requirement is not None else [],
        )

    def _standing(self, draft: Draft, able: Sequence[str], denied: frozenset[tuple[str, int]]) -> explain.Standing:
        standing = explain.Standing()
        for name in able:
            if ("worker", name) in self._pauses:
                standing.paused.append(name)
            else:
                (standing.idle if self._dispatch.idle_slots(name) else standing.busy).append(name)
        question = self._examiner.passing_question(draft)
        for name, worker in sorted(self._workers.items()):
            hello = worker.hello
            if hello is None:
                continue
            if worker.state == "online":
                if (name, hello.metadata_version) in denied and self._could(question, hello):
                    standing.refused.append(name)
            elif worker.state == "offline" and self._could(question, hello):
                standing.offline.append(name)
        return standing

    @staticmethod
    def _could(question: Question, hello: Hello) -> bool:
        return question.task in hello.tasks and question.plain(hello.metadata)[0]

    def _advice(self, draft: Draft, funnel: Funnel) -> list[str]:
        """Look for the smallest change of a worker that got furthest."""
        furthest = [name for step in reversed(funnel.steps) for offered in step.offered for name in offered.examples]
        offered = {
            explain.name_of(step.looked_at): [one.token for one in step.offered]
            for step in funnel.steps
            if not isinstance(step.looked_at, str)
        }
        candidates = (
            (name, facts.metadata)
            for name in dict.fromkeys(furthest)
            if draft.kind.task in (facts := self._matching.facts(name)).tasks
        )
        task = draft.task
        return explain.advice(self._examiner.ask(draft), {} if task is None else task.data, candidates, offered)

    def capabilities(self, query: GetCapabilities, steady: float) -> CapabilityList:
        """Show capability classes."""
        names = (name for name in self._matching.names() if query.after is None or name > query.after)
        classes = []
        for name in nsmallest(query.limit, names):
            members = sorted(self._matching.members(name))
            facts = [self._matching.facts(worker) for worker in members]
            classes.append(
                Capability(
                    name=name,
                    queue=self._topology.class_queue(self._held.queue_name(name)).name,
                    workers=len(members),
                    examples=members[: explain.MAX_SHOWN],
                    shared=explain.shared([one.metadata for one in facts]),
                    tasks=sorted(set.intersection(*(set(one.tasks) for one in facts))) if facts else [],
                    requirements=len(self._matching.runs(name)),
                    idle=self._dispatch.idle(name),
                    lookahead=self._dispatch.lookahead(name, steady),
                    out=self._dispatch.out(name),
                    backlog=self._dispatch.backlog(name),
                )
            )
        return CapabilityList(
            classes=classes, requirements=len(self._requirements), escaped=len(self._matching.escaped())
        )

    def pool(self, requests: Mapping[str, int], version: str) -> PoolView:
        """Show how many of everything there are."""
        online = [worker for worker in self._workers.values() if worker.state == "online"]
        at_work = [worker for worker in online if ("worker", worker.name) not in self._pauses]
        return PoolView(
            term=self._term,
            version=version,
            store=self._store_id,
            requests=dict(requests),
            workers=len(online),
            classes=self.classes(),
            paused=len(online) - len(at_work),
            offline=sum(worker.state == "offline" for worker in self._workers.values()),
            refused=sum(worker.state == "refused" for worker in self._workers.values()),
            slots=sum(worker.hello.slots for worker in at_work if worker.hello is not None),
            busy=sum(len(worker.leases) for worker in online),
        )

    def workers(self, query: ListWorkers) -> list[WorkerView]:
        """Show workers that have been heard of."""
        names = (name for name in self._workers if query.after is None or name > query.after)
        return [
            WorkerView(
                name=worker.name,
                host=worker.hello.host if worker.hello else "",
                state=worker.state,  # type: ignore[arg-type]  # one of the three words
                slots=worker.hello.slots if worker.hello else 0,
                running=self._running(worker),
                queue=worker.heartbeat.assigned if worker.heartbeat else None,
                tasks=worker.hello.tasks if worker.hello else {},
                metadata=worker.hello.metadata if worker.hello else {},
                version=worker.hello.version if worker.hello else "",
                seen=worker.seen_wall,
                reason=worker.reason or (worker.heartbeat.held if worker.heartbeat else None),
                paused=pause.reason if (pause := self._pauses.get(("worker", worker.name))) is not None else None,
                denied=worker.hello.denied if worker.hello else [],
                draining=worker.heartbeat is not None and worker.heartbeat.draining and worker.state == "online",
                capability_class=self._matching.class_of(worker.name),
                user=self._held.names.user(worker.name),
            )
            for worker in map(self._workers.__getitem__, nsmallest(query.limit, names))
        ]

    def _running(self, worker: KnownWorker) -> list[RunProgress]:
        leases = (self._entries[request].lease for request in sorted(worker.leases))
        return [_shown(lease) for lease in leases if lease is not None]

    def classes(self) -> int:
        """Count the capability classes."""
        return self._matching.number_of_classes()

    def show(self, steady: float) -> None:
        """Set the gauges."""
        states = dict.fromkeys((State.PENDING, State.OFFERED, State.RUNNING), 0)
        for entry in self._entries.values():
            states[entry.state] += entry.state is not State.PENDING
        states[State.PENDING] = self._dispatch.waiting() + len(self._delayed) + self._held.blocked
        for state, number in states.items():
            self._metrics.requests.labels(state=state).set(number)
        for word in ("online", "offline", "refused"):
            self._metrics.workers.labels(state=word).set(sum(worker.state == word for worker in self._workers.values()))
        self._metrics.classes.set(self.classes())
        self._metrics.requirements.set(len(self._requirements))
        self._metrics.escaped.set(len(self._matching.escaped()))
        self._metrics.class_idle.clear()
        self._metrics.class_offers.clear()
        for name, (_, idle, _, out) in self._dispatch.figures(steady).items():
            self._metrics.class_idle.labels(capability_class=name).set(idle)
            self._metrics.class_offers.labels(capability_class=name).set(out)


def _shown(lease: Lease) -> RunProgress:
    """Return a run as everybody may see it: who knows its token could speak for it."""
    return msgspec.structs.replace(lease.run, token="")

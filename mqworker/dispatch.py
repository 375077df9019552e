"""Who gets what now: the lanes of what waits, the credit of each capability class, the offers that are out.

Pure; told the time in seconds of any clock that does not jump. It knows request ids, names and numbers, and nothing
of what a request is.

A lane is the requests that only their age tells apart: one requirement class, priority, group and concurrency key.
Of each lane only the oldest are in memory, its heads; the rest are in the ledger and merely counted. A lane's horizon
parts them: every waiting request of it up to that number is in memory, and it is infinite when nothing is behind.

The better of two requests (P8): higher priority; then the group with the smaller share; then older. A share is what a
group has offered and running now, by its weight; of equals, that is smaller which was given less lately, since one
slot is nobody's between two runs. Nothing ages: a request of lower priority waits for as long as better ones come.

The order is kept, never searched: lanes that their key alone tells apart make a bundle, bundles of one group at one
priority a team, teams of one priority a tier; each knows its oldest, and each is a sorted line of the smaller ones.

Credit of a class = idle slots of its members + lookahead - offers out. Lookahead is what the class finishes in a
moment, by its pace: nothing for builds of an hour, enough to keep the pipe full for tasks of a millisecond. Where there
is much of it, tickets go in sets, each what a member finishes in a part of that moment.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, nsmallest
from itertools import chain, count
from math import ceil, inf
from typing import Final, NamedTuple

from mqworker.errors import IllegalMove
from mqworker.pace import Pace

SETS_OF_LOOKAHEAD: Final = 4  # that each member gets its part of the lookahead in
LEAST_HEADS: Final = 8  # a lane, however many there are
MOST_HEADS: Final = 256  # a lane, however few there are
ROWS_AT_ONCE: Final = 20_000  # asked for in one go, so that no answer keeps the ledger for long
SPARE_PLACES: Final = 16  # void places that a bundle may hold before it is worth a look at all of them
FADING: Final = 1.01  # by so much more than the one before it, each offer counts in what a group was given lately
MOST_TURN: Final = 1e100
FORGOTTEN: Final = 1e-9  # of an offer
ANY: Final = "*"  # in weights and limits: all that are not named


class Lane(NamedTuple):
    """Say what dispatch can tell of a request, but for its age."""

    requirement: Hashable
    priority: int
    group: str
    key: str | None


class Want(NamedTuple):
    """Ask for the oldest `limit` waiting requests of a lane that are younger than `after`."""

    lane: Lane
    after: int
    limit: int


class Offer(NamedTuple):
    """Say that a request goes to a class now."""

    request: str
    capability_class: str


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Asked:
    """What came between a want and its answer, which may have been read before it or after."""

    want: Want
    newest: int
    late: set[int] = field(default_factory=set)  # old ones that began to wait behind the horizon
    fresh: int | None = None  # the oldest of those that came after the asking
    gone: set[int] = field(default_factory=set)  # that wait no more


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Requirement:
    name: Hashable
    classes: "dict[_Class, None]" = field(default_factory=dict)  # a dict for its order: the same seed, the same offers
    bundles: "dict[_Bundle, None]" = field(default_factory=dict)
    paused: bool = False
    waiting: int = 0
    rivals: "tuple[int, set[_Requirement]] | None" = None  # as of which partition: what shares a class with it


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Group:
    name: str
    weight: float
    paused: bool = False
    used: int = 0  # offered and running
    share: "Share" = (0.0, 0.0)
    teams: "dict[int, _Team]" = field(default_factory=dict)  # by priority


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Key:
    name: str
    limit: int
    used: int = 0  # offered and running
    lanes: int = 0
    parked: "dict[_Lane, None]" = field(default_factory=dict)  # out of line until the limit lets go

    @property
    def full(self) -> bool:
        return self.used >= self.limit


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Tier:
    """One priority."""

    line: "list[tuple[Share, int, int, _Team]]" = field(default_factory=list)  # by share, then by age
    teams: int = 0


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Team:
    """One group at one priority."""

    number: int
    priority: int
    group: _Group
    tier: _Tier
    line: "list[tuple[int, int, _Bundle]]" = field(default_factory=list)  # by age
    entry: "tuple[Share, int, int, _Team] | None" = None  # in the tier's line
    bundles: "dict[_Requirement, _Bundle]" = field(default_factory=dict)


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Bundle:
    """The lanes of one group at one priority with one requirement."""

    number: int
    requirement: _Requirement
    team: _Team
    heap: "list[tuple[int, int, _Lane]]" = field(default_factory=list)  # by age; void where the lane has moved
    entry: "tuple[int, int, _Bundle] | None" = None  # in the team's line
    lanes: "set[_Lane]" = field(default_factory=set)
    dormant: "dict[_Lane, None]" = field(default_factory=dict)  # hungry, but nothing of them may go
    waiting: int = 0


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Lane:
    number: int
    lane: Lane
    bundle: _Bundle
    key: _Key | None
    heads: list[tuple[int, str]] = field(default_factory=list)  # by age
    horizon: float = inf  # every waiting request up to here is in heads
    behind: int = 0  # about how many wait beyond the horizon; whether any may, only the horizon says
    asked: _Asked | None = None
    place: int | None = None  # the age it stands in line by; that of its oldest or, if that is unknown, not above it
    open: bool = False  # it stands in line with a head that is known
    parked: bool = False


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Held:
    """A request that counts towards its group's share and its key's limit: offered or running."""

    lane: Lane
    seq: int
    group: _Group
    key: _Key | None
    capability_class: "_Class | None"  # it is offered to; None: it runs, or its class is gone
    since: float


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Supply:
    """What one worker can take: `slots` that work, less what is known to sit in them."""

    capability_class: "_Class | None" = None  # whose queue it consumes or will, by its own word
    slots: int = 0
    busy: set[Hashable] = field(default_factory=set)

    @property
    def idle(self) -> int:
        return max(0, self.slots - len(self.busy))


Share = tuple[float, float]  # what a group has out by its weight now, and what it was given lately
_Rank = tuple[bool, int, int, int, "_Class"]


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class _Class:
    number: int
    name: str
    runs: dict[_Requirement, None] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)  # whose supply counts here
    idle: int = 0
    working: int = 0  # members with any slot at all
    out: set[str] = field(default_factory=set)
    slots: int = 0  # of all members
    pace: Pace = field(default_factory=Pace)
    starved: _Rank | None = None  # where it stands among those that have credit and found nothing
    wakes: list[_Bundle] = field(default_factory=list)  # what it was woken for, ahead of others

    @property
    def rank(self) -> _Rank:
        """Who is asked first: who has idle slots, who can run the least else, who has the most idle."""
        spare = self.idle - len(self.out)
        return (spare <= 0, len(self.runs), -spare, self.number, self)

    def lookahead(self, now: float) -> int:
        return self.pace.ahead(self.slots, now)

    def credit(self, now: float) -> int:
        return self.idle + self.lookahead(now) - len(self.out)


class Dispatch:
    """Give each class with credit the best request that it can run.

    `weights` of groups are above 0; `limits` are by concurrency key; ANY stands for all others, which else have 1.
    `heads` is how many waiting requests to keep in memory, about.
    """

    def __init__(self, *, weights: Mapping[str, float], limits: Mapping[str, int], heads: int = 50_000) -> None:
        self._weights = weights
        self._limits = limits
        self._heads = heads
        self._numbers = count()
        self._now = 0.0  # when offers were made last
        self._partition = 0  # rises whenever what classes run changes
        self._newest = 0
        self._served: dict[str, float] = {}  # what each group was given lately, by its weight
        self._turn = 1.0
        self._number_waiting = 0
        # What waits, in order.
        self._lanes: dict[Lane, _Lane] = {}
        self._tiers: dict[int, _Tier] = {}
        self._line: list[tuple[int, _Tier]] = []  # by minus priority; those in which anything may go
        self._requirements: dict[Hashable, _Requirement] = {}
        self._groups: dict[str, _Group] = {}
        self._keys: dict[str, _Key] = {}
        self._waiting: dict[str, tuple[_Lane, int]] = {}
        self._starving: dict[_Lane, None] = {}  # nothing of them is in memory
        self._hungry: dict[_Lane, None] = {}  # little is
        # What is out, and who may have more.
        self._out: dict[str, _Held] = {}  # by age of the offer
        self._running: dict[str, _Held] = {}
        self._classes: dict[str, _Class] = {}
        self._unattended: dict[_Class, None] = {}  # no member
        self._supplies: dict[str, _Supply] = {}
        # What changed since the last offers.
        self._dirty: dict[_Class, None] = {}  # credit, or what they run
        self._fresh: dict[_Bundle, None] = {}  # has what no starved class has seen
        self._starved: list[_Rank] = []
        self._blocked: dict[_Class, None] = {}  # what is best for them is not known yet

    # ------------------------------------------------------------ the backlog

    def wait(self, request: str, lane: Lane, seq: int) -> bool:
        """Let a request wait, a new one or one that comes back, and say whether it is kept in memory."""
        known = self._waiting.get(request)
        if known is not None and known[0].lane == lane:
            return True  # an answer brought it before its acceptance was told
        self.forget(request)
        self._newest = max(self._newest, seq)
        one = self._lanes.get(lane) or self._make_lane(lane)
        if one.horizon == inf and len(one.heads) >= self._bound() and seq > one.heads[-1][0]:
            one.horizon = one.heads[-1][0]
        if seq > one.horizon:
            self._count(one, behind=1)
            if one.asked is not None:
                one.asked.gone.discard(seq)
                if seq <= one.asked.newest:
                    one.asked.late.add(seq)
                else:
                    one.asked.fresh = min(seq, one.asked.fresh or seq)
            self._feed(one)
            return False
        self._keep(one, request, seq)
        self._settle(one)
        return True

    def absent(self, lane: Lane, seq: int) -> None:
        """Count off a waiting request that is not in memory."""
        one = self._lanes.get(lane)
        if one is None:
            return
        self._count(one, behind=-1)  # even if an answer without it has moved the horizon past it meanwhile
        if one.asked is not None:
            one.asked.late.discard(seq)
            one.asked.gone.add(seq)
        if not one.behind:  # it would end, if that were sure
            self._feed(one)

    def restore(self, lane: Lane, number: int) -> None:
        """Count what waits in a lane of which nothing is in memory yet."""
        one = self._lanes.get(lane) or self._make_lane(lane)
        one.horizon = 0
        self._count(one, behind=number)
        self._settle(one)

    def forget(self, request: str) -> None:
        """Take a request out, whether it waits in memory, is offered, runs, or none of these."""
        known = self._waiting.get(request)
        if known is not None:
            one, seq = known
            self._unwait(one, request, seq)
            self._settle(one)
            return
        held = self._out.pop(request, None) or self._running.pop(request, None)
        if held is not None:
            self._release(request, held)

    def waiting(self) -> int:
        """Count the requests in the backlog; exact but for what is told out of order."""
        return self._number_waiting

    def waiting_for(self, requirement: Hashable) -> int:
        """Count the requests in the backlog that have a requirement."""
        known = self._requirements.get(requirement)
        return 0 if known is None else known.waiting

    def waits(self, request: str) -> bool:
        """Say whether a request waits, and is kept in memory."""
        return request in self._waiting

    def oldest(self, requirement: Hashable, number: int) -> list[str]:
        """Name the oldest requests that wait with a requirement, of those in memory."""
        known = self._requirements.get(requirement)
        bundles = () if known is None else known.bundles
        heads = (one.heads for bundle in bundles for one in bundle.lanes)
        return [request for _, request in nsmallest(number, chain.from_iterable(heads))]

    def wants(self, newest: int) -> list[Want]:
        """Ask for the heads that run short; each until it is answered, and no more than ROWS_AT_ONCE or so at a time.

        `newest` is the highest number that any request has. The answers must be read after all that was said to wait
        before this call is in the ledger.
        """
        self._newest = max(self._newest, newest)
        wants: list[Want] = []
        room = ROWS_AT_ONCE
        bound = self._bound()
        for hungry in (self._starving, self._hungry):
            while hungry and room > 0:
                one, _ = hungry.popitem()
                if not self._is_hungry(one):
                    continue
                bundle = one.bundle
                idle = bundle.team.group.paused or bundle.requirement.paused or not bundle.requirement.classes
                if idle and one.behind:  # else it is only to be seen that it is empty
                    bundle.dormant[one] = None
                elif one.key is not None and one.key.full and one.behind:
                    self._park(one)
                    self._move_bundle(bundle)
                else:
                    want = Want(one.lane, int(one.horizon), bound - len(one.heads))
                    one.asked = _Asked(want=want, newest=newest)
                    room -= want.limit
                    wants.append(want)
        return wants

    def heads(self, want: Want, rows: Sequence[tuple[str, int]]) -> list[str]:
        """Take the answer to a want, ascending; return the requests that are in memory by it and were not before."""
        one = self._lanes[want.lane]
        asked = one.asked
        if asked is None or asked.want != want:
            raise IllegalMove(f"expected an answer to {asked and asked.want}, got one to {want}: answer each want once")
        one.asked = None
        horizon = inf if len(rows) < want.limit else rows[-1][1]
        unseen = asked.late.difference(seq for _, seq in rows)  # read before they began to wait
        if unseen:
            horizon = min(horizon, min(unseen) - 1)
        if asked.fresh is not None:
            horizon = min(horizon, asked.fresh - 1)
        taken: list[str] = []
        for request, seq in rows:
            if seq > horizon:
                break
            if seq in asked.gone or request in self._waiting or request in self._out or request in self._running:
                continue
            self._count(one, behind=-1)
            self._keep(one, request, seq)
            taken.append(request)
        one.horizon = horizon
        if horizon == inf:
            self._count(one, behind=-one.behind)
        self._settle(one)
        return taken

    def _bound(self) -> int:
        """Return how many heads a lane may have now."""
        return max(LEAST_HEADS, min(MOST_HEADS, self._heads // (len(self._lanes) or 1)))

    def _is_hungry(self, one: _Lane) -> bool:
        return one.horizon < inf and one.asked is None and 4 * len(one.heads) < self._bound()

    def _feed(self, one: _Lane) -> None:
        if self._is_hungry(one):
            (self._hungry if one.heads else self._starving)[one] = None

    def _count(self, one: _Lane, *, heads: int = 0, behind: int = 0) -> None:
        behind = max(behind, -one.behind)
        one.behind += behind
        one.bundle.waiting += heads + behind
        one.bundle.requirement.waiting += heads + behind
        self._number_waiting += heads + behind

    def _keep(self, one: _Lane, request: str, seq: int) -> None:
        insort(one.heads, (seq, request))
        self._waiting[request] = (one, seq)
        self._count(one, heads=1)

    def _unwait(self, one: _Lane, request: str, seq: int) -> None:
        del one.heads[bisect_left(one.heads, (seq, request))]
        del self._waiting[request]
        self._count(one, heads=-1)

    # ------------------------------------------------------------ the order of what waits

    def _requirement(self, name: Hashable) -> _Requirement:
        return self._requirements.get(name) or self._requirements.setdefault(name, _Requirement(name=name))

    def _group(self, name: str) -> _Group:
        group = self._groups.get(name)
        if group is None:
            weight = self._weights.get(name, self._weights.get(ANY, 1.0))
            group = self._groups[name] = _Group(name=name, weight=weight, share=(0.0, self._served.get(name, 0.0)))
        return group

    def _key(self, name: str | None) -> _Key | None:
        if name is None:
            return None
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = _Key(name=name, limit=self._limits.get(name, self._limits.get(ANY, 1)))
        return key

    def _make_lane(self, lane: Lane) -> _Lane:
        requirement = self._requirement(lane.requirement)
        group = self._group(lane.group)
        team = group.teams.get(lane.priority)
        if team is None:
            tier = self._tiers.get(lane.priority) or self._tiers.setdefault(lane.priority, _Tier())
            tier.teams += 1
            team = _Team(number=next(self._numbers), priority=lane.priority, group=group, tier=tier)
            group.teams[lane.priority] = team
        bundle = team.bundles.get(requirement)
        if bundle is None:
            bundle = _Bundle(number=next(self._numbers), requirement=requirement, team=team)
            team.bundles[requirement] = bundle
            requirement.bundles[bundle] = None
        key = self._key(lane.key)
        if key is not None:
            key.lanes += 1
        one = self._lanes[lane] = _Lane(number=next(self._numbers), lane=lane, bundle=bundle, key=key)
        bundle.lanes.add(one)
        return one

    def _end_lane(self, one: _Lane) -> None:
        """Remove a lane in which nothing waits, and what it leaves empty."""
        bundle, key = one.bundle, one.key
        team = bundle.team
        del self._lanes[one.lane]
        self._starving.pop(one, None)
        self._hungry.pop(one, None)
        bundle.dormant.pop(one, None)
        bundle.lanes.discard(one)
        if key is not None:
            key.lanes -= 1
            key.parked.pop(one, None)
            self._end_key(key)
        if bundle.lanes:
            return
        self._fresh.pop(bundle, None)
        bundle.requirement.bundles.pop(bundle, None)
        self._end_requirement(bundle.requirement)
        del team.bundles[bundle.requirement]
        if team.bundles:
            return
        del team.group.teams[team.priority]
        self._end_group(team.group)
        team.tier.teams -= 1
        if not team.tier.teams:
            del self._tiers[team.priority]

    def _end_requirement(self, requirement: _Requirement) -> None:
        if not requirement.bundles and not requirement.classes and not requirement.paused:
            self._requirements.pop(requirement.name, None)

    def _end_group(self, group: _Group) -> None:
        if not group.teams and not group.used and not group.paused:
            del self._groups[group.name]

    def _end_key(self, key: _Key) -> None:
        if not key.lanes and not key.used:
            del self._keys[key.name]

    def _settle(self, one: _Lane) -> None:
        """Put a lane where it belongs in line, after its heads or its horizon changed."""
        place: int | None = None
        if not one.parked:
            if one.heads:
                place = one.heads[0][0]
            elif one.horizon < inf:
                place = int(one.horizon) + 1
        is_open = place is not None and bool(one.heads)
        if is_open and not one.open:
            self._fresh[one.bundle] = None
        one.open = is_open
        if place != one.place:
            one.place = place
            bundle = one.bundle
            if place is not None:
                heappush(bundle.heap, (place, one.number, one))
                if len(bundle.heap) > 2 * len(bundle.lanes) + SPARE_PLACES:
                    bundle.heap = [(each.place, each.number, each) for each in bundle.lanes if each.place is not None]
                    heapify(bundle.heap)
            self._move_bundle(bundle)
        if one.horizon == inf:
            if not one.heads:
                self._end_lane(one)
        else:
            self._feed(one)

    def _move_bundle(self, bundle: _Bundle) -> None:
        heap = bundle.heap
        while heap and heap[0][2].place != heap[0][0]:
            heappop(heap)
        requirement, team, before = bundle.requirement, bundle.team, bundle.entry
        if heap and requirement.classes and not requirement.paused:
            if before is not None and before[0] == heap[0][0]:
                return
            bundle.entry = (heap[0][0], bundle.number, bundle)
        else:
            bundle.entry = None
        if before is not None:
            del team.line[bisect_left(team.line, before)]
        if bundle.entry is not None:
            insort(team.line, bundle.entry)
        self._move_team(team)

    def _move_team(self, team: _Team) -> None:
        group, tier, before = team.group, team.tier, team.entry
        if team.line and not group.paused:
            entry = (group.share, team.line[0][0], team.number, team)
            if before is not None and before[:2] == entry[:2]:
                return
            team.entry = entry
        else:
            team.entry = None
        was = bool(tier.line)
        if before is not None:
            del tier.line[bisect_left(tier.line, before)]
        if team.entry is not None:
            insort(tier.line, team.entry)
        if was != bool(tier.line):
            if was:
                del self._line[bisect_left(self._line, (-team.priority, tier))]
            else:
                insort(self._line, (-team.priority, tier))

    def _wake_bundle(self, bundle: _Bundle) -> None:
        """Put a bundle in line of which something may go again."""
        self._move_bundle(bundle)
        self._fresh[bundle] = None
        while bundle.dormant:
            one, _ = bundle.dormant.popitem()
            self._feed(one)

    def _park(self, one: _Lane) -> None:
        """Take a lane out of line whose key lets nothing go."""
        if one.key is not None:
            one.parked = True
            one.open = False
            one.place = None
            one.key.parked[one] = None

    # ------------------------------------------------------------ what is out

    def granted(self, request: str) -> bool:
        """Count an offer as taken: the request runs. False: it was not out; `hold` counts any request as running."""
        held = self._out.pop(request, None)
        if held is None:
            return request in self._running
        one = held.capability_class
        if one is not None:
            one.pace.answered(self._now - held.since)
        self._take_back(request, held)
        self._running[request] = held
        return True

    def hold(self, request: str, lane: Lane) -> None:
        """Count a request as running, whatever it was."""
        if not self.granted(request):
            self.forget(request)
            self._running[request] = self._held(lane, seq=0)

    def offered_to(self, request: str) -> str | None:
        """Return the class that a request is offered to."""
        held = self._out.get(request)
        return None if held is None or held.capability_class is None else held.capability_class.name

    def stale(self, now: float, timeout: float) -> list[str]:
        """List the requests whose offer nobody took in time, or whose class nobody consumes any more."""
        stale: dict[str, None] = {}
        for request, held in self._out.items():
            if now - held.since <= timeout:
                break
            stale[request] = None
        for one in self._unattended:
            stale.update(dict.fromkeys(one.out))
        return list(stale)

    def _held(self, lane: Lane, *, seq: int, capability_class: _Class | None = None, since: float = 0.0) -> _Held:
        """Count a request towards its group's share and its key's limit."""
        group, key = self._group(lane.group), self._key(lane.key)
        if key is not None:
            key.used += 1
        self._use(group, 1)
        return _Held(lane=lane, seq=seq, group=group, key=key, capability_class=capability_class, since=since)

    def _release(self, request: str, held: _Held) -> None:
        self._take_back(request, held)
        one = self._lanes.get(held.lane)
        if one is not None and one.asked is not None and held.seq > one.horizon:
            one.asked.gone.add(held.seq)
        self._use(held.group, -1)
        self._end_group(held.group)
        key = held.key
        if key is not None:
            key.used -= 1
            if key.parked and not key.full:
                parked, key.parked = key.parked, {}
                for each in parked:
                    each.parked = False
                    self._settle(each)
            if not key.lanes:
                self._end_key(key)

    def _take_back(self, request: str, held: _Held) -> None:
        one, held.capability_class = held.capability_class, None
        if one is not None:
            one.out.discard(request)
            self._dirty[one] = None

    def _use(self, group: _Group, number: int) -> None:
        group.used += number
        group.share = (group.used / group.weight, self._served.get(group.name, 0.0))
        for team in group.teams.values():
            self._move_team(team)

    def _serve(self, group: _Group) -> None:
        """Note that a group is given something; what others are given makes it count less and less."""
        self._turn *= FADING
        self._served[group.name] = self._served.get(group.name, 0.0) + self._turn / group.weight
        if self._turn > MOST_TURN:
            self._served = {
                name: served / self._turn for name, served in self._served.items() if served / self._turn > FORGOTTEN
            }
            self._turn = 1.0
            for each in self._groups.values():
                self._use(each, 0)

    # ------------------------------------------------------------ pauses

    def pause_requirement(self, requirement: Hashable) -> None:
        """Offer nothing of a requirement class until it is resumed or dropped."""
        self._pause(self._requirement(requirement), paused=True)

    def resume_requirement(self, requirement: Hashable) -> None:
        """Offer what waits with a requirement class again."""
        known = self._requirements.get(requirement)
        if known is not None:
            self._pause(known, paused=False)
            self._end_requirement(known)

    def _pause(self, requirement: _Requirement, *, paused: bool) -> None:
        requirement.paused = paused
        for bundle in requirement.bundles:
            self._wake_bundle(bundle)

    def pause_group(self, group: str) -> None:
        """Offer nothing of a group until it is resumed."""
        known = self._group(group)
        known.paused = True
        for team in known.teams.values():
            self._move_team(team)

    def resume_group(self, group: str) -> None:
        """Offer what waits of a group again."""
        known = self._groups.get(group)
        if known is None:
            return
        known.paused = False
        for team in known.teams.values():
            self._move_team(team)
            for bundle in team.bundles.values():
                self._wake_bundle(bundle)
        self._end_group(known)

    # ------------------------------------------------------------ classes and workers

    def add_class(self, name: str) -> None:
        """Begin a class; it can run nothing yet."""
        one = self._classes[name] = _Class(number=next(self._numbers), name=name)
        self._unattended[one] = None

    def offered(self, name: str) -> list[str]:
        """List the requests that are offered to a class now."""
        return sorted(self._classes[name].out)

    def remove_class(self, name: str) -> list[str]:
        """End a class; return the requests whose offers it had, which count as offered until they are told of."""
        one = self._classes.pop(name)
        self._partition += 1
        self._unstarve(one)
        self._unattended.pop(one, None)
        self._blocked.pop(one, None)
        for requirement in one.runs:
            self._leave_requirement(one, requirement)
        for worker in one.members:
            self._supplies[worker].capability_class = None
        out = sorted(one.out)
        for request in out:
            self._take_back(request, self._out[request])  # a claim that came before may be granted yet
        self._dirty.pop(one, None)
        return out

    def gain(self, name: str, requirement: Hashable) -> None:
        """Let a class run a requirement."""
        one, gained = self._classes[name], self._requirement(requirement)
        self._partition += 1
        self._unstarve(one)
        self._dirty[one] = None
        one.runs[gained] = None
        gained.classes[one] = None
        if len(gained.classes) == 1:
            for bundle in gained.bundles:
                self._wake_bundle(bundle)

    def drop(self, requirement: Hashable) -> None:
        """End a requirement class: no class runs it any more, and it is not paused."""
        known = self._requirements.get(requirement)
        if known is None:
            return
        self._partition += 1
        for one in list(known.classes):
            self._unstarve(one)  # its rank is another
            self._dirty[one] = None
            one.runs.pop(known, None)
            self._leave_requirement(one, known)
        self._pause(known, paused=False)
        self._end_requirement(known)

    def _leave_requirement(self, one: _Class, requirement: _Requirement) -> None:
        requirement.classes.pop(one, None)
        if not requirement.classes:
            for bundle in requirement.bundles:
                self._move_bundle(bundle)
            self._end_requirement(requirement)

    def supply(self, worker: str, *, capability_class: str | None, slots: int, busy: Iterable[Hashable]) -> None:
        """Take a worker's own word: whose queue it consumes, how many slots work, what sits in them.

        A class that is gone, or of another scheduler, is no class.
        """
        supply = self._supplies.setdefault(worker, _Supply())
        one = None if capability_class is None else self._classes.get(capability_class)
        before = supply.idle, supply.slots
        if one is not supply.capability_class:
            self._discount(worker, supply)
            before = 0, 0
        supply.capability_class = one
        supply.slots = slots
        supply.busy = set(busy)
        after = supply.idle, slots
        if one is not None and (worker not in one.members or after != before):
            one.members.add(worker)
            one.idle += after[0] - before[0]
            one.working += (after[1] > 0) - (before[1] > 0)
            one.slots += after[1] - before[1]
            self._unattended.pop(one, None)
            self._dirty[one] = None

    def no_supply(self, worker: str) -> None:
        """Count nothing of a worker any more."""
        supply = self._supplies.pop(worker, None)
        if supply is not None:
            self._discount(worker, supply)

    def _discount(self, worker: str, supply: _Supply) -> None:
        one = supply.capability_class
        if one is not None:
            one.members.discard(worker)
            one.working -= supply.slots > 0
            one.slots -= supply.slots
            one.idle -= supply.idle
            self._dirty[one] = None
            if not one.members:
                self._unattended[one] = None

    def taken(self, worker: str, run: Hashable) -> None:
        """Count a slot as taken: its worker's claim was granted."""
        supply = self._supplies.get(worker)
        if supply is not None:
            before = supply.idle
            supply.busy.add(run)
            if supply.capability_class is not None:
                supply.capability_class.idle += supply.idle - before
                self._dirty[supply.capability_class] = None

    def freed(self, worker: str, run: Hashable, now: float, seconds: float) -> None:
        """Count a slot as free: the outcome of its run came, which had taken so long."""
        supply = self._supplies.get(worker)
        if supply is None:
            return
        before = supply.idle
        supply.busy.discard(run)
        one = supply.capability_class
        if one is not None:
            one.idle += supply.idle - before
            one.pace.ended(seconds, now)
            self._dirty[one] = None

    # ------------------------------------------------------------ credit and offers

    def idle(self, name: str) -> int:
        """Count the idle slots of a class."""
        return self._classes[name].idle

    def out(self, name: str) -> int:
        """Count the tickets out to a class."""
        return len(self._classes[name].out)

    def idle_slots(self, worker: str) -> int:
        """Count the idle slots of a worker, by its own word and by what was granted since."""
        supply = self._supplies.get(worker)
        return 0 if supply is None else supply.idle

    def lookahead(self, name: str, now: float) -> int:
        """Return how many tickets a class finishes in a moment."""
        return self._classes[name].lookahead(now)

    def set_size(self, name: str, now: float) -> int:
        """Return how many tickets to a class may go in one message: one, but where runs end faster than these come."""
        one = self._classes.get(name)
        return 1 if one is None else max(1, one.lookahead(now) // (SETS_OF_LOOKAHEAD * max(1, one.working)))

    def credit(self, name: str, now: float) -> int:
        """Return how many tickets a class may be given now."""
        return self._classes[name].credit(now)

    def offers(self, now: float) -> list[Offer]:
        """Choose, for each class with credit, the best requests that it can run; they count as out from now.

        It looks only at what changed. A class with credit that found nothing is starved: it is woken by a bundle with
        something new, one class at a time, so that of many idle ones the best placed gets it. A class whose best
        choice may be among what is not in memory is blocked: it passes, and is asked again at the next call.
        """
        self._now = now
        ready: list[_Rank] = []
        for one in self._dirty:
            starved = one.starved is not None
            self._unstarve(one)
            if one not in self._blocked and one.credit(now) > 0:
                if starved:
                    self._starve(one)  # still; but its rank may be another
                else:
                    heappush(ready, one.rank)
        self._dirty.clear()
        blocked, self._blocked = self._blocked, {}
        for one in blocked:
            if one.credit(now) > 0:
                heappush(ready, one.rank)
        woken: dict[_Class, None] = {}
        fresh, self._fresh = self._fresh, {}
        for bundle in fresh:
            self._wake(bundle, ready, woken, now)
        chosen: list[Offer] = []
        while ready:
            rank = heappop(ready)
            one = rank[-1]
            best = self._best(one)
            if best is not None and best.heads:
                better = self._first_starved(best.bundle.requirement, now, rank)
                if better is not None:  # it was passed over for the sake of this one, which has less to spare by now
                    self._unstarve(better)
                    heappush(ready, better.rank)
                    heappush(ready, rank)
                    continue
                chosen.append(self._offer(one, best, now))
                if one.credit(now) > 0:
                    heappush(ready, one.rank)
                    continue
            elif best is not None:
                self._blocked[one] = None
            else:
                self._starve(one)
            woken.pop(one, None)
            wakes, one.wakes = one.wakes, []
            for bundle in wakes:
                self._wake(bundle, ready, woken, now)
        return chosen

    def _wake(self, bundle: _Bundle, ready: list[_Rank], woken: dict[_Class, None], now: float) -> None:
        """See that some class that runs a bundle looks again, if any has credit; and after it another."""
        if bundle.entry is None or bundle.team.entry is None or not self._starved:
            return
        requirement = bundle.requirement
        few, many = sorted((requirement.classes, woken), key=len)
        one = next((each for each in few if each in many), None)
        if one is None:
            one = self._first_starved(requirement, now)
            if one is None:
                return
            self._unstarve(one)
            heappush(ready, one.rank)
            woken[one] = None
        one.wakes.append(bundle)

    def _first_starved(self, requirement: _Requirement, now: float, below: _Rank | None = None) -> _Class | None:
        """Find the best placed of the starved classes that run a requirement."""
        classes = requirement.classes
        while self._starved and (below is None or self._starved[0] < below):
            if len(classes) * 4 < len(self._starved):
                rank = min((one.starved for one in classes if one.starved is not None), default=None)
            else:
                rank = next((rank for rank in self._starved if rank[-1] in classes), None)
            if rank is None or (below is not None and rank > below):
                return None
            if rank[-1].credit(now) > 0:
                return rank[-1]
            self._unstarve(rank[-1])  # its lookahead has run out
        return None

    def _starve(self, one: _Class) -> None:
        one.starved = one.rank
        insort(self._starved, one.starved)

    def _unstarve(self, one: _Class) -> None:
        if one.starved is not None:
            del self._starved[bisect_left(self._starved, one.starved)]
            one.starved = None

    def _best(self, one: _Class) -> _Lane | None:
        """Find the lane that is best for a class; without heads, if what is best is not known yet."""
        reach = 1
        while True:
            best, held = self._look(one)
            if held is None or held.entry is None:
                return best
            line = held.team.line
            reach = max(2 * reach, bisect_left(line, held.entry) + 1)  # doubled: each look begins at the front
            for _, _, bundle in line[:reach]:
                self._park_oldest(bundle)

    def _park_oldest(self, bundle: _Bundle) -> None:
        """Take out of line what is held back by its key, and with it the last hold of a bundle on its place."""
        before = bundle.heap[0]
        while bundle.heap:
            place, _, lane = bundle.heap[0]
            if lane.place == place:
                if lane.key is None or not lane.key.full:
                    break
                self._park(lane)
            heappop(bundle.heap)
        if not bundle.heap or bundle.heap[0] is not before:
            self._move_bundle(bundle)

    def _look(self, one: _Class) -> tuple[_Lane | None, _Bundle | None]:
        """Find the best lane, or a bundle whose oldest is held back by its key."""
        for _, tier in self._line:
            best: _Lane | None = None
            best_place, best_share = 0, (0.0, 0.0)
            for share, seq, _, team in tier.line:
                if best is not None and (share > best_share or seq >= best_place):
                    break
                entry = self._oldest(one, team)
                if entry is None or (best is not None and entry[0] >= best_place):
                    continue
                lane = entry[2].heap[0][2]
                if lane.key is not None and lane.key.full:
                    return None, entry[2]
                best, best_place, best_share = lane, entry[0], share
            if best is not None:
                return best, None
        return None, None

    def _oldest(self, one: _Class, team: _Team) -> tuple[int, int, _Bundle] | None:
        runs = one.runs
        if len(runs) * 4 < len(team.line):
            bundles = (team.bundles.get(requirement) for requirement in runs)
            return min((each.entry for each in bundles if each is not None and each.entry is not None), default=None)
        for entry in team.line:
            if entry[2].requirement in runs:
                return entry
        return None

    def _offer(self, one: _Class, lane: _Lane, now: float) -> Offer:
        seq, request = lane.heads[0]
        self._unwait(lane, request, seq)
        self._serve(lane.bundle.team.group)
        self._out[request] = self._held(lane.lane, seq=seq, capability_class=one, since=now)
        one.out.add(request)
        self._settle(lane)
        return Offer(request, one.name)

    # ------------------------------------------------------------ telling

    def held_by(self, lane: Lane) -> str | None:
        """Say what holds a lane back, whatever its age: "task paused", "group paused", "limit"."""
        requirement, group = self._requirements.get(lane.requirement), self._groups.get(lane.group)
        if requirement is not None and requirement.paused:
            return "task paused"
        if group is not None and group.paused:
            return "group paused"
        if lane.key is None:
            return None
        key = self._keys.get(lane.key)
        full = key.full if key is not None else self._limits.get(lane.key, self._limits.get(ANY, 1)) <= 0
        return "limit" if full else None

    def ahead(self, lane: Lane, seq: int) -> int:
        """Estimate how many waiting requests go before one: of all that some class that may run it runs as well.

        Heads are counted, what is behind is taken as evenly spread; between groups it is as if nothing ended
        meanwhile. What is paused is not counted.
        """
        requirement = self._requirements.get(lane.requirement)
        higher = older = 0
        others: dict[_Group, int] = {}
        for rival in self._rivals(requirement) if requirement is not None else ():
            for bundle in () if rival.paused else rival.bundles:
                team = bundle.team
                if team.priority < lane.priority or team.group.paused:
                    continue
                if team.priority > lane.priority:
                    higher += bundle.waiting
                elif team.group.name == lane.group:
                    older += sum(self._older(each, seq) for each in bundle.lanes)
                else:
                    others[team.group] = others.get(team.group, 0) + bundle.waiting
        group = self._groups.get(lane.group)
        used, weight = (0, 1.0) if group is None else (group.used, group.weight)
        share = (used + older) / weight  # of its group by the time it is the next of it
        fairly = sum(max(0, min(waiting, ceil(share * other.weight) - other.used)) for other, waiting in others.items())
        return higher + older + fairly

    def _rivals(self, requirement: _Requirement) -> set[_Requirement]:
        if requirement.rivals is None or requirement.rivals[0] != self._partition:
            rivals = {requirement}
            for one in requirement.classes:
                rivals.update(one.runs)
                if len(rivals) == len(self._requirements):
                    break
            requirement.rivals = (self._partition, rivals)
        return requirement.rivals[1]

    def _older(self, one: _Lane, seq: int) -> int:
        if seq <= one.horizon:
            return bisect_left(one.heads, (seq, ""))
        part = (seq - one.horizon) / max(1, self._newest + 1 - one.horizon)
        return len(one.heads) + int(one.behind * min(1.0, part))

    def backlog(self, name: str) -> int:
        """Count the waiting requests that a class can run."""
        return sum(requirement.waiting for requirement in self._classes[name].runs)

    def shares(self) -> "Mapping[str, Share]":
        """Return the share of each group that has anything waiting, offered or running."""
        return {group.name: group.share for group in self._groups.values() if group.used or group.teams}

    def figures(self, now: float) -> dict[str, tuple[int, int, int, int]]:
        """Return for each class its workers, idle slots, lookahead and offers out."""
        return {
            name: (len(one.members), one.idle, one.lookahead(now), len(one.out)) for name, one in self._classes.items()
        }

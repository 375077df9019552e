"""How many runs to have ready beyond idle slots, so that short ones follow each other without a pause.

Pure; told the time in seconds of any clock that does not jump. Both sides of the broker use it, each on what it sees:
dispatch for the tickets of a class, an agent for the runs that it asks for.
"""

from math import exp
from typing import Final

AHEAD_SECONDS: Final = 0.1  # of work: longer runs are bound as late as can be
MOST_AHEAD: Final = 1000  # a bound against a clock that lies
RATE_WINDOW: Final = 0.25  # seconds over which is remembered what ended
GROWTH: Final = 4.0  # times the present rate that may be possible in a moment
CHANCE: Final = 3.0  # runs: that two end at the same time is no flood
SHORTEST_RUN: Final = 0.0002  # seconds; no process ends them faster
SLOWEST_ANSWER: Final = 1.0  # second, as far as slow answers count
WEIGHT: Final = 0.1  # by which each run, and each answer, counts


class Pace:
    """Watch how fast runs end, how long they take, and how long an answer does."""

    __slots__ = ("_answer_seconds", "_rate", "_rated", "_run_seconds")

    def __init__(self) -> None:
        self._rate = 0.0  # runs a second
        self._rated = 0.0
        self._run_seconds = 0.0
        self._answer_seconds = 0.0

    def ended(self, seconds: float, now: float) -> None:
        """Take the end of a run that took so long."""
        self._rate = self._rate * self._kept(now) + 1 / RATE_WINDOW
        self._rated = now
        self._run_seconds += (max(seconds, SHORTEST_RUN) - self._run_seconds) * WEIGHT

    def answered(self, seconds: float) -> None:
        """Take how long it took from an offer, or a question, to the grant."""
        self._answer_seconds += (min(seconds, SLOWEST_ANSWER) - self._answer_seconds) * WEIGHT

    def rate(self, now: float) -> float:
        """Return how many runs a second have ended lately."""
        return self._rate * self._kept(now)

    def ahead(self, slots: int, now: float) -> int:
        """Return how many runs to have ready: what so many slots end in AHEAD_SECONDS, and until an answer comes.

        Some times the present rate, so that it can rise; but no more than slots can do whose runs take so long. That is
        nothing for builds of an hour, and hundreds for runs of a millisecond.
        """
        seconds = AHEAD_SECONDS + self._answer_seconds
        possible = slots * seconds / max(self._run_seconds, SHORTEST_RUN)
        return int(max(0.0, min(GROWTH * self.rate(now) * seconds - CHANCE, possible, MOST_AHEAD)))

    def _kept(self, now: float) -> float:
        return exp(min(0.0, self._rated - now) / RATE_WINDOW)

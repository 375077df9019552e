"""Whether a worker is to blame: request after request ends badly there, and then well elsewhere.

Pure; knows names of workers and requests, and how attempts ended. What is done about it, others decide.
"""

from collections.abc import Sequence
from typing import Final

from mqworker.lifecycle import Tried

BADLY: Final = frozenset({"failure", "error", "lost"})
SHOWN: Final = 10  # requests that a reason names


class Blame:
    """Count, for each worker, the requests that ended badly there and then succeeded on another one.

    `limit` is how many of them are too many; 0: any number is fine.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blamed: dict[str, dict[str, None]] = {}  # worker to requests, in the order in which they succeeded

    def succeeded(self, request: str, worker: str, history: Sequence[Tried]) -> list[str]:
        """Take the success of a request, with how its earlier attempts ended; name who is to blame now.

        It clears the worker that it ran on.
        """
        self.forget(worker)
        if not self._limit:
            return []
        guilty = []
        for name in dict.fromkeys(one.worker for one in history if one.result in BADLY):
            if name == worker:
                continue
            requests = self._blamed.setdefault(name, {})
            requests[request] = None
            if len(requests) >= self._limit:
                guilty.append(name)
        return guilty

    def requests(self, worker: str) -> list[str]:
        """Return the requests that speak against a worker."""
        return [*self._blamed.get(worker, ())]

    def reason(self, worker: str) -> str:
        """Say what speaks against a worker."""
        requests = self.requests(worker)
        more = f" and {len(requests) - SHOWN} more" if len(requests) > SHOWN else ""
        return (
            f"{len(requests)} requests ended badly here and then succeeded on other workers, and none here since: "
            f"{', '.join(requests[:SHOWN])}{more}"
        )

    def forget(self, worker: str) -> None:
        """Forget what speaks against a worker."""
        self._blamed.pop(worker, None)

"""Submits the work to mqworker, as a user's program would: with mqworker.client."""

import os
import uuid
from collections.abc import Sequence

from benchmarks import submitting, work
from mqworker.client import Client
from mqworker.messages import Request


class Sender:
    """Submit by a client of mqworker's."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def one_by_one(self, numbers: Sequence[int]) -> list[str]:
        """Call `submit` for each: it returns once the ledger keeps the request."""
        return [self._client.submit(work.NAME, work.argument(number)) for number in numbers]

    def together(self, numbers: Sequence[int]) -> list[str]:
        """Call `submit_many`: it returns once the ledger keeps all."""
        requests = [Request(id=str(uuid.uuid4()), task=work.NAME, data=work.argument(number)) for number in numbers]
        if wrong := [one for one in self._client.submit_many(requests) if one.status != "accepted"]:
            raise RuntimeError(f"expected all to be accepted, got {wrong[0]}")
        return [request.id for request in requests]

    def results(self, sent: list[str]) -> int:
        """Wait for all outcomes."""
        return sum(view.state == "success" for view in self._client.wait(sent))


def main() -> None:
    """Serve one measurement."""
    with Client(os.environ["MQWORKER_AMQP_URL"], timeout=submitting.PATIENCE) as client:
        submitting.serve(Sender(client))


if __name__ == "__main__":
    main()

"""A TCP proxy that misbehaves when told to: it cuts, holds, delays, chops, and leaves connections half-open.

It runs in a thread of its own, so that blocking tests and asyncio ones, and pools of processes, can use it alike.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK = 65536
BACKLOG = 100
PATIENCE = 30.0  # seconds for the proxy's own thread


class Proxy:
    """Stand before a server; a context manager. All calls may come from any thread, and count when they return."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.port = self._listener.getsockname()[1]
        self._pairs: set[_Pair] = set()
        self._delay = 0.0
        self._piece = CHUNK
        self._refusing = self._deaf = False
        self.accepted = 0  # connections, ever

    @classmethod
    def before(cls, url: str) -> Self:
        """Stand before the host of a URL."""
        parts = urlsplit(url)
        return cls(parts.hostname or "", parts.port or 0)

    def url(self, url: str) -> str:
        """Return a URL that leads through here."""
        parts = urlsplit(url)
        user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        return urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{self.port}"))

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="proxy", daemon=True)
        self._thread.start()
        assert ready.wait(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)

    # ------------------------------------------------------------ faults

    @property
    def open(self) -> int:
        """Count the connections that are open, half-open ones included."""
        return len(self._pairs)

    def cut(self) -> None:
        """Reset all connections; new ones are let through."""
        self._do(self._reset_all)

    def refuse(self, refusing: bool = True) -> None:  # noqa: FBT001, FBT002  # as in `refuse(False)`
        """Reset new connections, until told otherwise; those that are open stay."""
        self._do(lambda: setattr(self, "_refusing", refusing))

    def hold(self) -> None:
        """Let no byte through, in either direction, as a network does that has stalled; new connections hang."""
        self._do(self._passing.clear)

    def release(self) -> None:
        """Let through what was held, and all after it."""
        self._do(self._passing.set)

    def half_open(self) -> None:
        """Pass nothing more on the connections that are open, ever, and keep both their ends open; new ones work."""
        self._do(self._leave_half_open)

    def deafen(self, deaf: bool = True) -> None:  # noqa: FBT001, FBT002  # as in `deafen(False)`
        """Accept new connections and leave them unanswered, until told otherwise."""
        self._do(lambda: setattr(self, "_deaf", deaf))

    def slow(self, *, delay: float = 0.0, piece: int = CHUNK) -> None:
        """Pass bytes on after `delay` seconds, in pieces of so many."""
        self._do(lambda: self.__dict__.update(_delay=delay, _piece=piece))

    def heal(self) -> None:
        """End all faults but for what is half-open."""

        def well() -> None:
            self._refusing = self._deaf = False
            self._delay, self._piece = 0.0, CHUNK
            self._passing.set()

        self._do(well)

    # ------------------------------------------------------------ the proxy's thread

    def _do(self, call) -> None:
        done = threading.Event()

        def act() -> None:
            call()
            done.set()

        self._loop.call_soon_threadsafe(act)
        assert done.wait(PATIENCE)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop, self._passing = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._passing.set()
        tasks: set[asyncio.Task] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted += 1
            task = self._loop.create_task(self._join(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, sock=self._listener, limit=CHUNK)
        ready.set()
        await self._stop.wait()
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair(writer)
        self._pairs.add(pair)
        try:
            if self._refusing:
                return
            if self._deaf:
                await pair.over
                return
            try:
                there, to_there = await asyncio.open_connection(*self._server, limit=CHUNK)
            except OSError:
                return
            pair.writers.append(to_there)
            ways = [
                asyncio.ensure_future(self._pump(pair, reader, to_there)),
                asyncio.ensure_future(self._pump(pair, there, writer)),
            ]
            try:
                await asyncio.wait([*ways, pair.over], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._pairs.discard(pair)
            pair.reset()

    async def _pump(self, pair: "_Pair", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(self._piece):
                if self._delay:
                    await asyncio.sleep(self._delay)
                await self._passing.wait()
                if not pair.lost:
                    writer.write(data)
                    await writer.drain()
        if pair.lost:
            await asyncio.Event().wait()  # an end hung up, and the other will never hear of it
        await self._passing.wait()

    def _reset_all(self) -> None:
        for pair in [*self._pairs]:
            pair.reset()

    def _leave_half_open(self) -> None:
        for pair in self._pairs:
            pair.lost = True


class _Pair:
    """A connection through the proxy."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.lost = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def reset(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
        for writer in self.writers:
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no good-bye
            writer.transport.abort()

"""An asyncio loop whose time is virtual, and in which processes can freeze and die in the middle of anything."""

import asyncio
import contextlib
import contextvars
import heapq
from collections import deque

WALL = 1_700_000_000.0  # what clocks on walls show at 0
START = 1000.0  # virtual seconds: 0 means "never" to some


class Process:
    """One process of the pool: whatever stems from its main coroutine stops while it is frozen, for ever if dead."""

    def __init__(self, name):
        self.name = name
        self.role = "scheduler" if name.startswith("scheduler") else name
        self.frozen = False
        self.dead = False
        self.held = deque()  # what would have been called since it stopped
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)
        self.links = []
        self.main = None

    def __repr__(self):
        return self.name


PROCESS = contextvars.ContextVar("process", default=None)
NOBODY = contextvars.copy_context()  # the world's own doings, which never stop


class Handle:
    """Something to be called."""

    __slots__ = ("_when", "args", "callback", "context", "done", "process", "slow")

    def __init__(self, callback, args, context, when):
        self.callback = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self.process = self.context.get(PROCESS)
        self.done = False
        self.slow = False  # it waits in a socket while its process is frozen
        self._when = when

    def cancel(self):
        self.done = True
        self.callback = self.args = None

    def cancelled(self):
        return self.done

    def when(self):
        return self._when


class Loop(asyncio.AbstractEventLoop):
    """Run what is due, then let time pass to what is due next."""

    def __init__(self, delay):
        self.now = START
        self.delay = delay  # executor to (seconds until its call is done, seconds until that is known)
        self.steps = 0
        self.after_step = None  # called once behind the call that set it
        self.complain = None  # what an exception that nobody took is told to
        self.burying = False
        self.stopped = False  # run() ends behind the call that sets it
        self._ready = deque()
        self._timers = []
        self._timed = 0
        self._free = {}  # executor to when its thread is free

    # ------------------------------------------------------------ what asyncio asks

    def time(self):
        return self.now

    def get_debug(self):
        return False

    def is_running(self):
        return True

    def is_closed(self):
        return False

    def create_future(self):
        return asyncio.Future(loop=self)

    def create_task(self, coro, *, name=None, context=None):
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def call_soon(self, callback, *args, context=None):
        handle = Handle(callback, args, context, self.now)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):
        handle = Handle(callback, args, context, when)
        self._timed += 1
        heapq.heappush(self._timers, (when, self._timed, handle))
        return handle

    def run_in_executor(self, executor, func, *args):
        """Do the call later, in one piece, and tell later still: a process can die between the two."""
        future = self.create_future()
        if self.burying:
            return future
        doing, telling = self.delay(executor)
        done = max(self.now, self._free.get(id(executor), 0.0)) + doing
        self._free[id(executor)] = done

        def do():
            try:
                result, error = func(*args), None
            except Exception as raised:  # noqa: BLE001  # it is for who asked
                result, error = None, raised
            self.call_later(telling, tell, result, error)

        def tell(result, error):
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.call_at(done, do)
        return future

    def call_exception_handler(self, context):
        if self.complain is not None and not self.burying:
            self.complain(context)

    # ------------------------------------------------------------ running

    def run(self, until):
        """Run until a virtual moment."""
        ready, timers = self._ready, self._timers
        while not self.stopped:
            if ready:
                handle = ready.popleft()
            elif timers and timers[0][0] <= until:
                when, _, handle = heapq.heappop(timers)
                if handle.done:
                    continue
                self.now = max(self.now, when)
            else:
                self.now = max(self.now, until)
                return
            if handle.done:
                continue
            process = handle.process
            if process is not None and (process.frozen or process.dead):
                process.held.append(handle)
                continue
            self.steps += 1
            handle.context.run(handle.callback, *handle.args)
            if self.after_step is not None:
                call, self.after_step = self.after_step, None
                call()

    def thaw(self, process):
        """Let a process go on with what it has missed, in its order; what is in its sockets takes it some time."""
        process.frozen = False
        slowly = self.now
        for handle in process.held:
            if handle.slow and not self.burying:
                slowly += 0.0004
                self._timed += 1
                heapq.heappush(self._timers, (slowly, self._timed, handle))
            else:
                self._ready.append(handle)
        process.held.clear()

    def bury(self, processes):
        """Unwind everything that still waits, so that no coroutine is left to the garbage collector."""
        self.burying = True
        self.stopped = False
        self._timers.clear()
        for process in processes:
            process.dead = False
            self.thaw(process)
        for _ in range(5):
            tasks = sorted(asyncio.all_tasks(self), key=lambda task: task.get_name())
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            with contextlib.suppress(Exception):
                self.run(self.now + 1)

"""What a run gives birth to: it lives on and leaves signs of life, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

BEAT = 0.05  # seconds


def main():
    kind, box, token, request, seconds = sys.argv[1:6]
    if kind in {"stubborn", "session"}:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _note(box, "child", token, request, kind)
    if kind == "parent":
        command = [sys.executable, "-I", "-S", __file__, "stubborn", box, token, request, seconds]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=False)
    beats = f"{box}/beats/{token}.{os.getpid()}"
    fd = os.open(beats, os.O_WRONLY | os.O_CREAT, 0o600)
    end = time.monotonic() + (3600 if kind == "left" else float(seconds) + 5)
    while time.monotonic() < end:
        os.pwrite(fd, b"%d" % time.clock_gettime_ns(time.CLOCK_BOOTTIME), 0)
        time.sleep(BEAT)
    _note(box, "child-end", token, request, kind)
    os.unlink(beats)  # noqa: PTH108  # pathlib takes as long to load as all the rest


def _note(box, what, token, request, kind):
    line = {
        "what": what,
        "request": request,
        "token": token,
        "pid": os.getpid(),
        "kind": kind,
        "ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        "wall": time.time(),
    }
    fd = os.open(f"{box}/journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, json.dumps(line).encode() + b"\n")
    os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    main()

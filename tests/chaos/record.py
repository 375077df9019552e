"""Lines of JSON that survive whoever writes them: one write each, at the end of a file, synced."""

import json
import os
import time


class Record:
    """Write to a file that several processes may write to, one after the other or at once."""

    def __init__(self, path):
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, what, **facts):
        self.note_many([{"what": what, **facts}])

    def note_many(self, lines):
        wall = time.time()
        text = "".join(json.dumps({"wall": wall, **line}) + "\n" for line in lines)
        os.write(self._fd, text.encode())
        os.fsync(self._fd)

    def close(self):
        os.close(self._fd)


def read(path):
    """Return the lines of a record; one that was cut off by a kill cannot be: each is one write."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]

"""Task classes whose `can_run_on()` is generated, and the metadata and task data that it is asked about."""

import copy
import json
import textwrap
from typing import Any, ClassVar

from jsonschema import Draft202012Validator

from mqworker.task import Task, TaskConfigError
from tests.sim.loop import PROCESS

NUMBER_OF_TASKS = 6

# Values that are easily confused stand beside each other.
VALUES = {
    "arch": ["amd64", "arm64", "i386", ""],
    "mem": [0, 1, 2, 4, 1.0, True, False, None],
    "n": [1, 2, 3, "1", 1.0, True],
    "tags": [[], ["a"], ["b"], ["a", "b"], ["b", "a"]],
    "tools": [{}, {"gcc": 12}, {"gcc": 13}, {"gcc": 12, "clang": 1}],
    "free": [10, 20, 30, 40, 50],
    "host": [],  # each worker's own
}
DATA = {
    "arch": ["amd64", "arm64", "i386"],
    "mem": [0, 1, 2, True, 1.0],
    "tags": [[], ["a"], ["a", "b"]],
    "deep": [{}, {"n": 1}, {"n": 2, "arch": "amd64"}],
    "noise": [1, 2, 3, 4, 5, 6, 7],
}
SCHEMAS = [
    {"required": ["mem"], "properties": {"mem": {"type": "integer", "minimum": 1}}},
    {"properties": {"arch": {"enum": ["amd64", "arm64"]}}},
    {"required": ["tags"], "properties": {"tags": {"contains": {"const": "a"}}}},
    {"anyOf": [{"properties": {"n": {"const": 1}}, "required": ["n"]}, {"required": ["free"]}]},
    {"not": {"properties": {"arch": {"const": "i386"}}}},
    {"properties": {"tools": {"required": ["gcc"], "properties": {"gcc": {"minimum": 13}}}}},
]
BAD_SCHEMA = {"type": "no such type"}


class Generated(Task, mixin=True):
    """Decide by a program; `program`, `source` and `hidden` change with each seed."""

    source: ClassVar[str] = ""
    program: ClassVar[Any] = None
    hidden: ClassVar[frozenset[str]] = frozenset()  # roles of processes in which it says "no" against its contract
    TERMINATE_GRACE = 1.0

    def configure(self, task_data):
        super().configure(task_data)
        if task_data.get("bad"):
            raise TaskConfigError("the data say that they are bad")

    def input_artifact_ids(self):
        made = self.data.get("input")
        return [] if made is None else [made]

    def can_run_on(self, worker_metadata):
        process = PROCESS.get()
        if process is not None and process.role in self.hidden:
            return False
        return type(self).program(self.data, worker_metadata)

    def _execute(self):
        raise NotImplementedError  # slots are simulated


TASKS = [type(f"Sim{number}", (Generated,), {"__module__": __name__}) for number in range(NUMBER_OF_TASKS)]


# ---------------------------------------------------------------- programs


class _Writer:
    """Write a program, with `m` for the metadata and `d` for the task data."""

    def __init__(self, random):
        self.random = random

    def pick(self, *options):
        return self.random.choice(options)

    def key(self):
        return repr(self.random.choice(sorted(VALUES)))

    def data_key(self):
        return repr(self.random.choice(sorted(set(DATA) - {"noise"})))

    def constant(self, key):
        return repr(self.random.choice(VALUES[key] or ["w1", "w2"]))

    def value(self):
        """Write something that is read of the metadata."""
        key = self.key()
        return self.pick(
            f"m.get({key})",
            f"m.get({key})",
            f"m[{key}]",
            f"m.get({key}, 1)",
            f"dict(m).get({key})",
            f"{{**m}}.get({key})",
            f"dict.get(m, {key})",
            f"m.copy().get({key})",
            f"copy.copy(m).get({key})",
            f"copy.deepcopy(m).get({key})",
            f"(m | {{'more': 1}}).get({key})",
            f"json.loads(json.dumps(m)).get({key})",
            "m.get('tools', {}).get('gcc')",
            "m['tools']['gcc']",
            f"next((v for k, v in m.items() if k == {key}), None)",
            f"m.get(d.get('arch', 'arch'), m.get({key}))",
        )

    def condition(self, depth=2):
        """Write something that is true or false."""
        if depth and self.random.random() < 0.5:
            one, other = self.condition(depth - 1), self.condition(depth - 1)
            return self.pick(
                f"({one} and {other})", f"({one} or {other})", f"(not {one})", f"({one} if {other} else False)"
            )
        key = self.random.choice(["arch", "mem", "n", "free"])
        return self.pick(
            "m.get('arch') == d.get('arch')",
            "m.get('arch') == d.get('arch')",
            "m.get('mem', 0) >= d.get('mem', 0)",
            f"m[{key!r}] == {self.constant(key)}",
            f"m.get({key!r}) == {self.constant(key)}",
            f"m.get({key!r}) in ({self.constant(key)}, {self.constant(key)})",
            f"{self.key()} in m",
            f"{self.key()} not in m",
            "any(t in m.get('tags', ()) for t in d.get('tags', ()))",
            "all(t in m['tags'] for t in d['tags'])",
            "set(d.get('tags', [])) <= set(m.get('tags', []))",
            f"{self.value()} == {self.value()}",
            f"{self.value()} == {self.constant(key)}",
            f"bool({self.value()})",
            f"str({self.value()}) == {str(self.random.choice(VALUES[key]))!r}",
            f"isinstance({self.value()}, int)",  # an exact type is what tracking does not see
            f"isinstance(m, dict) and len(m) > {self.random.randrange(3, 8)}",
            f"len(m) % 2 == {self.random.randrange(2)}",
            "'amd64' in json.dumps(m, sort_keys=True)",
            "'arm' in repr(m)",
            "list(m)[0] == 'arch'",
            "sorted(m)[-1] == 'tools'",
            "m == {**m}",
            "m != {'arch': 'amd64'}",
            f"next(iter(reversed(m))) == {self.key()}",
            "d.get('deep', {}).get('n', 1) == m.get('n')",
            "d['deep']['n'] == m['n']",
            f"m.setdefault({self.key()}, 1) == 1",
            f"m.pop({self.key()}, None) is None",
            f"m.update(x=1) is None and len(m) > {self.random.randrange(3, 8)}",
            "hasattr(m, 'keys') and len(m.keys()) > 4",
            "len(d) > 2",
            "d == {'arch': 'amd64'}",
        )

    def statements(self, depth=2):
        """Write a body that returns."""
        if depth and self.random.random() < 0.4:
            body = textwrap.indent(self.statements(depth - 1), "    ")
            return f"if {self.condition(1)}:\n{body}\n{self.statements(depth - 1)}"
        if self.random.random() < 0.12:
            key = self.random.choice(["arch", "mem", "n"])
            return textwrap.dedent(
                f"""\
                match m:
                    case {{{key!r}: {self.pattern(key)}}}:
                        return {self.condition(1)}
                    case {{{self.key()}: _, **rest}}:
                        return len(rest) > 3
                    case _:
                        return {self.condition(0)}"""
            )
        return f"return {self.condition()}"

    def pattern(self, key):
        return repr(self.random.choice(VALUES[key]))


def write(random):
    """Return the source of a program; half of them are as people write them."""
    if random.random() < 0.5:
        return random.choice(
            [
                "return m.get('arch') == d.get('arch')",
                "return m.get('arch') == d.get('arch') and m.get('mem', 0) >= d.get('mem', 0)",
                "return True",
                "return all(t in m.get('tags', []) for t in d.get('tags', []))",
                "return m['arch'] in ('amd64', 'i386') and m['free'] >= 20",
                "return m.get('tools', {}).get('gcc', 0) >= 12",
                "return m.get('arch') == 'amd64' or d.get('arch') == m.get('arch')",
                # what one worker has looked at, another has not
                "return d.get('mem', 0) > 0 if m.get('arch') == 'arm64' else d.get('arch') != 'arm64'",
                "return m.get('free', 0) >= 30 or 'a' in d.get('tags', [])",
                "return m.get('n') != 1 or d.get('deep', {}).get('n') != 2",
            ]
        )
    return _Writer(random).statements()


def install(programs, hidden, *, version=1):
    """Give the task classes the programs of a seed."""
    for task, source in zip(TASKS, programs, strict=False):
        task.TASK_VERSION = version
        namespace = {"json": json, "copy": copy}
        text = f"def program(d, m):\n{textwrap.indent(source, '    ')}\n"
        exec(compile(text, f"<{task.name}>", "exec"), namespace)  # noqa: S102  # our own text
        task.source = source
        task.program = staticmethod(namespace["program"])
        task.hidden = frozenset(hidden.get(task.name, ()))


def says(task_name, data, metadata, requires=None):
    """Ask a program on plain copies; what raises says no."""
    task = Task._sub_tasks[task_name.lower()]
    if requires is not None and not Draft202012Validator(requires).is_valid(metadata):
        return False
    try:
        return bool(task.program(copy.deepcopy(data), copy.deepcopy(metadata)))
    except Exception:  # noqa: BLE001  # generated code raises anything
        return False


# ---------------------------------------------------------------- what they are asked about


def metadata_of(random, host):
    """Make a worker's metadata, in an order of its own."""
    keys = [key for key in sorted(VALUES) if key == "arch" or random.random() < 0.85]
    random.shuffle(keys)
    return {key: host if key == "host" else copy.deepcopy(random.choice(VALUES[key])) for key in keys}


def changed(random, metadata):
    """Make a change of metadata, often one that no decision depends on."""
    metadata = copy.deepcopy(metadata)
    if random.random() < 0.5:
        metadata["free"] = random.choice([*VALUES["free"], random.randrange(100)])
        return metadata
    key = random.choice([key for key in sorted(VALUES) if key != "host"])
    if random.random() < 0.2:
        metadata.pop(key, None)
    else:
        metadata[key] = copy.deepcopy(random.choice(VALUES[key]))
    return metadata


def data_of(random):
    """Make the task data of a request."""
    data = {key: copy.deepcopy(random.choice(DATA[key])) for key in sorted(DATA) if random.random() < 0.55}
    if random.random() < 0.02:
        data["bad"] = True
    return data

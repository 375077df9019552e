"""The README says what the code says: what is generated, what is named, what is to be typed."""

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import msgspec
import pytest
import typer
from prometheus_client.metrics import MetricWrapperBase

import mqworker
from mqworker import errors, requires, settings
from mqworker.cli import application
from mqworker.lifecycle import MOVES, Event, State
from mqworker.messages import GetRequests, Receipt, Submit, decode
from mqworker.metrics import SchedulerMetrics, WorkerMetrics
from mqworker.shell import INTERRUPTED, UNEXPECTED
from mqworker.topology import Topology
from tasks.sbuild import BACKENDS_VARIABLE, OPTIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WIDTH = 120


# ---------------------------------------------------------------- reading the README


def between(name: str) -> str:
    """Return what stands between the two markers of a block."""
    found = re.findall(rf"^<!-- {name} -->\n(.*?)^<!-- /{name} -->$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"expected one block <!-- {name} --> ... <!-- /{name} --> in README.md, got {len(found)}"
    return found[0]


def code_in(name: str, language: str) -> str:
    """Return the code of the one fenced block between two markers."""
    match = re.fullmatch(rf"```{language}\n(.*)```\n", between(name), re.DOTALL)
    assert match, f"expected one ```{language} block between the markers {name}"
    return match[1]


def spans() -> list[str]:
    """List what stands in single backquotes in the text."""
    text = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def typed() -> list[str]:
    """List the lines that the README tells to type."""
    blocks = re.findall(r"^( *)```sh\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [line.strip() for _, block in blocks for line in block.splitlines()]


def first_cells(heading: str) -> list[str]:
    """List the first cells of the table that has these words in its head."""
    lines = iter(README.splitlines())
    assert heading in lines, heading  # which also goes on to it
    assert next(lines).startswith("| ---")
    cells = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells.append(line.split("|")[1].strip())
    return cells


# ---------------------------------------------------------------- what is generated


def floors() -> str:
    lines = [line for line in (inspect.getdoc(mqworker) or "").splitlines() if line.startswith("    ")]
    return "```\n" + "\n".join(line[4:] for line in lines) + "\n```\n"


def moves() -> str:
    lines = ["| a request that is | may move by |", "| --- | --- |"]
    for state in (None, *State):
        row = [f"{event} to **{MOVES[state, event]}**" for event in Event if (state, event) in MOVES]
        if row:
            lines.append(f"| {state or 'new'} | {', '.join(row)} |")
    return "\n".join(lines) + "\n"


def metrics() -> str:
    shown: dict[str, list[str]] = {}  # a metric with its labels to who shows it
    for kind, role in ((SchedulerMetrics, "scheduler"), (WorkerMetrics, "worker")):
        for one in vars(kind(version="1")).values():
            if isinstance(one, MetricWrapperBase):
                name = one._name + ("_total" if one._type == "counter" else "")
                labels = f"{{{','.join(one._labelnames)}}}" if one._labelnames else ""
                shown.setdefault(f"`{name}{labels}`", []).append(role)
    lines = ["| shown by | metrics, with their labels |", "| --- | --- |"]
    lines += [
        f"| {' and '.join(roles)} | {' '.join(name for name, of in shown.items() if of == roles)} |"
        for roles in (["scheduler", "worker"], ["scheduler"], ["worker"])
    ]
    return "\n".join(lines) + "\n"


def options() -> str:
    items = [f"`{name}`" if one.value is None else f"`{name}={one.says}`" for name, one in OPTIONS.items()]
    lines = [""]
    for item in [*(f"{item}," for item in items[:-1]), f"{items[-1]}."]:
        if len(lines[-1]) + len(item) >= WIDTH:
            lines.append("")
        lines[-1] += f" {item}" if lines[-1] else item
    return "\n".join(lines) + "\n"


def dependencies() -> str:
    project = tomllib.loads(PYPROJECT)["project"]
    lines = ["| package | what for |", "| --- | --- |"]
    extras = {
        wanted: f" (extra `{extra}`)"
        for extra, names in project["optional-dependencies"].items()
        if extra != "dev"
        for wanted in names
    }
    for wanted in [*project["dependencies"], *extras]:
        reason = re.search(rf'"{re.escape(wanted)}"\]?,? *# (.*)$', PYPROJECT, re.MULTILINE)
        assert reason, f"expected a comment behind {wanted} in pyproject.toml that says what it is for"
        lines.append(f"| `{wanted}`{extras.get(wanted, '')} | {reason[1]} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("make", [floors, moves, metrics, options, dependencies])
def test_what_the_readme_takes_from_the_code_is_what_the_code_says(make):
    expected, name = make(), make.__name__

    if between(name) != expected:
        pytest.fail(f"put this into README.md between <!-- {name} --> and <!-- /{name} -->:\n{expected}", pytrace=False)


def test_the_floor_plan_is_the_one_that_is_enforced():
    contract = tomllib.loads(PYPROJECT)["tool"]["importlinter"]["contracts"][0]
    layers = [{name.strip().removeprefix("mqworker.") for name in layer.split("|")} for layer in contract["layers"]]
    plan: list[set[str]] = []
    for line in floors().splitlines()[1:-1]:
        named = set(re.findall(r"(\w+) \(", line))
        if line[15:16] != " ":  # else it goes on with the floor above
            plan.append(named)
        else:
            plan[-1] |= named

    assert layers == plan
    rooms = [*(ROOT / "mqworker").glob("*.py"), *(path.parent for path in (ROOT / "mqworker").glob("*/__init__.py"))]
    assert set.union(*layers) == {path.stem for path in rooms} - {"__init__"}


# ---------------------------------------------------------------- what is named


def test_every_promise_names_tests_that_exist():
    rows = re.findall(r"^\| (P\d) \|[^|]*\|(.*)\|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == [f"P{number}" for number in range(1, 9)]
    for name, cell in rows:
        tests = re.findall(r"`([^`]*)::([^`]*)`", cell)
        assert tests, name
        for file, test in tests:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_make_target_exists():
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [match[1] for text in (*spans(), *typed()) if (match := re.match(r"make ([a-z]+)", text))]

    assert {"demo", "test"} <= set(named) <= set(known)


def test_every_command_that_is_named_exists_with_its_flags():
    group = typer.main.get_command(application)
    named = [shlex.split(text)[1:] for text in spans() if re.match(r"mqworker [a-z]", text)]
    assert named
    for words in named:
        command = group
        while words and not words[0].startswith("-") and hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        flags = {flag for one in command.params for flag in one.opts}
        assert {word for word in words if word.startswith("--")} <= flags


def test_every_flag_that_is_named_is_one_of_some_command():
    def flags_of(command) -> set[str]:
        own = {flag for one in command.params for flag in one.opts}
        return own.union(*(flags_of(one) for one in getattr(command, "commands", {}).values()))

    options_of_sbuild = re.findall(r"`(--[A-Za-z-]+)", between("options"))
    named = {match[1] for text in spans() if (match := re.match(r"(--[A-Za-z-]+)", text))} - set(options_of_sbuild)

    assert named
    assert named <= flags_of(typer.main.get_command(application))


def test_every_line_to_type_is_a_command_line_that_is_understood():
    lines = [shlex.split(line, comments=True) for line in typed() if re.search(r"(^| )mqworker ", line)]
    lines = [words[words.index("mqworker") + 1 :] for words in lines if "rabbitmqctl" not in words]
    assert len(lines) > 10
    for words in lines:
        command, left, context = typer.main.get_command(application), words, None
        while hasattr(command, "commands"):  # what cannot be understood raises
            context = command.make_context("mqworker", left, parent=context)
            _, command, left = command.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context("mqworker", left, parent=context)


def test_the_requirements_to_type_can_be_used_and_hold_of_some_worker():
    lines = [shlex.split(line, comments=True) for line in typed() if "--requires" in line]
    schemas = [json.loads(words[words.index("--requires") + 1]) for words in lines]

    assert schemas
    assert [requires.problem(schema) for schema in schemas] == [None] * len(schemas)
    assert all(requires.satisfied(schema, {"system:cpu_count": 8}) for schema in schemas)
    assert not any(requires.satisfied(schema, {}) for schema in schemas)


def test_every_variable_that_is_named_is_read():
    read = {settings.variable(key) for key in (*settings.KEYS, *settings.URL_FILES)} | {
        *settings.FOREIGN_VARIABLES,
        BACKENDS_VARIABLE,
    }
    by_tests = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    named = set(re.findall(r"\bMQWORKER_[A-Z_]+", README))

    assert {name for name in named - read if f'"{name}"' not in by_tests} == set()


def test_every_file_that_is_named_exists_and_the_settings_file_is_read():
    named = {text for text in spans() if re.fullmatch(r"(tasks|mqworker|deploy|\.ci)/[\w./-]+|[A-Z]+\.md", text)}

    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).is_file()} == set()
    assert settings.load({}, {}, config=ROOT / "deploy" / "mqworker.toml").settings.worker.tags


def test_every_exchange_and_queue_is_in_the_table_and_no_other():
    topology = Topology("mqworker")
    queues = [
        *topology.queues(),
        topology.class_queue("<class>"),
        topology.report_queue("<epoch>"),
        topology.worker_queue("<name>", "<epoch>"),
        topology.follower_queue("<epoch>", ()),
    ]
    named = [name for cell in first_cells("| name | what | from | to |") for name in re.findall(r"`([^`]+)`", cell)]

    assert len(named) == len(set(named))
    assert {one.name for one in (*topology.exchanges(), *queues)} == {f"mqworker.{name}" for name in named}


def test_every_exit_code_is_in_the_table_and_no_other():
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.MqworkerError)]

    codes = {0, UNEXPECTED, INTERRUPTED, *(kind.exit_code for kind in kinds)}
    assert {str(code) for code in codes} == set(first_cells("| code | meaning |"))


# ---------------------------------------------------------------- what is to be sent and typed


def test_the_messages_are_read_and_written_as_they_stand():
    submission, receipt = code_in("submission", "json"), code_in("receipt", "json")
    [query] = [text for text in spans() if text.startswith('{"type"')]
    submit = decode(submission.encode(), Submit)

    assert msgspec.to_builtins(submit) == json.loads(submission) | {"type": "submit"}
    read = decode(receipt.encode(), Receipt)
    assert msgspec.to_builtins(read) == json.loads(receipt)
    assert [one.id for one in submit.requests] == [one.id for one in read.results]
    assert decode(query.encode(), GetRequests).ids


def test_the_task_runs_with_the_line_that_is_given_for_it(tmp_path):
    (tmp_path / "wordcount.py").write_text(code_in("task", "python"), encoding="utf-8")
    [line] = [line for line in typed() if "mqworker run" in line]
    words = shlex.split(line)
    environment = dict(word.split("=", 1) for word in words[: words.index("mqworker")])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mqworker", *words[words.index("mqworker") + 1 :]],
        cwd=tmp_path,
        env={name: text for name, text in os.environ.items() if not name.startswith("MQWORKER_")} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, textwrap.indent(done.stderr, "    ")
    assert done.stdout.splitlines()[-1] == "wordcount: success"
    assert "INFO: 3 words" in done.stderr
    assert (tmp_path / "kept" / "1-site-word-count" / "count.txt").read_text().split() == ["3", "text"]
    assert (tmp_path / "kept" / "2-mqworker-debug-logs" / "words.log").read_text() == "3\n"

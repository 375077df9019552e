"""The command line as a person or a script meets it: real processes, their output, errors and exit codes."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mqworker.amqp import declare
from mqworker.rights import rights_of
from mqworker.topology import Topology

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-P", "-m", "mqworker")
DEADLINE = 60.0


class Cli:
    """Run the command line in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MQWORKER_", "XDG_"))}
        self.environment = {**kept, "HOME": str(home), "MQWORKER_TIMEOUT": "1"}

    def at(self, url: str) -> "Cli":
        """Take a broker's URL, which has a password, from where it belongs."""
        self.environment["MQWORKER_AMQP_URL"] = url
        return self

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.home,
            env=self.environment,
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },
        )

    def __call__(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess:
        options = {} if given is None else {"stdin": subprocess.PIPE}
        with self.start(*arguments, **options) as process:
            output, errors = process.communicate(given, timeout=DEADLINE)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)


def refused(done: subprocess.CompletedProcess, code: int, said: str) -> None:
    """Expect one line of error, no traceback, nothing on standard output, and an exit code."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert re.fullmatch(r"mqworker: error: [^\n]+\n", done.stderr), done.stderr
    assert re.search(said, done.stderr), done.stderr


# ---------------------------------------------------------------- help and usage


def test_help_names_the_commands_and_the_exit_codes(cli):
    done = cli("--help")

    assert done.returncode == 0
    for command in ("submit", "show", "list", "logs", "abort", "retry", "workers", "tasks", "artifact", "scheduler"):
        assert re.search(rf"\b{command}\b", done.stdout)
    for command in ("worker", "demo", "run", "doctor", "version"):
        assert re.search(rf"\b{command}\b", done.stdout)
    assert "Exit codes: 0 it went well; 1" in done.stdout
    assert cli().stdout == done.stdout


def test_the_version_is_told(cli):
    assert cli("version").stdout.startswith("mqworker 0.")
    assert set(json.loads(cli("version", "--json").stdout)) == {"mqworker", "python"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["submit"], "Missing argument 'TASK'.*`mqworker submit --help`"),
        (["submit", "noop", "--prio", "3"], "No such option: --prio.*--priority"),
        (
            ["list", "--amqp-url=amqp://h/"],
            r"--amqp-url is for all commands.*: `mqworker --amqp-url \.\.\. list \.\.\.`",
        ),
        (["submit", "noop", "--priority", "5000"], "'--priority'"),
        (["submit", "noop", "--id", "seven"], "'--id'"),
        (["list", "--state", "busy"], "'--state'.*'running'"),
        (["show"], "Missing argument"),
        (["artifact", "get", "x"], "'ID'"),
        (["artifact"], "Missing command"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(cli, arguments, said):
    refused(cli(*arguments), 2, said)


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (["--data", '{"duration":'], None, "expected one JSON object from --data: "),
        (["--data", "[1]"], None, "expected one JSON object from --data, got list"),
        (["--file", "-"], "nonsense", "expected one JSON object from standard input"),
        (["--file", "absent.json"], None, "expected a readable file at absent.json: No such file"),
        (["--file", "-", "--data", "{}"], "{}", "expected --data or --file, got both"),
    ],
)
def test_task_data_that_are_no_json_object_are_refused_before_anything_is_opened(cli, arguments, given, said):
    refused(cli("submit", "noop", *arguments, given=given), 2, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--requires", '{"required":'], "expected one JSON object from --requires: "),
        (["--requires", "[]"], "expected one JSON object from --requires, got list"),
        (["--requires", "@absent.json"], "expected a readable file at absent.json: No such file"),
        (["--requires", "@own.json"], r"own\.json: \$\.properties\.x: unknown keyword .*did you mean 'minimum'\?"),
        (["--requires", '{"cpus": {"minimum": 2}}'], '--requires: .*into "properties", and into "required"'),
        (["--requires", '{"properties": {"x": {"pattern": "(a+)+$"}}}'], "inside an unbounded repeat"),
        (["--group", "my group"], "expected --group to be at most 100 letters.*got 'my group'"),
        (["--concurrency-key", ""], "expected --concurrency-key to be .*got ''"),
        (["--take", "input=0b9de263:debian:source-package"], "expected --take /POINTER=ID:CATEGORY, like"),
        (["--take", "/input/x=0b9de263"], "got '/input/x=0b9de263'"),
        (["--take", "/input/x=0b9de263:nonsense"], "expected --take /POINTER=ID:CATEGORY"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_anything_is_opened(cli, arguments, said):
    (cli.home / "own.json").write_text('{"properties": {"x": {"minimun": 3}}}')

    refused(cli("submit", "noop", *arguments), 2, said)


# ---------------------------------------------------------------- settings and brokers


def test_a_worker_does_not_start_with_a_slip_in_its_lists_of_tasks(cli):
    for flag in ("--allow-task", "--deny-task"):
        done = cli("--log-level", "error", "worker", flag, "noop", flag, "nop", "--state-dir", "state")

        refused(
            done, 3, rf"worker\.{flag[2:].replace('-', '_')}s, which are .*noop.*, got 'nop'; did you mean 'noop'\?"
        )
    assert not (cli.home / "state").exists()


def test_a_wrong_setting_names_its_key_and_its_source(cli):
    refused(cli("--timeout", "0", "list"), 3, r"timeout \(from --timeout\)")

    (cli.home / "mqworker.toml").write_text('amqp = "amqp://x"\n')
    refused(cli("list"), 3, r"unknown setting 'amqp' in mqworker\.toml; did you mean 'amqp_url'\?")
    refused(cli("worker"), 3, "unknown setting 'amqp'")

    refused(cli("--config", "absent.toml", "list"), 3, r"absent\.toml: No such file")


def test_a_broker_url_that_is_none_is_told_without_its_password(cli):
    done = cli.at("http://me:secret@host/")("list")

    refused(done, 3, "expected a broker URL of the form amqp://")
    assert "secret" not in done.stderr


def test_a_broker_that_is_not_there_is_told_with_its_address(cli):
    with socket.socket() as taken:  # bound, so that nobody else takes the port, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"amqp://guest:guest@127.0.0.1:{taken.getsockname()[1]}/"
        for arguments in (["list"], ["submit", "noop"], ["artifact", "list"], ["workers"]):
            refused(cli("--amqp-url", url, *arguments), 4, f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.live
def test_a_broker_that_refuses_is_told(cli, amqp_url):
    refused(cli.at(amqp_url.replace("@", "x@"))("list"), 3, "user")
    refused(cli.at(amqp_url.rpartition("/")[0] + "/nowhere")("list"), 3, "nowhere")


@pytest.mark.live
def test_without_a_scheduler_a_command_says_so(cli, amqp_url, prefix):
    refused(cli.at(amqp_url)("--prefix", prefix, "list"), 4, "no scheduler answers")
    refused(cli.at(amqp_url)("--prefix", prefix, "submit", "noop"), 4, "the broker has request .*confirmed")


def test_a_traceback_is_shown_only_if_asked_for(cli):
    assert "Traceback" not in cli("show", "--bogus").stderr
    cli.environment["MQWORKER_DEBUG"] = "1"
    done = cli("--timeout", "0", "list")

    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("mqworker: error: unusable value for timeout")


def test_every_command_starts_without_a_database_driver(cli):
    script = "import sys, mqworker.cli; sys.exit('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=cli.home, env=cli.environment, check=False)

    assert done.returncode == 0


# ---------------------------------------------------------------- tasks, and running one here


def test_tasks_are_listed_with_version_and_schema(cli):
    described = {task["name"]: task for task in json.loads(cli("tasks", "--json").stdout)}

    assert described["noop"]["version"] == 1
    assert json.loads(cli("tasks", "noop").stdout) == described["noop"]["schema"]
    assert re.search(r"^noop +1 +\S", cli("tasks").stdout, re.MULTILINE)
    refused(cli("tasks", "nope"), 2, "expected the name of a task .*noop.* got 'nope'")


def test_a_task_runs_here_and_now_and_its_artifacts_are_kept(cli):
    data = {"duration": 0.1, "progress": 2, "log_lines": 3, "artifacts": [5, 7]}
    done = cli("run", "noop", "--file", "-", "--keep", "kept", given=json.dumps(data))

    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "noop: success"
    assert "line 3 of 3" in done.stderr
    assert "50%" in done.stderr
    kept = {path.parent.name: path.stat().st_size for path in (cli.home / "kept").rglob("*") if path.is_file()}
    assert (kept["1-mqworker-noop-output"], kept["2-mqworker-noop-output"]) == (5, 7)


def test_what_becomes_of_a_run_here_is_one_json_document_and_an_exit_code(cli):
    done = cli("run", "noop", "--json", "--data", '{"artifacts": [3], "log_lines": 1}')
    assert done.returncode == 0
    read = json.loads(done.stdout)
    assert read["result"] == "success"
    assert read["artifacts"][0]["files"][0]["size"] == 3

    done = cli("run", "noop", "--json", "--data", '{"result": "failure"}')
    assert (done.returncode, json.loads(done.stdout)["result"]) == (1, "failure")

    done = cli("run", "noop", "--json", "--data", '{"result": "error"}')
    assert (done.returncode, json.loads(done.stdout)["result"]) == (1, "error")


def test_an_unknown_task_and_wrong_task_data_are_refused(cli):
    refused(cli("run", "nope"), 2, "expected the name of a task, got 'nope'")
    done = cli("run", "noop", "--data", '{"duration": -1, "bogus": 2}')
    refused(done, 2, r"bogus")
    refused(done, 2, r"\$\.duration")
    refused(cli("run", "noop", "--input", "x"), 2, "expected --input ID=PATH, got 'x'")


def test_ctrl_c_aborts_a_task_that_runs_here(cli):
    with cli.start("run", "noop", "--data", '{"duration": 600, "progress": 6000}') as process:
        assert process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE)

    assert process.returncode == 130
    assert "noop: aborted" in output


@pytest.fixture
def own_tasks(cli) -> Cli:
    """Tasks of the author's own, good and bad."""
    source = """
        import sys
        from mqworker.task import Task

        class Reader(Task):
            "Read an input."
            INPUT_ARTIFACT_CATEGORY = "site:notes"

            def input_artifact_ids(self):
                return [7]

            def _execute(self):
                artifact = self.world.fetch_artifact(7, self.world.work_directory)
                print("printed")
                self.world.write_log(artifact.category)
                self.world.write_log((self.world.work_directory / "more" / "a.txt").read_text())
                return True

        class Leaver(Task):
            "Call sys.exit."

            def _execute(self):
                sys.exit(0)

        class Escaper(Task):
            "Upload under a name that leads elsewhere."

            def _execute(self):
                self.world.upload_artifact(category="a:b", name="n", data={}, files={"../x": __file__})
                return True
    """
    (cli.home / "own_tasks.py").write_text(textwrap.dedent(source))
    (cli.home / "broken_tasks.py").write_text("import nothing_of_that_name\n")
    cli.environment["MQWORKER_TASK_MODULES"] = "own_tasks,broken_tasks"
    cli.environment["PYTHONPATH"] = str(cli.home)
    return cli


def test_a_run_here_takes_its_inputs_from_a_directory(own_tasks):
    (own_tasks.home / "notes" / "more").mkdir(parents=True)
    (own_tasks.home / "notes" / "more" / "a.txt").write_text("read me")

    done = own_tasks("run", "reader", "--input", "7=notes")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "reader: success")
    assert "printed" in done.stderr
    assert "site:notesread me" in done.stderr

    done = own_tasks("run", "reader")
    assert done.returncode == 1
    assert "say where its files are with --input 7=PATH" in done.stdout


def test_a_task_that_leaves_or_escapes_ends_in_error(own_tasks):
    done = own_tasks("run", "leaver")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "leaver: error: the task raised SystemExit: 0")

    done = own_tasks("run", "escaper", "--keep", "kept")
    assert done.returncode == 1
    assert not (own_tasks.home / "x").exists()
    assert not (own_tasks.home / "kept" / "x").exists()


def test_a_task_module_that_does_not_import_is_named_and_hides_no_other(own_tasks):
    done = own_tasks("tasks")

    assert done.returncode == 0
    assert "reader" in done.stdout
    assert "noop" in done.stdout
    assert "broken_tasks does not import" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_who_leaves_early_gets_no_complaint(cli):
    reading, writing = os.pipe()
    with cli.start("tasks", "--json", stdout=writing) as process:
        os.close(writing)
        os.close(reading)
        errors = process.stderr.read()

    assert errors == ""
    assert process.returncode == 141


# ---------------------------------------------------------------- the doctor


def test_the_doctor_says_of_each_thing_ok_or_what_to_do(cli):
    done = cli("--amqp-url", "amqp://guest:guest@127.0.0.1:1/", "doctor", "--json")

    checks = {check["what"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 3
    assert checks["broker"]["state"] == "problem"
    assert "start RabbitMQ" in checks["broker"]["advice"]
    assert {"store", "ledger", "state", "work", "tasks", "tools"} <= set(checks)
    assert checks["tasks"]["state"] == "ok"
    assert all(check["state"] == "ok" or check["finding"] for check in checks.values())


def test_the_doctor_shows_no_password_of_the_ledger(cli):
    cli.environment["MQWORKER_LEDGER"] = "postgresql://mqworker:geheim@127.0.0.1:1/pool?password=geheim"
    done = cli("--amqp-url", "amqp://guest:guest@127.0.0.1:1/", "doctor")

    assert "postgresql://mqworker:***@127.0.0.1:1/pool" in "".join(done.stdout.split())
    assert "geheim" not in done.stdout + done.stderr


@pytest.mark.live
def test_the_doctor_tries_the_rights_on_the_broker(cli, amqp_url, prefix):
    flags = ("--prefix", prefix, "--store", f"file://{cli.home}/store")
    done = cli.at(amqp_url)(*flags, "doctor")

    assert re.search(r"^ok +broker +RabbitMQ", done.stdout, re.MULTILINE), done
    assert re.search(rf"^ok +rights +may declare, write and read {prefix}", done.stdout, re.MULTILINE)
    assert re.search(r"^note +scheduler +none answers", done.stdout, re.MULTILINE)
    assert re.search(r"^note +store", done.stdout, re.MULTILINE)


@pytest.mark.live
def test_the_doctor_sees_that_a_user_may_not_answer_clients(cli, as_own_user, prefix):
    """With the rights of a worker a scheduler would lose its connection at the first answer."""
    rights = rf"^{prefix}\..*"
    url = as_own_user(configure=rights, write=rights, read=rights)
    done = cli.at(url)("--prefix", prefix, "doctor")

    said = " ".join(done.stdout.split())  # however wide the screen is
    assert re.search(r"note rights may [^;]*but not answer clients", said), done
    assert "amq.default" in said


@pytest.mark.live
def test_the_doctor_says_what_a_user_of_one_role_may_do(cli, own_amqp_url, as_own_user, prefix):
    topology = Topology(prefix)
    asyncio.run(declare(own_amqp_url, topology))
    for role in ("worker", "client", "observer"):
        rights = rights_of(role, topology)
        url = as_own_user(configure=rights.configure, write=rights.write, read=rights.read)
        done = cli.at(url)("--prefix", prefix, "doctor")

        said = " ".join(done.stdout.split())
        roles = "client or observer" if role == "client" else role
        assert f"ok rights may do what a {roles} does, and not all that a scheduler does" in said, done
    url = as_own_user(configure="^$", write="^$", read="^$")
    said = " ".join(cli.at(url)("--prefix", prefix, "doctor").stdout.split())
    assert "problem rights" in said
    assert "`mqworker topology permissions`" in said


# ---------------------------------------------------------------- a whole pool


@pytest.fixture
def pool(cli, amqp_url, prefix) -> Iterator[Cli]:
    """A scheduler and a worker, started as a person starts them."""
    cli.environment |= {
        "MQWORKER_AMQP_URL": amqp_url,
        "MQWORKER_PREFIX": prefix,
        "MQWORKER_STORE": f"file://{cli.home}/store",
        "MQWORKER_LEDGER": f"sqlite:///{cli.home}/ledger.db",
        "MQWORKER_SCHEDULER_METRICS_LISTEN": "",
        "MQWORKER_WORKER_METRICS_LISTEN": "",
        "MQWORKER_TIMEOUT": "30",
    }
    flags = ("--name", "w1", "--slots", "2", "--state-dir", "state", "--work-dir", "work", "--tag", "big")
    with (cli.home / "scheduler.log").open("w") as one, (cli.home / "worker.log").open("w") as two:
        scheduler = cli.start("scheduler", stdout=one, stderr=one)
        residents = [scheduler]
        try:
            cli("workers")  # answered once the scheduler runs and has made the store
            residents.append(cli.start("--log-format", "json", "worker", *flags, stdout=two, stderr=two))
            yield cli
        finally:
            for resident in reversed(residents):
                resident.send_signal(signal.SIGTERM)
            codes = [resident.wait(DEADLINE) for resident in reversed(residents)]
    assert codes == [0, 0], (cli.home / "scheduler.log").read_text() + (cli.home / "worker.log").read_text()


@pytest.mark.live
def test_a_request_goes_its_way_on_the_command_line(pool):
    data = json.dumps({"duration": 0.3, "progress": 3, "log_lines": 3, "artifacts": [5]})
    done = pool("submit", "noop", "--data", data, "--wait")
    request = done.stdout.strip()
    assert (done.returncode, done.stderr, str(uuid.UUID(request))) == (0, "", request), done

    assert json.loads(pool("show", request[:8], "--json").stdout)["state"] == "success"
    shown = pool("show", request[:8]).stdout
    assert re.search(r"^State +success on w1, ran ", shown, re.MULTILINE)
    assert "mqworker:noop-output" in shown
    [listed] = [line for line in pool("list").stdout.splitlines() if line.startswith(request[:8])]
    assert listed.split()[1:3] == ["noop", "success"]
    assert "line 3 of 3" in pool("logs", request).stdout
    assert "line 3 of 3" in json.loads(pool("logs", request, "--json").stdout)[0]["text"]

    [worker] = json.loads(pool("workers", "--refresh", "--json").stdout)
    assert worker["metadata"]["system:tags"] == ["big"]
    assert re.search(r"^w1 +online", pool("workers").stdout, re.MULTILINE)

    followed = pool("submit", "noop", "--data", data, "--follow")
    assert followed.returncode == 0
    assert "line 3 of 3" in followed.stdout

    failed = pool("submit", "noop", "--data", '{"result": "failure"}', "--wait", "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["reason"]["text"]
    again = pool("retry", json.loads(failed.stdout)["request"]["id"]).stdout.strip()
    assert json.loads(pool("show", again, "--json").stdout)["request"]["data"] == {"result": "failure"}

    refused(pool("submit", "noop", "--data", '{"bogus": 1}'), 2, "was not accepted: .*bogus")
    refused(pool("submit", "nope"), 2, "was not accepted: .*'nope'")
    refused(pool("submit", "noop", "--data", '{"duration": 5}', "--id", request), 2, request)
    refused(pool("show", "00000000-0000-4000-8000-000000000000"), 2, "no request")
    refused(pool("retry", "00000000-0000-4000-8000-000000000000"), 2, "00000000-0000")


@pytest.mark.live
def test_a_running_request_is_left_by_ctrl_c_and_stopped_by_abort(pool):
    with pool.start("submit", "noop", "--data", '{"duration": 600, "progress": 6000}', "--wait") as process:
        request = process.stdout.readline().strip()
        until_running(pool, request)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert errors == f"mqworker: request {request} goes on; `mqworker abort {request[:8]}` stops it\n"

    assert "follows it" in pool("logs", request).stderr
    with pool.start("logs", "-f", request) as follower:
        assert pool("abort", request[:8], "--reason", "seen enough").returncode == 0
        follower.communicate(timeout=DEADLINE)
    assert follower.returncode == 0
    shown = json.loads(pool("show", request, "--json").stdout)
    assert (shown["state"], shown["reason"]["text"]) == ("aborted", "seen enough")


def until_running(pool: Cli, request: str) -> None:
    end = time.monotonic() + DEADLINE
    while json.loads(pool("show", request, "--json").stdout)["state"] != "running":
        assert time.monotonic() < end, "it does not run"


@pytest.mark.live
def test_artifacts_go_in_and_out_on_the_command_line(pool):
    (pool.home / "a.txt").write_text("hello")
    imported = pool("artifact", "import", "a.txt", "--category", "site:notes", "--name", "n", "--data", "{}", "--json")
    [artifact] = json.loads(imported.stdout)

    assert [one["id"] for one in json.loads(pool("artifact", "list", "--json").stdout)] == [artifact["id"]]
    assert "a.txt" in pool("artifact", "show", str(artifact["id"])).stdout
    got = pool("artifact", "get", str(artifact["id"]), "-o", "out")
    assert got.stdout == "out/a.txt\n"
    assert (pool.home / "out" / "a.txt").read_text() == "hello"

    refused(pool("artifact", "get", "99"), 2, "no artifact 99")
    refused(pool("artifact", "import", "a.txt"), 2, "--category and --name")
    refused(pool("artifact", "import", "absent", "--category", "a:b", "--name", "n"), 2, "absent")
    evil = (
        "Format: 3.0 (native)\nSource: evil\nVersion: 1\nArchitecture: any\nChecksums-Sha256:\n {} 5 ../../etc/passwd\n"
        "Files:\n 0123456789abcdef0123456789abcdef 5 ../../etc/passwd\n"
    )
    (pool.home / "evil_1.dsc").write_text(evil.format("0" * 64))
    refused(pool("artifact", "import", "evil_1.dsc"), 2, r"\.\./\.\./etc/passwd")
    refused(pool("--store", f"file://{pool.home}/absent", "artifact", "get", "1"), 4, "absent")


@pytest.mark.live
def test_a_terminal_shows_a_progress_line_and_ends_with_the_request(pool):
    output = on_a_terminal(pool, "submit", "noop", "--data", '{"duration": 0.5, "progress": 5}', "--wait")

    assert re.search(r"request [0-9a-f-]{36} is accepted", output)
    assert re.search(r"[0-9a-f]{8} run .*\d+(ms|\.\ds) w1", output)
    assert re.search(r"State +success on w1", output)
    assert max(len(line) for line in re.split(r"[\r\n]+", output)) <= 80


def on_a_terminal(pool: Cli, *arguments: str) -> str:
    """Run a command on a terminal of 80 columns and return what it drew, without its escape sequences."""
    pool.environment |= {"TERM": "xterm", "COLUMNS": "80"}
    ours, theirs = pty.openpty()
    with pool.start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        while select.select([ours], [], [], DEADLINE)[0]:
            try:
                drawn += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
    os.close(ours)
    assert process.returncode == 0, drawn
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())

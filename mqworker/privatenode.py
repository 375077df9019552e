"""A private RabbitMQ node: own name, ports, cookie, data and epmd, all on loopback, for the demo and the tests.

Runs the rabbitmq-server of this machine, or that of another Debian in a folder, as the user who calls, root or not.
Knows nothing of AMQP beyond its first eight bytes, and nothing of what the node is used for.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from mqworker.errors import HostUnfit, OutsideError

# Debian's /usr/sbin wrappers change the user, the home and so the cookie, and refuse ordinary users; these do not.
SCRIPTS: Final = Path("/usr/lib/rabbitmq/bin")
PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
USER: Final = "mqworker"
NAME: Final = "mqworker"  # with an epmd of its own the name may be the same for all, and the data moves along
INSIDE: Final = "/mnt"  # where a node in a root finds its directory: the mounts of each are its own

# Keeps its process id through all of it; the mounts are nobody else's, and vanish with the process.
ENTER: Final = """
mkdir -p "$1$3" && mount --rbind /proc "$1/proc" && mount --rbind /dev "$1/dev" && mount --bind "$2" "$1$3" || exit 1
root=$1; shift 3; exec chroot "$root" "$@"
"""

START_SECONDS: Final = 60.0  # 3 to 6 s on an idle machine
STOP_SECONDS: Final = 30.0  # 6 s with the management plugin
POLL_SECONDS: Final = 0.02
LOG_TAIL_LINES: Final = 25

DEFAULTS: Final[Mapping[str, str]] = {
    "disk_free_limit.absolute": "50MB",  # small disks are fine for a private node
    "log.console": "true",
    "log.console.level": "info",
    "log.file": "false",
}


class PrivateNode:
    """Run a private RabbitMQ node in a directory; a context manager.

    The directory keeps its data, cookie and password: a later PrivateNode on it is the same broker on other ports.
    `settings` are lines of rabbitmq.conf, where {directory} stands for this one as the node sees it; `advanced` is the
    text of advanced.config, for keys that the former lacks. `root` is a folder with a Debian that has another
    rabbitmq-server in it. Nodes of a cluster have names of their own, one `epmd` (the port of somebody else's) and one
    `cookie`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        advanced: str | None = None,
        plugins: Sequence[str] = ("rabbitmq_management",),
        root: Path | None = None,
        name: str = NAME,
        epmd: int | None = None,
        cookie: str | None = None,
    ) -> None:
        self.directory = directory.resolve()
        self.log = self.directory / "node.log"
        self._settings = dict(settings or {})
        self._advanced = advanced
        self._plugins = tuple(plugins)
        self.root = root
        self.name = f"{name}@localhost"
        self._ports = _free_ports(5)
        self._amqp, self._management, self._prometheus, self._distribution, self._epmd_port = self._ports
        self._own_epmd = epmd is None
        if epmd is not None:
            self._epmd_port = epmd
            self._ports.pop()
        self._cookie = cookie
        self._home = self.directory / "home"
        self._password = ""
        self._log_begin = 0
        self._held = ExitStack()  # the ports, until the node has them
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The AMQP URL, with user, password and the vhost /."""
        return f"amqp://{USER}:{quote(self._password)}@127.0.0.1:{self._amqp}/%2F"

    @property
    def management_url(self) -> str:
        """The URL of the management pages and API, with user and password."""
        return f"http://{USER}:{quote(self._password)}@127.0.0.1:{self._management}"

    @property
    def prometheus_url(self) -> str:
        """Where the plugin rabbitmq_prometheus answers, if it is one of `plugins`."""
        return f"http://127.0.0.1:{self._prometheus}/metrics"

    @property
    def pid(self) -> int | None:
        """The node's process; None while it does not run."""
        return self._node.pid if self._node is not None else None

    def start(self) -> None:
        """Start the node and wait until it speaks AMQP.

        The kernel kills node and epmd when the thread that called this ends, so call it where it outlives the node.

        Raises:
            HostUnfit: a program is not there, or the node does not come up; the text ends with its log.
        """
        self.launch()
        self.await_up()

    def launch(self) -> None:
        """Start the node and do not wait: those of a cluster wait for each other.

        Raises:
            HostUnfit: a program is not there, or a port is taken.
        """
        if self._node is not None:
            raise HostUnfit(f"expected the node in {self.directory} to be stopped, but it runs; stop it first")
        find_programs(self.root)
        self._write_files()
        try:
            with ExitStack() as spare, self.log.open("ab") as log:
                spare.enter_context(_reserved(self._ports))
                self._log_begin = log.tell()
                if self._own_epmd:
                    self._epmd = self._spawn(
                        ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"], subprocess.DEVNULL
                    )
                self._node = self._spawn(self._inside([str(SCRIPTS / "rabbitmq-server")]), log.fileno())
                self._held = spare.pop_all()
        except BaseException:
            self.kill()
            raise

    def await_up(self) -> None:
        """Wait until a node that was launched speaks AMQP.

        Raises:
            HostUnfit: it does not come up; the text ends with its log.
        """
        try:
            self._await_amqp(self._log_begin)
        except BaseException:
            self.kill()
            raise
        finally:
            self._held.close()

    def stop(self) -> None:
        """End the node in order; after half a minute, at once."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the node as a power cut would; the data stays."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the node in order if it runs, and start it again on the same data and ports."""
        self.stop()
        self.start()

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node and return what it prints.

        Raises:
            OutsideError: the node does not run, or rabbitmqctl fails; the text holds what it said.
        """
        if self._node is None:  # without this node's epmd, rabbitmqctl would start one that outlives us
            raise OutsideError(f"expected a running node in {self.directory}, but it is stopped; start it first")
        done = subprocess.run(
            self._inside([str(SCRIPTS / "rabbitmqctl"), "--quiet", "--node", self.name, *arguments]),
            env=self._environment(),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise OutsideError(f"rabbitmqctl {' '.join(arguments)} failed with exit code {done.returncode}: {said}")
        return done.stdout

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()  # an orderly stop takes 6 s and keeps nothing more

    def _write_files(self) -> None:
        for directory in (self.directory, self._home, self.directory / "data", self.directory / "log"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep_secret(self._home / ".erlang.cookie", self._cookie)
        self._password = _keep_secret(self.directory / "password")
        base = str(self.directory if self.root is None else INSIDE)
        settings = {
            **DEFAULTS,
            "default_user": USER,
            "default_pass": self._password,
            "listeners.tcp.1": f"127.0.0.1:{self._amqp}",
            **{key: value.replace("{directory}", base) for key, value in self._settings.items()},
        }
        if "rabbitmq_management" in self._plugins:
            settings |= {"management.tcp.ip": "127.0.0.1", "management.tcp.port": str(self._management)}
        if "rabbitmq_prometheus" in self._plugins:
            settings |= {"prometheus.tcp.ip": "127.0.0.1", "prometheus.tcp.port": str(self._prometheus)}
        conf = self.directory / "rabbitmq.conf"
        conf.touch(mode=0o600)
        conf.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        (self.directory / "enabled_plugins").write_text(f"[{','.join(self._plugins)}].\n")
        if self._advanced is not None:
            (self.directory / "advanced.config").write_text(self._advanced)

    def _inside(self, command: list[str]) -> list[str]:
        """Return a command as it is run in this node's root, if it has one."""
        if self.root is None:
            return command
        user = ["--mount"] if os.getuid() == 0 else ["--user", "--map-root-user", "--mount"]
        enter = ["unshare", *user, "--propagation", "private", "/bin/sh", "-c", ENTER, "sh"]
        places = [str(self.root), str(self.directory), INSIDE]
        # A new user namespace forgets who is to die with whom, so it is said inside once more.
        return [*enter, *places, "setpriv", "--pdeathsig", "KILL", "--", *command]

    def _environment(self) -> dict[str, str]:
        base = self.directory if self.root is None else Path(INSIDE)
        # Nothing of the caller's: one leftover RABBITMQ_ or ERL_ variable changes everything.
        return {
            "PATH": PATH,
            "HOME": str(base / "home"),
            "LANG": "C.UTF-8",
            "PWD": str(self.directory),  # so that everybody can see whose node this is, in a root too
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_CONFIG_FILE": str(base / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(base / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(base / "advanced.config"),
            "RABBITMQ_MNESIA_BASE": str(base / "data"),
            "RABBITMQ_LOG_BASE": str(base / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(base / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(base / "pid"),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_AFLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",  # without it, Erlang listens on all interfaces
            "ERL_CRASH_DUMP_BYTES": "0",
            "RUNNING_UNDER_SYSTEMD": "true",  # the start script then execs: our child is the node itself, not a shell
        }

    def _spawn(self, command: list[str], output: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],  # noqa: S607  # found by PATH, which is our own
            env=self._environment(),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output != subprocess.DEVNULL else output,
            start_new_session=True,  # a Ctrl-C is for who runs us: we stop the node in order
        )

    def _await_amqp(self, begin: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._speaks_amqp():
            for name, process in (("epmd", self._epmd), ("rabbitmq-server", self._node)):
                if process is not None and process.poll() is not None:
                    raise HostUnfit(
                        f"expected {name} to run in {self.directory}, but it ended with exit code "
                        f"{process.returncode}; its log ends with:\n{self._log_tail(begin)}"
                    )
            if time.monotonic() > deadline:
                raise HostUnfit(
                    f"expected the node in {self.directory} to answer on 127.0.0.1:{self._amqp} within "
                    f"{START_SECONDS:.0f} s; its log ends with:\n{self._log_tail(begin)}"
                )
            time.sleep(POLL_SECONDS)

    def _speaks_amqp(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._amqp), timeout=5) as peer:
                peer.sendall(b"AMQP\x00\x00\x09\x01")
                return peer.recv(1) == b"\x01"
        except OSError:
            return False

    def _log_tail(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            lines = log.read().decode(errors="replace").splitlines()
        # Erlang's own reports come after what RabbitMQ says to people, and bury it.
        dump = next((n for n, line in enumerate(lines) if "supervisor: {" in line or "crasher:" in line), len(lines))
        return "\n".join(lines[:dump][-LOG_TAIL_LINES:])

    def _end(self, how: signal.Signals) -> None:
        self._held.close()
        if self._node is not None:
            # The whole process group at SIGKILL: while it boots, the start script has children of its own. Later ones
            # have groups of their own and end when the pipe from the node closes.
            send = os.killpg if how == signal.SIGKILL else os.kill
            if self._node.poll() is None:
                send(self._node.pid, how)
            try:
                self._node.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._node.pid, signal.SIGKILL)
                self._node.wait()
            self._node = None
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None


def find_programs(root: Path | None = None) -> None:
    """Check that the programs of a private node are there: rabbitmq-server in a root, if it is to run there.

    Raises:
        HostUnfit: one is not; the text says what to install.
    """
    if root is not None and not os.access(root / SCRIPTS.relative_to("/") / "rabbitmq-server", os.X_OK):
        raise HostUnfit(f"expected a Debian with RabbitMQ's own scripts in {root}{SCRIPTS}, found none")
    if not os.access(SCRIPTS / "rabbitmq-server", os.X_OK) or shutil.which("epmd", path=PATH) is None:
        raise HostUnfit(
            f"expected RabbitMQ's own scripts in {SCRIPTS}, found none; install them with "
            "`apt-get install --no-install-recommends rabbitmq-server`, or give the URL of a broker that runs"
        )
    if shutil.which("setpriv", path=PATH) is None:
        raise HostUnfit(
            "expected the program setpriv, found none; "
            "install it with `apt-get install --no-install-recommends util-linux`"
        )


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]  # all at once, so that all differ
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def _reserved(ports: Sequence[int]) -> Iterator[None]:
    # A node takes seconds to listen, and meanwhile the kernel may give its ports to anybody's outgoing connections, but
    # not while they are bound. Listening is nevertheless possible to who sets SO_REUSEADDR, as Erlang and epmd do.
    with ExitStack() as stack:
        for port in ports:
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind(("127.0.0.1", port))
            except OSError as error:
                raise HostUnfit(f"expected port {port} of the node to be free, but: {error.strerror}") from error
        yield


def _keep_secret(path: Path, secret: str | None = None) -> str:
    if not path.exists():
        path.touch(mode=0o600)  # Erlang refuses a cookie that others can read
        path.write_text(secret or secrets.token_hex(16), encoding="utf-8")
    return path.read_text(encoding="utf-8")

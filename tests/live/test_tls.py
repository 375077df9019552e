"""The broker's door over TLS, and with several hosts in its URL: real listeners, certificates by openssl."""

import asyncio
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import pytest

from mqworker import privatenode
from mqworker.amqp import Link, Plan
from mqworker.brokerurl import check_url, read_url
from mqworker.errors import BrokerRefused, BrokerUnavailable, SettingsError
from tests.proxy import Proxy

pytestmark = pytest.mark.live

SOON = 30


class Authority:
    """Make certificates."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.file = directory / f"{name}.pem"
        self.key = directory / f"{name}.key"
        _openssl("req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "9", "-subj", f"/CN={name}",
                 "-addext", "basicConstraints=critical,CA:TRUE", "-keyout", self.key, "-out", self.file)  # fmt: skip

    def certify(self, name: str, alternatives: str = "", days: int = 9) -> tuple[Path, Path]:
        """Return the files of a certificate and its key."""
        certificate, key = self.directory / f"{self.name}-{name}.pem", self.directory / f"{self.name}-{name}.key"
        asked, extensions = self.directory / "asked.csr", self.directory / "extensions"
        extensions.write_text(f"subjectAltName={alternatives}\n" if alternatives else "basicConstraints=CA:FALSE\n")
        _openssl("req", "-nodes", "-newkey", "rsa:2048", "-subj", f"/CN={name}", "-keyout", key, "-out", asked)
        _openssl("x509", "-req", "-in", asked, "-CA", self.file, "-CAkey", self.key, "-CAcreateserial",
                 "-days", days, "-extfile", extensions, "-out", certificate)  # fmt: skip
        key.chmod(0o600)
        return certificate, key


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@dataclass
class Encrypted:
    """A node that wants certificates of its clients, and who vouches for it."""

    node: privatenode.PrivateNode
    port: int
    ours: Authority
    theirs: Authority
    certificate: Path
    key: Path

    def url(self, *, host: str = "localhost", port: int | None = None, user: bool = True, **options: object) -> str:
        good = {"cacertfile": self.ours.file, "certfile": self.certificate, "keyfile": self.key}
        told = {word: value for word, value in {**good, **options}.items() if value is not None}
        query = "&".join(f"{word}={quote(str(value))}" for word, value in told.items())
        who = f"{urlsplit(self.node.url).netloc.rpartition('@')[0]}@" if user else ""
        return f"amqps://{who}{host}:{port or self.port}/%2F?{query}"


@pytest.fixture(scope="module")
def encrypted(nodes_of_module, tmp_path_factory) -> Encrypted:
    files = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(files, "ours"), Authority(files, "theirs")
    certificate, key = ours.certify("server", "DNS:localhost")
    [port] = privatenode._free_ports(1)
    node = nodes_of_module(
        own=files,
        plugins=("rabbitmq_auth_mechanism_ssl",),
        settings={
            "listeners.ssl.1": f"127.0.0.1:{port}",
            "ssl_options.cacertfile": f"{{directory}}/{ours.file.name}",
            "ssl_options.certfile": f"{{directory}}/{certificate.name}",
            "ssl_options.keyfile": f"{{directory}}/{key.name}",
            "ssl_options.verify": "verify_peer",
            "ssl_options.fail_if_no_peer_cert": "true",
            "auth_mechanisms.1": "PLAIN",
            "auth_mechanisms.2": "EXTERNAL",
            "ssl_cert_login_from": "common_name",
        },
    )
    return Encrypted(node, port, ours, theirs, *ours.certify("anna"))


@asynccontextmanager
async def running(url):
    """Run a link; what asyncio would only print fails the test."""
    printed = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: printed.append(context))
    link = Link(url, name="test", plan=lambda _: Plan())
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        await asyncio.wait_for(link.close(), SOON)
        await asyncio.wait_for(task, SOON)
    assert printed == []


async def error_of(url):
    """Return what the first try comes to, which is not to get in."""
    async with running(url) as link:
        while link.last_error is None:
            with suppress(BrokerUnavailable, BrokerRefused):
                await link.wait_up(0.05)
        assert link.epoch is None
        return link.last_error


def let_in(url):
    async def scenario():
        async with running(url) as link:
            await link.wait_up(SOON)
            return link.server[0]

    return asyncio.run(scenario())


# ---------------------------------------------------------------- TLS


@pytest.mark.parametrize("options", [{}, {"verify": "verify_none", "cacertfile": None}])
def test_both_ends_show_certificates_and_the_user_a_password(encrypted, options):
    assert let_in(encrypted.url(**options)) == "RabbitMQ"


def test_a_host_may_be_called_otherwise_than_its_certificate_says_if_the_url_tells_its_name(encrypted):
    assert let_in(encrypted.url(host="127.0.0.1", server_name_indication="localhost")) == "RabbitMQ"
    assert let_in(encrypted.url(host="127.0.0.1", server_name_indication="disable")) == "RabbitMQ"


def test_a_certificate_alone_says_who_we_are_where_it_is_asked_for(encrypted, eventually):
    encrypted.node.ctl("add_user", "anna", "unused")
    encrypted.node.ctl("set_permissions", "anna", ".*", ".*", ".*")
    assert let_in(encrypted.url(user=False, auth_mechanism="external")) == "RabbitMQ"
    eventually(lambda: "anna" not in encrypted.node.ctl("list_connections", "user"), "it has gone again")

    certificate, key = encrypted.ours.certify("nobody")
    url = encrypted.url(user=False, auth_mechanism="external", certfile=certificate, keyfile=key)
    error = asyncio.run(error_of(url))
    assert isinstance(error, BrokerRefused)
    assert "the user whom our certificate names" in str(error)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(
            lambda one: {"cacertfile": one.theirs.file}, "certificate in certificate chain", id="wrong authority"
        ),
        pytest.param(
            lambda _: {"cacertfile": None}, "certificate in certificate chain", id="authorities of the machine"
        ),
        pytest.param(lambda _: {"host": "127.0.0.1"}, "IP address mismatch", id="wrong address"),
        pytest.param(lambda _: {"server_name_indication": "elsewhere.example"}, "Hostname mismatch", id="wrong name"),
        pytest.param(lambda _: {"certfile": None, "keyfile": None}, "certfile and keyfile", id="no certificate"),
        pytest.param(
            lambda one: dict(zip(("certfile", "keyfile"), one.theirs.certify("eve"), strict=True)),
            "certfile and keyfile",
            id="a stranger's certificate",
        ),
        pytest.param(lambda one: {"port": urlsplit(one.node.url).port}, "write amqp://", id="the port without TLS"),
    ],
)
def test_who_does_not_get_in_over_tls_is_told_why_in_a_line(encrypted, change, told, caplog):
    url = encrypted.url(**change(encrypted))
    error = asyncio.run(error_of(url))
    assert isinstance(error, BrokerRefused), repr(error)
    assert told in str(error)
    assert "\n" not in str(error)
    assert urlsplit(encrypted.node.url).password not in str(error)
    assert caplog.records == []


def test_without_tls_at_the_port_for_it_the_error_names_it(encrypted):
    error = asyncio.run(error_of(urlunsplit(urlsplit(encrypted.url())._replace(scheme="amqp", query=""))))
    assert isinstance(error, BrokerUnavailable | BrokerRefused)
    assert "with TLS 5671" in str(error)


def test_a_certificate_that_has_expired_is_refused(encrypted):
    async def scenario():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*encrypted.ours.certify("old", "DNS:localhost", days=-1))
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        error = await error_of(encrypted.url(port=server.sockets[0].getsockname()[1]))
        server.close()
        await server.wait_closed()
        return error

    error = asyncio.run(scenario())
    assert isinstance(error, BrokerRefused)
    assert "has expired" in str(error)


def test_no_tls_older_than_1_2_is_spoken(encrypted):
    assert read_url(encrypted.url()).tls.context().minimum_version is ssl.TLSVersion.TLSv1_2


def test_files_that_are_not_what_they_should_be_are_named_before_anybody_is_dialled(encrypted, tmp_path):
    locked = tmp_path / "locked.key"
    _openssl("rsa", "-aes256", "-passout", "pass:x", "-in", encrypted.key, "-out", locked)
    (tmp_path / "nonsense").write_text("nonsense")
    for word, path in (
        ("cacertfile", tmp_path / "none"),
        ("cacertfile", tmp_path / "nonsense"),
        ("certfile", tmp_path / "none"),
        ("certfile", tmp_path / "nonsense"),
        ("keyfile", tmp_path / "none"),
        ("keyfile", locked),
        ("keyfile", encrypted.ours.key),
    ):
        with pytest.raises(SettingsError, match=f"{word} names in the broker's URL, {path}, but"):
            check_url(encrypted.url(**{word: path}))


def test_a_certificate_that_goes_missing_later_is_told_and_waited_for(encrypted, tmp_path):
    file = tmp_path / "ca.pem"
    file.write_bytes(encrypted.ours.file.read_bytes())

    async def scenario():
        with Proxy("127.0.0.1", encrypted.port) as proxy:
            async with running(encrypted.url(cacertfile=file, port=proxy.port)) as link:
                first = await link.wait_up(SOON)
                file.rename(tmp_path / "away")
                proxy.cut()
                while not isinstance(link.last_error, SettingsError):
                    with suppress(BrokerUnavailable, SettingsError):
                        await link.wait_up(0.05)
                    await asyncio.sleep(0.01)  # while it is up still
                (tmp_path / "away").rename(file)
                assert await link.wait_up(SOON) != first

    asyncio.run(scenario())


# ---------------------------------------------------------------- several hosts


def with_hosts(url, *hosts):
    return urlunsplit(urlsplit(url)._replace(netloc=f"{urlsplit(url).netloc.rpartition('@')[0]}@{','.join(hosts)}"))


async def another(link, epoch, wanted=()):
    """Wait for another epoch, or for none."""
    while (now := link.epoch) == epoch or (now is None and now not in wanted):  # noqa: ASYNC110  # no event tells it
        await asyncio.sleep(0.01)
    return now


def test_of_several_hosts_those_that_answer_are_found_and_the_next_one_after_a_failure(amqp_url):
    async def scenario():
        with Proxy.before(amqp_url) as one, Proxy.before(amqp_url) as two, socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            hosts = [f"127.0.0.1:{nobody.getsockname()[1]}", f"127.0.0.1:{one.port}", f"127.0.0.1:{two.port}"]
            async with running(with_hosts(amqp_url, *hosts)) as link:
                epoch = await link.wait_up(SOON)
                for _ in range(2):
                    here, there = (one, two) if one.open else (two, one)
                    here.refuse()
                    here.cut()
                    now = await another(link, epoch)
                    assert there.open
                    epoch = now
                    here.refuse(False)
                one.refuse()
                two.refuse()
                one.cut()
                two.cut()
                await another(link, epoch, wanted={None})
                with pytest.raises(BrokerUnavailable) as caught:
                    await link.wait_up(0.5)
                assert all(host in str(caught.value) for host in hosts)

    asyncio.run(asyncio.wait_for(scenario(), 2 * SOON))


def test_the_first_host_is_another_for_each_client():
    with Proxy("127.0.0.1", 1) as one, Proxy("127.0.0.1", 1) as two:

        async def scenario():
            url = f"amqp://127.0.0.1:{one.port},127.0.0.1:{two.port}"
            for _ in range(200):
                if one.accepted and two.accepted:
                    return
                await error_of(url)
            pytest.fail("two hundred clients all began with one host")

        asyncio.run(scenario())


def test_a_refusal_by_one_host_is_no_reason_not_to_try_the_next(amqp_url, encrypted):
    async def scenario():
        refusing, good = f"127.0.0.1:{urlsplit(encrypted.node.url).port}", f"127.0.0.1:{urlsplit(amqp_url).port}"
        for _ in range(8):  # whichever is the first
            async with running(with_hosts(amqp_url, refusing, good)) as link:
                await link.wait_up(SOON)
        async with running(with_hosts(amqp_url, refusing, refusing)) as link:
            with pytest.raises(BrokerRefused, match=f"one of {refusing}, {refusing}; vhost"):
                await link.wait_up(SOON)

    asyncio.run(scenario())


def test_a_host_may_be_an_ipv6_address(amqp_url):
    async def scenario():
        port = urlsplit(amqp_url).port
        try:
            server = await asyncio.start_server(lambda _reader, writer: writer.close(), "::1", 0)
        except OSError:
            pytest.skip("needs IPv6 on loopback")
        own = server.sockets[0].getsockname()[1]
        error = await error_of(f"amqp://u:secret@[::1]:{own}/v")
        assert f"[::1]:{own}" in str(error)
        assert "hung up" in str(error) or "lost the broker" in str(error)
        server.close()
        await server.wait_closed()
        async with running(with_hosts(amqp_url, f"[::1]:{own}", f"127.0.0.1:{port}")) as link:
            await link.wait_up(SOON)

    asyncio.run(scenario())


def test_how_long_it_may_take_to_get_in_is_an_option_in_milliseconds(amqp_url):
    async def scenario():
        with Proxy.before(amqp_url) as proxy:
            proxy.deafen()
            error = await error_of(f"{proxy.url(amqp_url)}?connection_timeout=300&heartbeat=5&channel_max=64")
            assert "did not let us in within 0.3 s" in str(error)

    asyncio.run(scenario())

"""What a broker's URL says: hosts, virtual host, who we are, and how to speak TLS. Opens no connection.

The options are RabbitMQ's own (its "URI query parameters"), so that one URL serves its other clients as well. A text
made here never holds the password.
"""

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, NoReturn
from urllib.parse import parse_qsl, unquote

from mqworker.errors import SettingsError

PORT: Final = 5672
TLS_PORT: Final = 5671
MAX_CHANNELS: Final = 65535
LEAST_CHANNELS: Final = 32  # one to work on, and others for questions whose refusal closes them

FORM: Final = "amqp://USER:PASSWORD@HOST:PORT,HOST2:PORT2/VHOST?OPTION=VALUE (or amqps://; the vhost / is written %2F)"
UNREADABLE: Final = "(an unreadable URL)"  # there is no telling where the password ends
TLS_OPTIONS: Final = ("cacertfile", "certfile", "keyfile", "verify", "server_name_indication")
OPTIONS: Final = (*TLS_OPTIONS, "auth_mechanism", "heartbeat", "connection_timeout", "channel_max")
_URL: Final = re.compile(r"(?P<scheme>amqps?)://(?P<at>[^/?#]*)(?P<path>/[^?#@]*)?(\?(?P<query>[^#@]*))?")
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^\[\]:@,/\s]+)(:(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class Host:
    """Name one of the broker's hosts."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Say whom to trust, as whom to go, and by what name the broker's certificate is to know it."""

    authorities: Path | None  # None: this machine's
    certificate: Path | None
    key: Path | None
    verify: bool
    server_name: str | None  # None: the name in the URL; empty: any

    def context(self) -> ssl.SSLContext:
        """Read the files, as they are now: certificates are renewed while residents run.

        Raises:
            SettingsError: one is not there, or holds something else; the text names the option and the file.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if not self.verify or self.server_name == "":
            context.check_hostname = False
        if not self.verify:
            context.verify_mode = ssl.CERT_NONE
        elif self.authorities is None:
            context.load_default_certs()
        else:
            with _told("cacertfile", "certificates of authorities in PEM", self.authorities):
                context.load_verify_locations(self.authorities)
        if self.certificate is not None:
            key = self.key or self.certificate
            with _told("certfile", "a certificate in PEM", self.certificate):
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(self.certificate)
            with _told("keyfile", "the certificate's private key in PEM, without a passphrase", key):
                context.load_cert_chain(self.certificate, key, password=lambda: _no_passphrase(key))
        return context


@dataclass(frozen=True, kw_only=True)
class BrokerUrl:
    """Hold what a URL says; `user` is None where the certificate alone says who we are."""

    hosts: tuple[Host, ...]
    vhost: str
    user: str | None
    password: str | None  # None: the certificate logs us in
    tls: Tls | None
    heartbeat: int | None  # seconds; None: as it is usual here; 0: none
    connection_timeout: float | None  # seconds, for all that it takes to get in
    channel_max: int | None


def check_url(url: str) -> str:
    """Check a broker's URL and the files that it names, and return it fit for showing, without its password.

    Raises:
        SettingsError: it is none; the text says what is wrong and never holds the password.
    """
    found = read_url(url)
    if found.tls is not None:
        found.tls.context()
    return redact(url)


def redact(url: str) -> str:
    """Return a broker's URL fit for showing: without its password and its options."""
    try:
        parts = _parts(url)
    except ValueError:
        return UNREADABLE
    user = "" if parts.user is None else f"{parts.user}@" if parts.password is None else f"{parts.user}:***@"
    return f"{parts.scheme}://{user}{parts.hosts}{parts.path}"


def read_url(url: str) -> BrokerUrl:
    """Read a broker's URL.

    Raises:
        SettingsError: it is none; the text says what is wrong and never holds the password.
    """
    try:
        parts = _parts(url)
    except ValueError:
        raise SettingsError(
            f"expected a broker URL of the form {FORM}, got {redact(url)}; "
            "characters such as / # ? @ in user or password have to be %-encoded"
        ) from None
    user, password = parts.user, parts.password
    hosts = _hosts(parts.hosts, TLS_PORT if parts.scheme == "amqps" else PORT)
    if parts.path.count("/") > 1:
        raise SettingsError(f"expected one vhost after the host, got {parts.path!r}; write / within it as %2F")
    options = _options(parts.query, redact(url))
    external = _choice(options, "auth_mechanism", ("plain", "external"), "plain") == "external"
    if external and (password is not None or parts.scheme != "amqps" or "certfile" not in options):
        raise SettingsError(
            f"expected amqps, certfile and no password beside auth_mechanism=external, got {redact(url)}: "
            "there the certificate says who we are; name that user, if users are to be told apart"
        )
    if not external and (user is None) != (password is None):
        raise SettingsError(f"expected user and password, or neither, got {redact(url)}; write {FORM}")
    timeout = _number(options, "connection_timeout", 1, 600_000)
    tls = None
    if parts.scheme == "amqps":
        tls = _tls(options)
    elif given := [word for word in TLS_OPTIONS if word in options]:
        raise SettingsError(f"expected amqps:// beside {', '.join(given)}, got {redact(url)}: amqp:// is not encrypted")
    return BrokerUrl(
        hosts=hosts,
        vhost=unquote(parts.path[1:]) if len(parts.path) > 1 else "/",
        user=unquote(user) if user is not None else None if external else "guest",
        password=unquote(password) if password is not None else None if external else "guest",  # for loopback
        tls=tls,
        heartbeat=_number(options, "heartbeat", 0, 3600),
        connection_timeout=None if timeout is None else timeout / 1000,
        channel_max=_number(options, "channel_max", LEAST_CHANNELS, MAX_CHANNELS),
    )


class _Parts(NamedTuple):
    scheme: str
    user: str | None  # this and all else as it is written
    password: str | None
    hosts: str
    path: str
    query: str


def _parts(url: str) -> _Parts:
    """Take a URL apart; the standard library's way knows no lists of hosts.

    Raises:
        ValueError: it is none; without its text, which could hold a piece of the password.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError
    before, found, hosts = match["at"].rpartition("@")
    user, colon, password = before.partition(":")
    _hosts(hosts, PORT)
    return _Parts(
        scheme=match["scheme"],
        user=user if found else None,
        password=password if colon else None,
        hosts=hosts,
        path=match["path"] or "",
        query=match["query"] or "",
    )


def _hosts(text: str, default: int) -> tuple[Host, ...]:
    found = []
    for written in text.split(","):
        match = _HOST.fullmatch(written)
        port = default if match is None or match["port"] is None else int(match["port"])
        if match is None or not 0 < port < 2**16:
            raise ValueError  # without the text: it could hold a piece of the password
        found.append(Host(match["name"].strip("[]"), port))
    return tuple(found)


def _options(query: str, shown: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for word, value in parse_qsl(query, keep_blank_values=True):
        if word not in OPTIONS:
            raise SettingsError(
                f"expected options that are known in the query of {shown}, which are {', '.join(OPTIONS)}, got {word!r}"
            )
        if not value or word in options:
            raise SettingsError(f"expected a value, and one, for the option {word} in the query of {shown}")
        options[word] = value
    return options


def _choice(options: Mapping[str, str], word: str, known: tuple[str, ...], default: str) -> str:
    value = options.get(word, default)
    if value not in known:
        raise SettingsError(f"expected {' or '.join(known)} for {word} in the broker's URL, got {value!r}")
    return value


def _number(options: Mapping[str, str], word: str, least: int, most: int) -> int | None:
    value = options.get(word)
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise SettingsError(f"expected a number from {least} to {most} for {word} in the broker's URL, got {value!r}")
    return int(value)


def _tls(options: Mapping[str, str]) -> Tls:
    def path(word: str) -> Path | None:
        return Path(options[word]) if word in options else None

    if "keyfile" in options and "certfile" not in options:
        raise SettingsError("expected certfile beside keyfile in the broker's URL, got keyfile alone")
    name = options.get("server_name_indication")
    return Tls(
        authorities=path("cacertfile"),
        certificate=path("certfile"),
        key=path("keyfile"),
        verify=_choice(options, "verify", ("verify_peer", "verify_none"), "verify_peer") == "verify_peer",
        server_name="" if name == "disable" else name,
    )


@contextmanager
def _told(word: str, what: str, path: Path) -> Iterator[None]:
    """Say whose file it is that cannot be read."""
    text = f"expected {what} in the file that {word} names in the broker's URL, {path}"
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(f"{text}, but: {error.strerror or error}") from error
    except _PassphraseWantedError as error:
        raise SettingsError(f"{text}, but: it has a passphrase") from error


class _PassphraseWantedError(Exception):
    """Come back from OpenSSL, which would otherwise ask at the terminal."""


def _no_passphrase(key: Path) -> NoReturn:
    raise _PassphraseWantedError(key)

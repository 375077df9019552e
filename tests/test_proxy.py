"""The tests' own proxy: it does what it is told, or what is proven with it is not."""

import socket
import threading
from contextlib import suppress

import pytest

from tests.proxy import Proxy


@pytest.fixture
def echo():
    """A server that says what it hears, and its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer(peer):
        with peer, suppress(OSError):
            while data := peer.recv(1000):
                peer.sendall(data)

    def serve():
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(10)


def dial(proxy):
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def said(peer, data=b"hello"):
    peer.sendall(data)
    got = b""
    while len(got) < len(data):
        more = peer.recv(100)
        if not more:
            break
        got += more
    return got


def silent(peer, data=b"hello"):
    peer.sendall(data)
    peer.settimeout(0.2)
    with pytest.raises(TimeoutError):
        peer.recv(1)
    peer.settimeout(10)


def test_a_proxy_passes_cuts_holds_and_leaves_half_open(echo):
    with Proxy("127.0.0.1", echo) as proxy:
        with dial(proxy) as peer:
            assert said(peer) == b"hello"
            proxy.hold()
            silent(peer)
            proxy.release()
            assert peer.recv(100) == b"hello"
            proxy.slow(delay=0.001, piece=2)
            assert said(peer) == b"hello"
            proxy.heal()
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                peer.recv(1)
        with dial(proxy) as lost, dial(proxy) as kept:
            assert said(lost) == said(kept) == b"hello"
            proxy.half_open()
            silent(lost)
            with dial(proxy) as fresh:
                assert said(fresh) == b"hello"
            proxy.deafen()
            with dial(proxy) as unheard:
                silent(unheard)
            proxy.refuse()
            with pytest.raises(ConnectionResetError), dial(proxy) as refused:
                refused.recv(1)
            proxy.heal()
            with dial(proxy) as fresh:
                assert said(fresh) == b"hello"


def test_a_url_leads_through_the_proxy_and_keeps_its_user_and_options():
    with Proxy.before("amqp://u:p@localhost:1/v?heartbeat=5") as proxy:
        assert proxy.url("amqp://u:p@localhost:1/v?heartbeat=5") == f"amqp://u:p@127.0.0.1:{proxy.port}/v?heartbeat=5"

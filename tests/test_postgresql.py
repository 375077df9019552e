"""What only PostgreSQL does to a ledger: terms, sessions that are cut, commits without an answer, refusals."""

import socket
import sys
import threading
import time
from contextlib import closing, suppress
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from sqlalchemy import exc

from mqworker.errors import LedgerInvalid, LedgerLocked, LedgerLost, LedgerUnavailable, SettingsError
from mqworker.facts import Accept, Offer, Pause, Wanted
from mqworker.ledger import Ledger
from mqworker.messages import Request

PATIENCE = 60.0  # seconds


def an_id(number=1):
    return f"00000000-0000-4000-8000-{number:012x}"


def accept(number=1, **fields):
    return Accept(seq=number, request=Request(id=an_id(number), task="noop", **fields), at=1.0, requirement=1)


def ask(url, statement):
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def cut(url):
    """End all sessions of a database but the one that asks for it."""
    ask(
        url,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid != pg_backend_pid()",
    )


def eventually(met, what):
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)  # between two looks at what has no event


@pytest.fixture
def url(postgresql_url):
    return postgresql_url


@pytest.fixture
def ledger(url):
    with closing(Ledger.open(url)) as ledger:
        yield ledger


def again(ledger, writes):
    """Commit as the scheduler does: the same set, until the ledger answers; say how often it did not."""
    return until_answered(lambda: ledger.commit(writes))


def until_answered(call):
    failures = 0
    while True:
        try:
            return call(), failures
        except LedgerUnavailable:
            failures += 1
            assert failures < 50


# ---------------------------------------------------------------- terms


def make_stale(url):
    """Let the active scheduler's last word be a minute old, as if it had been frozen since."""
    ask(url, "UPDATE renewals SET at = at - 60")


def test_what_a_scheduler_does_after_another_was_elected_counts_nowhere(url, monkeypatch):
    monkeypatch.setattr("mqworker.postgresql.RENEWAL_SECONDS", 3600.0)  # frozen
    with closing(Ledger.open(url)) as old:
        old.commit([accept(1)])
        make_stale(url)
        with closing(Ledger.open(url)) as new:
            assert (old.term, new.term) == (1, 2)
            with pytest.raises(LedgerLost, match="in term 1, but another one was elected"):
                again(old, [accept(2)])  # at first, that its session was ended
            with pytest.raises(LedgerLost):
                until_answered(old.counts)  # its session has been ended, and it gets no other
            assert new.counts() == {"pending": 1}
            old.close()
            assert new.commit([accept(2)])[0].status == "accepted"
            with pytest.raises(LedgerLocked):  # who lost its term takes no leave for the other
                Ledger.open(url)


def test_every_transaction_checks_the_term(url, ledger):
    ask(url, "UPDATE leader SET term = 2")  # as if the election had not ended the session

    with pytest.raises(LedgerLost):
        ledger.commit([accept(1)])

    assert ask(url, "SELECT count(*) FROM requests") == [(0,)]


def test_a_scheduler_that_cannot_be_sure_of_its_term_asks_before_it_says_anything(url, monkeypatch):
    monkeypatch.setattr("mqworker.postgresql.RENEWAL_SECONDS", 3600.0)
    with closing(Ledger.open(url)) as old:
        assert old.sure
        monkeypatch.setattr("mqworker.postgresql.SURE_SECONDS", 0.0)
        assert not old.sure
        assert old.commit([]) == []  # its term is its own still
        make_stale(url)
        with closing(Ledger.open(url)), pytest.raises(LedgerLost):
            again(old, [])


def test_a_term_is_renewed_also_while_a_set_is_being_committed(url, ledger):
    [[before]] = ask(url, "SELECT at FROM renewals")
    sure_since = ledger._database._renewed
    with ledger._database.transaction():
        eventually(lambda: ask(url, "SELECT at FROM renewals")[0][0] > before, "a renewal")
    eventually(lambda: ledger._database._renewed > sure_since, "the renewal is known")
    assert ledger.sure


def test_the_thread_that_renews_a_term_outlives_its_session_and_notices_its_loss(url, ledger, monkeypatch):
    monkeypatch.setattr("mqworker.postgresql.RENEWAL_SECONDS", 0.05)
    cut(url)
    [[before]] = ask(url, "SELECT at FROM renewals")
    eventually(lambda: ask(url, "SELECT at FROM renewals")[0][0] > before, "a renewal after the cut")
    assert ledger.sure

    ask(url, "UPDATE renewals SET term = 9")
    eventually(lambda: not ledger.sure, "the loss is noticed")


def test_a_scheduler_that_takes_its_leave_is_followed_at_once(url):
    for term in (1, 2, 3):
        with closing(Ledger.open(url)) as ledger:
            assert ledger.term == term
            with pytest.raises(LedgerLocked, match=r"process \d+ on .* is active"):
                Ledger.open(url)


def test_of_many_that_would_be_elected_one_is(url):
    opened, refused = [], []

    def stand():
        try:
            opened.append(Ledger.open(url))
        except LedgerLocked as error:
            refused.append(error)

    threads = [threading.Thread(target=stand) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(opened), len(refused)) == (1, 5)
    assert opened[0].term == 1
    opened[0].close()


def test_a_look_at_a_ledger_changes_nothing(url):
    before = ask(url, "SELECT * FROM leader"), ask(url, "SELECT * FROM renewals")

    assert Ledger.check(url).startswith("the ledger postgresql://mqworker:***@127.0.0.1:")

    assert (ask(url, "SELECT * FROM leader"), ask(url, "SELECT * FROM renewals")) == before


def test_a_look_at_an_empty_database_makes_nothing(postgresql_void):
    assert "is empty; the first scheduler makes its tables" in Ledger.check(postgresql_void)
    assert ask(postgresql_void, "SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []


# ---------------------------------------------------------------- sessions that are cut


def test_a_session_that_was_cut_is_replaced_and_nothing_is_lost_or_done_twice(url, ledger):
    ledger.commit([accept(1)])
    cut(url)

    results, failures = again(ledger, [accept(2), Offer(request=an_id(1), attempt=1, seq=1)])

    assert (results[0].status, results[1], failures) == ("accepted", True, 1)
    cut(url)
    with pytest.raises(LedgerUnavailable, match="cannot commit now"):
        ledger.counts()
    assert ledger.counts() == {"offered": 1, "pending": 1}


class Proxy:
    """Stand between a ledger and its database; do something once to what the ledger says with COMMIT."""

    def __init__(self, url, at_commit):
        self._target = urlsplit(url)
        self._at_commit = at_commit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = urlunsplit(
            self._target._replace(
                netloc=f"{self._target.netloc.rpartition('@')[0]}@127.0.0.1:{self._listener.getsockname()[1]}"
            )
        )
        self.armed = False
        self.held = []
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._target.hostname, self._target.port))
                self._sockets += [client, server]
                threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
                threading.Thread(target=self._back, args=(server, client), daemon=True).start()

    def _forward(self, client, server):
        with suppress(OSError):
            while data := client.recv(65536):
                if self.armed and b"COMMIT" in data:
                    self.armed = False
                    self._at_commit(self, client, server, data)
                    return
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _back(self, server, client):
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def close(self):
        self._listener.close()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def answer_lost(_proxy, client, server, data):
    """Let the database commit, and its answer get lost."""
    client.shutdown(socket.SHUT_RDWR)
    server.sendall(data)


def question_lost(_proxy, client, server, _data):
    """Let the word get lost on its way."""
    client.shutdown(socket.SHUT_RDWR)
    server.shutdown(socket.SHUT_RDWR)


def question_late(proxy, client, server, data):
    """Let the word hang somewhere in the network, while the database believes that the connection is well."""
    client.shutdown(socket.SHUT_RDWR)
    proxy.held.append((server, data))


@pytest.mark.parametrize("at_commit", [answer_lost, question_lost, question_late])
def test_a_commit_that_is_not_answered_is_done_once(url, at_commit):
    with closing(Proxy(url, at_commit)) as proxy, closing(Ledger.open(proxy.url)) as ledger:
        ledger.commit([accept(1), accept(2)])
        writes = [
            Offer(request=an_id(1), attempt=1, seq=1),  # done twice, its second result would be another
            accept(3),
            Pause(kind="worker", name="w1", reason="hot", at=1.0),
        ]
        proxy.armed = True
        results, failures = again(ledger, writes)
        for server, data in proxy.held:
            with suppress(OSError):
                server.sendall(data)

        assert failures in (1, 2)  # else it waited for the old session to end by itself
        assert not proxy.armed
        assert (results[0], results[1].status, results[2]) == (True, "accepted", True)
        assert ledger.counts() == {"offered": 1, "pending": 2}
        assert ledger.commit([Offer(request=an_id(2), attempt=1, seq=2)]) == [True]


def test_a_set_that_follows_an_unanswered_one_is_not_taken_for_it(url):
    with closing(Proxy(url, answer_lost)) as proxy, closing(Ledger.open(proxy.url)) as ledger:
        ledger.commit([accept(1)])
        proxy.armed = True
        with pytest.raises(LedgerUnavailable):
            ledger.commit([accept(2)])

        results, _ = again(ledger, [accept(3)])

        assert (results[0].status, results[0].seq) == ("accepted", 3)
        assert ledger.counts() == {"pending": 3}


# ---------------------------------------------------------------- what it cannot keep, and refusals


def test_a_nul_in_text_is_kept_as_a_sign_for_it_and_in_task_data_as_it_is(ledger):
    results = ledger.commit(
        [accept(1, data={"text": "a\0b"}), Pause(kind="worker", name="w\0", reason="no\0t well", at=1.0)]
    )

    assert (results[0].status, results[1]) == ("accepted", True)
    assert ledger.members(1, 1)[0].request.data == {"text": "a\0b"}
    assert [(pause.name, pause.reason) for pause in ledger.pauses()] == [("w\ufffd", "no\ufffdt well")]
    assert ledger.view([f"{an_id()[:8]}\0"])[1] == [f"{an_id()[:8]}\0"]
    assert ledger.heads([Wanted(1, 0, "default", None, 0, 9), Wanted(1, 0, "gr\0up", "k\0", 0, 9)])[1] == []


def test_numbers_of_64_bits_are_kept(ledger):
    big = 2**62
    ledger.commit([Accept(seq=big, request=Request(id=an_id(), task="noop"), at=1e18 / 7, requirement=big)])

    [live] = ledger.members(big, 1)
    assert (live.seq, live.submitted, ledger.newest()) == (big, 1e18 / 7, big)


def as_somebody(url, netloc):
    return urlunsplit(urlsplit(url)._replace(netloc=netloc))


def test_refusals_are_told_without_the_password(url):
    address = urlsplit(url).netloc.rpartition("@")[2]
    for wrong, error, words in (
        (as_somebody(url, f"mqworker:not-it@{address}"), LedgerInvalid, "correct user and password"),
        (as_somebody(url, f"nobody:not-it@{address}"), LedgerInvalid, "correct user and password"),
        (url + "_not", LedgerInvalid, "does not exist"),
        (as_somebody(url, "mqworker:not-it@127.0.0.1:1"), LedgerUnavailable, "whether the database runs"),
        (f"{url}?password=not-it&nonsense=1", SettingsError, "options that PostgreSQL knows"),
    ):
        for opening in (Ledger.open, Ledger.check):
            with pytest.raises(error, match=words) as caught:
                opening(wrong)
            assert "not-it" not in str(caught.value)
            assert urlsplit(url).password not in str(caught.value)


def test_a_database_that_may_only_be_read_is_told_and_used_when_it_may_be_written(url, ledger):
    name = urlsplit(url).path[1:]
    ask(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    cut(url)
    for _ in range(2):  # the first one notices the cut
        with pytest.raises(LedgerUnavailable) as caught:
            ledger.commit([accept(1)])
    assert "name the primary server" in str(caught.value)
    admin = f"{url}?options=-cdefault_transaction_read_only%3Doff"
    ask(admin, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    cut(url)

    assert again(ledger, [accept(1)])[0][0].status == "accepted"


def test_a_table_that_somebody_holds_is_told_and_used_when_it_is_free(url, ledger, monkeypatch):
    monkeypatch.setattr("mqworker.postgresql._SETTINGS", (("lock_timeout", "50ms"),))
    cut(url)
    with pytest.raises(LedgerUnavailable):
        ledger.counts()
    writes = [accept(1)]
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE requests IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(LedgerUnavailable, match="somebody else holds a table"):
            ledger.commit(writes)

    assert ledger.commit(writes)[0].status == "accepted"


def test_a_full_disk_of_the_server_is_told_in_its_own_words(ledger):
    error = _disguised("could not extend file: No space left on device", "53100")

    found = ledger._database.explain(error)

    assert isinstance(found, LedgerUnavailable)
    assert "free space on the disk of the database's server" in str(found)


def _disguised(text, code):
    class Full(psycopg.OperationalError):
        sqlstate = code

    return exc.OperationalError("COMMIT", {}, Full(text))


def test_a_missing_psycopg_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(SettingsError, match=r"pip install 'mqworker\[postgresql\]'"):
        Ledger.open("postgresql://me:secret@127.0.0.1/mq")


def test_who_may_stand_by():
    assert Ledger.may_stand_by("postgresql://me@db/mq")
    assert not Ledger.may_stand_by("sqlite:////var/lib/ledger.db")

from mqworker.blame import SHOWN, Blame
from mqworker.lifecycle import Tried


def bad(*workers, result="failure"):
    return [Tried(number, worker, result, "why") for number, worker in enumerate(workers, 1)]


def test_a_worker_is_to_blame_once_enough_requests_that_ended_badly_there_went_well_elsewhere():
    blame = Blame(3)

    assert [blame.succeeded(name, "bert", bad("anna")) for name in ("r1", "r2", "r3")] == [[], [], ["anna"]]
    assert blame.requests("anna") == ["r1", "r2", "r3"]
    assert blame.reason("anna").endswith("r1, r2, r3")


def test_lost_failed_and_erroneous_attempts_count_and_others_do_not():
    blame = Blame(1)

    for result in ("failure", "error", "lost"):
        assert blame.succeeded("r", "bert", bad("anna", result=result)) == ["anna"]
        blame.forget("anna")
    for result in ("aborted", "handed_back", "success"):
        assert blame.succeeded("r", "bert", bad("anna", result=result)) == []


def test_the_same_request_counts_once_and_against_each_of_its_workers():
    blame = Blame(2)

    assert blame.succeeded("r1", "bert", bad("anna", "anna", "carl")) == []
    assert blame.requests("anna") == blame.requests("carl") == ["r1"]


def test_a_request_that_succeeds_where_it_failed_before_speaks_against_nobody():
    blame = Blame(1)

    assert blame.succeeded("r1", "anna", bad("anna")) == []
    assert blame.requests("anna") == []


def test_a_success_on_a_worker_clears_it():
    blame = Blame(2)
    blame.succeeded("r1", "bert", bad("anna"))
    blame.succeeded("r2", "anna", [])

    assert blame.succeeded("r3", "bert", bad("anna")) == []
    assert blame.requests("anna") == ["r3"]


def test_without_a_limit_nobody_is_to_blame():
    blame = Blame(0)

    assert not any(blame.succeeded(f"r{number}", "bert", bad("anna")) for number in range(10))


def test_the_reason_names_so_many_requests_as_a_person_reads():
    blame = Blame(50)
    for number in range(50):
        blame.succeeded(f"r{number}", "bert", bad("anna"))

    assert blame.reason("anna").count("r1") == 1
    assert blame.reason("anna").endswith(f" and {50 - SHOWN} more")

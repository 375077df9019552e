"""Who may do what, as a rule: every pair of a user and a request, by each of the rules."""

import pytest

from mqworker import access
from mqworker.access import Access, WorkerNames

GROUPS = {"release": ["anna", "bert"], "empty": []}


def may(rule, user, submitter, group, operators=("chief",)):
    return Access(rule=rule, operators=operators, groups=GROUPS).command(user, submitter=submitter, group=group) is None


@pytest.mark.parametrize(
    ("user", "submitter", "group", "allowed"),
    [
        ("anna", "anna", "default", {"group", "own", "anyone"}),
        ("anna", "anna", "empty", {"group", "own", "anyone"}),  # hers, whoever is a member now
        ("anna", "bert", "release", {"group", "anyone"}),
        ("carl", "bert", "release", {"anyone"}),
        ("anna", "bert", "default", {"anyone"}),  # which has no members, but is open
        ("anna", None, "default", {"anyone"}),
        (None, None, "default", {"anyone"}),  # two who are not named need not be the same
        (None, "anna", "release", {"anyone"}),
        ("chief", "anna", "default", {"group", "own", "anyone"}),
        ("chief", None, "release", {"group", "own", "anyone"}),
    ],
)
def test_whose_requests_one_may_command(user, submitter, group, allowed):
    assert {rule for rule in ("group", "own", "anyone") if may(rule, user, submitter, group)} == allowed


def test_only_operators_command_the_pool_by_any_rule():
    for rule in ("group", "own", "anyone"):
        judge = Access(rule=rule, operators={"chief"}, groups=GROUPS)
        assert judge.operate("chief") is None
        assert "from an operator, got it from the broker's user anna" in judge.operate("anna")
        assert "whom the broker did not name" in judge.operate(None)


def test_only_members_and_operators_submit_into_a_group_that_has_members():
    judge = Access(operators={"chief"}, groups=GROUPS)

    assert [judge.submit(user, "release") is None for user in ("anna", "chief", "carl", None)] == [
        True,
        True,
        False,
        False,
    ]
    assert [judge.submit(user, "default") is None for user in ("anna", "carl", None)] == [True, True, True]
    assert "into the group empty from one of its members, got it from the broker's user anna" in judge.submit(
        "anna", "empty"
    )


def test_a_refusal_says_who_could():
    judge = Access(groups=GROUPS)
    assert "its submitter, a member of its group or an operator, got it from the broker's user carl" in judge.command(
        "carl", submitter="anna", group="release"
    )


def test_where_the_broker_names_nobody_all_is_one_users():
    judge = Access(operators={None})
    assert judge.operate(None) is None
    assert judge.command(None, submitter=None, group="default") is None


def test_a_workers_name_is_its_first_users_until_it_is_given_away():
    names = WorkerNames()
    assert names.speak("w", "anna") is None
    names.give("w", "anna")

    assert names.speak("w", "anna") is None
    assert "worker w from the broker's user anna, who was the first" in names.speak("w", "bert")
    assert "(no user_id)" in names.speak("w", None)
    assert names.speak("other", None) is None, "a name that is nobody's"

    names.give("w", "bert")
    assert (names.user("w"), names.speak("w", "bert")) == ("bert", None)
    names.give("w", None)
    assert (names.user("w"), names.speak("w", "anna")) == (None, None)


def test_one_user_has_not_any_number_of_names(monkeypatch):
    monkeypatch.setattr(access, "MOST_NAMES", 2)
    names = WorkerNames()
    names.give("a", "anna")
    names.give("b", "anna")
    names.give("b", "anna")

    assert "at most 2 names of workers of the broker's user anna" in names.speak("c", "anna")
    assert names.speak("c", "bert") is None
    names.give("b", None)
    assert names.speak("c", "anna") is None

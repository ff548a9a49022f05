"""How checks are run: what one of them does never stops the others, and a fault shows once."""

import logging
from types import SimpleNamespace

import pytest

from runner.checks.check import Check, Outcome, failed, passed, run_checks, skipped
from runner.checks.memory import available_bytes, peak_bytes, reset_peak, resident_bytes
from runner.errors import CheckpointError, ConfigError

BENCH = SimpleNamespace(shows=SimpleNamespace(track=lambda items, what, total=None: iter(items)))


def check(name: str, outcome, needs=(), **options) -> Check:
    def run(bench):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return Check(name=name, title=name, run=run, needs=needs, **options)


def statuses(*checks: Check) -> dict[str, str]:
    return {row["name"]: row["status"] for row in run_checks(checks, BENCH)}


def test_a_failure_does_not_stop_the_rest_and_skips_what_needs_it():
    found = statuses(
        check("a", failed("broken")),
        check("b", passed("fine")),
        check("c", passed("never run"), needs=("a", "b")),
        check("d", passed("never run"), needs=("c",)),
        check("e", passed("fine"), needs=("b", "not in this tier")),
    )
    assert found == {"a": "fail", "b": "pass", "c": "skipped", "d": "skipped", "e": "pass"}


def test_a_check_of_last_resort_waits_for_the_others():
    last = check("z", passed(""), unless_explained=True)
    assert statuses(check("a", failed("")), last) == {"a": "fail", "z": "skipped"}
    assert statuses(check("a", skipped("")), last) == {"a": "skipped", "z": "pass"}


def test_a_check_may_mind_a_failure_but_not_that_there_was_nothing_to_look_at():
    last = check("z", passed(""), unless_failed=("a",))
    assert statuses(check("a", failed("")), last) == {"a": "fail", "z": "skipped"}
    assert statuses(check("a", skipped("")), last) == {"a": "skipped", "z": "pass"}


def test_what_is_skipped_says_what_began_it():
    checks = [check("a", failed("broken")), check("b", passed(""), ("a",)), check("c", passed(""), ("b", "a"))]
    assert [row["details"] for row in run_checks(checks, BENCH)] == ["broken", "needs a", "needs a"]


def test_what_found_nothing_to_look_at_skips_what_needs_it():
    found = statuses(check("a", skipped("no saver")), check("b", passed("never run"), needs=("a",)))
    assert found == {"a": "skipped", "b": "skipped"}


def test_a_refusal_fails_with_its_own_words():
    (row,) = run_checks([check("a", CheckpointError("x.pt: truncated\nat byte 3"))], BENCH)
    assert (row["status"], row["details"]) == ("fail", "x.pt: truncated\\nat byte 3")


def test_a_defect_fails_and_is_logged(caplog):
    with caplog.at_level(logging.ERROR):
        rows = run_checks([check("a", ZeroDivisionError("oh")), check("b", passed("fine"))], BENCH)
    assert [row["status"] for row in rows] == ["fail", "pass"]
    assert rows[0]["details"] == "internal error (ZeroDivisionError: oh)"
    assert "Traceback" in caplog.text


def test_an_interrupt_is_no_failure():
    def interrupted(bench):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks([Check(name="a", title="a", run=interrupted)], BENCH)


def test_a_mistake_in_the_command_is_no_failure():
    with pytest.raises(ConfigError, match="no such file"):
        run_checks([check("a", ConfigError("tokenizer=x: no such file"))], BENCH)


def test_a_row_has_what_the_result_contract_says():
    outcome = Outcome(status="warning", details="near", score=0.5, recommendation="train on", data={"mse": 0.3})
    (row,) = run_checks([check("a", outcome, integrity=False)], BENCH)
    assert row.pop("seconds") >= 0
    assert row.pop("peak_bytes") > 1 << 20
    assert row == {
        "name": "a", "title": "a", "integrity": False, "status": "warning", "score": 0.5, "details": "near",
        "recommendation": "train on", "data": {"mse": 0.3},
    }  # fmt: skip


def test_the_peak_is_that_of_each_check():
    size = 64 << 20

    def large(bench):
        return passed(f"{len(bytearray(size))}")

    rows = run_checks(
        [check("before", passed("")), Check(name="l", title="l", run=large), check("b", passed(""))], BENCH
    )
    before, during, after = (row["peak_bytes"] for row in rows)
    assert during - before > size * 0.9
    assert during - after > size * 0.9


def test_memory_is_measured_in_bytes():
    reset_peak()
    assert 1 << 20 < resident_bytes() <= peak_bytes() + (1 << 20)
    assert available_bytes() > 1 << 20


@pytest.mark.parametrize("values", [{"status": "ok", "details": ""}, {"status": "pass", "details": "", "score": 2.0}])
def test_an_outcome_is_checked(values):
    with pytest.raises(AssertionError):
        Outcome(**values)

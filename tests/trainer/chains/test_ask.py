"""Requests to a server that fails in many ways: what is repeated, what ends the run, what is sent and kept."""

import dataclasses
import sys
from pathlib import Path

import pytest

from boxgrpo.trainer.chains.ask import read_reply
from boxgrpo.trainer.chains.make import main, make_cold_start
from chain_runs import KEY, chain, number, record, sources, written
from fake_openai import FakeOpenAI, Reply, well
from runs import flags

FAILURES = {
    "status_429": Reply(status=429, headers={"retry-after": "0.1"}),
    "status_500": Reply(status=500),
    "timeout": Reply(delay=1.5),
    "timeout of a body that comes byte by byte": Reply(trickle=0.3),
    "half_body": Reply(body=b'{"id": "x", "choices": [{"index": 0, "mess'),
    "half_body that is whole JSON": Reply(body=b'{"choices": []}'),
    "connection": Reply("<think>", missing=20),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_a_failed_request_is_repeated_and_counted(server, options, reason):
    """Each request fails once, then succeeds."""
    server.behave = lambda seen: FAILURES[reason] if seen.times == 1 else well(seen)
    slow = reason.startswith("timeout")  # on a busy machine a good answer may come too late as well
    summary = make_cold_start(options(1, timeout=0.6 if slow else 60.0))
    ((counted, count),) = summary["failed_requests"].items()
    assert summary["written"] == 1 and counted == reason.partition(" ")[0] and (count == 4 or (slow and count > 4))
    assert summary["answers"] == {"chain": 3, "judge": 1} and len(server.seen) == 4 + count


@pytest.mark.parametrize(("headers", "backoff"), [({"retry-after": "0.3"}, 0.0), ({}, 0.6)])
def test_a_request_waits_for_its_next_try(server, options, headers, backoff):
    """For the seconds of Retry-After, else for half to all of the back-off."""
    server.behave = lambda seen: Reply(status=429, headers=headers) if len(server.seen) == 1 else well(seen)
    make_cold_start(options(1, chains=1, backoff=backoff))
    assert server.seen[1].began - server.seen[0].began >= 0.3


def test_a_body_without_a_message_is_half_an_answer():
    choices = ("[]", "3", "[3]", '{"0": 1}', '[{"message": null}]', '[{"message": 3}]')
    bodies = [b"{}", b"[]", b'"good"', b'{"error": "busy"}', b"\xff"]
    for body in [*bodies, *(f'{{"choices": {value}}}'.encode() for value in choices)]:
        assert read_reply(body) is None


def test_a_truncated_answer_is_requested_again_and_counted(server, options):
    """All three chains are truncated, then the first once more."""

    def behave(seen):
        truncated = seen.kind == "chain" and len(server.of("chain")) <= 4
        return Reply("<think>It goes on and", finish="length") if truncated else well(seen)

    server.behave = behave
    o = options(1, tries=2, concurrency=1)
    summary = make_cold_start(o)
    assert summary["answers"]["chain"] == 6 and summary["tokens"]["chain"] == {"in": 6000, "out": 60}
    assert summary["chains"] == {"half_answer": 1, "passed": 2} and summary["written"] == 1
    assert len({seen.key for seen in server.seen}) == 7  # with another seed each time
    assert make_cold_start(o) == summary and len(server.seen) == 7  # nothing that was answered is requested again


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_in_a_field_of_its_own_is_put_before_the_answer(server, options, field):
    """Not a judge's: it may name the best more than once. Nor one that comes beside a <think> in the text."""

    def behave(seen):
        if seen.kind == "judge":
            return Reply("Best: 2", extra={field: "Best: 1?"})
        thought = "<think>For all.</think>" if seen is server.seen[0] else ""
        return Reply(f"{thought}<answer>{seen.box}</answer>", extra={field: "\nFor me.\n"})

    server.behave = behave
    o = options(1, concurrency=1)
    assert make_cold_start(o)["chains"] == {"passed": 3}
    thoughts = [text.partition("<answer>")[0] for text in server.of("judge")[0].replies]
    assert thoughts == ["<think>For all.</think>", "<think>For me.</think>", "<think>For me.</think>"]
    assert written(o)[0]["messages"][1]["content"].startswith(thoughts[1])


def test_a_record_without_answers_is_left_out_and_requested_next_time(server, options, caplog):
    replies = {1: Reply(status=503), 2: Reply("no such image", status=400)}
    server.behave = lambda seen: replies.get(number(seen)) or well(seen)
    o = options([*map(record, range(4)), record(4, images=["0.png", "gone.png"])], tries=2)
    summary = make_cold_start(o)
    assert summary["written"] == 2 and summary["left_out"] == {"status_503": 1, "status_400": 1, "bad_image": 1}
    assert summary["failed_requests"] == {"status_503": 6, "status_400": 3}  # 400 is not repeated
    assert "data.json#2 is left out: status_400" in caplog.text and "no such image" in caplog.text
    assert "gone.png" in caplog.text

    server.behave, before = well, len(server.seen)
    summary = make_cold_start(o)
    assert summary["left_out"] == {"bad_image": 1} and sources(o) == [0, 1, 2, 3]
    assert {number(seen) for seen in server.seen[before:]} == {1, 2}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_the_key_or_the_model_ends_the_run(server, options, status):
    server.behave = lambda seen: Reply("not for you", status=status)
    with pytest.raises(ValueError, match=f"status_{status} for model 'writer'.*not for you.*--base_url"):
        make_cold_start(options(50, concurrency=2))
    assert len(server.seen) < 10


def test_a_dead_server_ends_the_run_and_keeps_the_output(server, options):
    """And each answer as it came: none is requested again."""
    o = options(4, tries=1, max_failures=5, concurrency=2)
    make_cold_start(o)
    before = written(o)
    server.behave = lambda seen: well(seen) if seen in server.of("chain")[:15] else Reply(status=500)
    o = dataclasses.replace(o, temperature=0.5)  # no answers of that temperature are kept yet
    with pytest.raises(ValueError, match=r"failed in a row: 5.*status_500.*answers\.sqlite3"):
        make_cold_start(o)
    assert written(o) == before
    kept, sent = {seen.key for seen in server.seen if seen.answered}, len(server.seen)
    server.behave = well
    make_cold_start(o)
    assert len(kept) == 16 + 3 and not kept & {seen.key for seen in server.seen[sent:]}
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="failed in a row: 5.*connection"):
        make_cold_start(dataclasses.replace(o, temperature=0.25))


def test_the_key_is_sent_and_written_nowhere(server, options, caplog, capsys):
    def behave(seen):
        if number(seen) == 1:
            return Reply(f"bad key {seen.headers['authorization']}", status=400)
        return chain(seen.box, f"My headers: {seen.headers['authorization']}") if seen.kind == "chain" else well(seen)

    server.behave = behave
    caplog.set_level("DEBUG")
    o = options(2)
    main(flags(o))
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in server.seen)
    assert "bad key Bearer ***" in caplog.text
    files = "".join(path.read_text(errors="replace") for path in Path(o.output_dir).iterdir())
    assert "My headers: Bearer ***" in files and "1 of 2 records" in capsys.readouterr().out
    assert KEY not in files + caplog.text


def test_a_short_key_is_a_word_that_answers_may_hold(server, options, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "there")
    server.behave = lambda seen: chain(seen.box) if seen.kind == "chain" else well(seen)
    make_cold_start(o := options(1))
    assert "<think>It is there.</think>" in written(o)[0]["messages"][1]["content"]


def test_a_judge_on_another_server_has_its_own_key(server, options, monkeypatch):
    with FakeOpenAI() as other:
        o = options(1, judge_base_url=other.url)
        with pytest.raises(ValueError, match="JUDGE_API_KEY is not set.*any word"):
            make_cold_start(o)
        monkeypatch.setenv("JUDGE_API_KEY", "another")
        assert make_cold_start(o)["written"] == 1
        assert [s.headers["authorization"] for s in other.seen] == ["Bearer another"] and not server.of("judge")


def test_requests_at_once_are_bounded(server, options):
    server.behave = lambda seen: dataclasses.replace(well(seen), delay=0.02)
    make_cold_start(options(4, concurrency=3))
    assert server.most_at_once == 3


def test_requests_in_a_minute_are_bounded(server, options):
    """1200 a minute: one every 50 ms, repeated ones included."""
    server.behave = lambda seen: Reply(status=500) if seen.times == 1 else well(seen)
    make_cold_start(options(1, requests_per_minute=1200, backoff=0.0))
    began = [seen.began for seen in server.seen]
    assert len(began) == 8 and began[-1] - began[0] > 0.25  # 0.35, less the delay of the first


def test_without_key_or_client_the_error_names_the_remedy(server, options, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        make_cold_start(options(1))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="an import fails.*openai.*pip install 'openai"):
        make_cold_start(options(1))

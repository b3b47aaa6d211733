"""make_cot against an HTTP server that fails in many ways: what is sent, what is kept, what is never sent twice."""

import contextlib
import dataclasses
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from boxgrpo.trainer.chains.journal import Journal
from boxgrpo.trainer.chains.judge import check_chains, read_verdict
from boxgrpo.trainer.chains.make import CotOptions, main, make
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from fake_openai import FakeOpenAI, Reply, well

KEY = "sk-a-secret-of-this-test"
EARLIER_KEY = "d56dd6019e4f4a30061bb510a64e6385"  # of the first chain of record(0)
SIZES = ((270, 210), (60, 80), (20, 40), (200, 150))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture
def server():
    with FakeOpenAI() as started:
        yield started


@pytest.fixture
def options(server, tmp_path):
    """options(records, **changes) -> CotOptions for so many records, or those given, with images of SIZES."""
    for k, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{k}.png")

    def made(records, **changes):
        if isinstance(records, int):
            records = [record(k) for k in range(records)]
        (tmp_path / "data.json").write_text(json.dumps(records))
        values = {"base_url": server.url, "model": "writer", "judge_model": "judge", "backoff": 0.01}
        values |= {"max_pixels": 9000, "data": str(tmp_path / "data.json"), "output_dir": str(tmp_path / "out")}
        return CotOptions(**values | changes)

    return made


def record(k, **changes):
    box = [7 * k, 5 * k, 7 * k + 90, 5 * k + 60]
    return {"images": ["0.png", f"{1 + k % 3}.png"], "question": f"Where is thing {k}?", "answer": box} | changes


def flags(o):
    return [f"--{name}={value}" for name, value in vars(o).items() if value not in (None, "")]


def kept(o):
    """The answers in the journal, which no process has open."""
    with contextlib.closing(sqlite3.connect(Path(o.output_dir, "answers.sqlite3"))) as database:
        return [json.loads(entry) for (entry,) in database.execute("SELECT entry FROM entries WHERE key IS NOT NULL")]


def written(o):
    return json.loads(Path(o.output_dir, "cold_start.json").read_text())


def chain(box, thought="It is there."):
    return Reply(f"<think>{thought}</think><answer>{box}</answer>")


def test_records_are_written_as_stage_1_with_the_chain_that_the_judge_chose(server, options, newborn):
    def behave(seen):
        return Reply("2 is the clearest. Best: 2") if seen.kind == "judge" else well(seen)

    server.behave = behave
    o = options(4)
    summary = make(o)
    assert (summary["records"], summary["written"], summary["left_out"]) == (4, 4, {})
    assert summary["chains"] == {"passed": 12}

    sent, judged = server.of("chain"), server.of("judge")
    assert len(sent) == 12 and len({seen.key for seen in sent}) == 12 and len(judged) == 4
    for seen in server.seen:
        k = int(re.search(r"\d+", seen.question)[0])
        assert seen.question == record(k)["question"]
        assert [int(v) for v in re.findall(r"\d+", seen.box)] == record(k)["answer"]
        assert seen.body["model"] == {"chain": "writer", "judge": "judge"}[seen.kind]
        large, small = seen.images
        assert large.format == "JPEG" and 8000 < large.width * large.height <= 9000
        assert abs(large.width / large.height - 270 / 210) < 0.03
        assert small.size == {0: (60, 80), 1: (28, 56), 2: (106, 84)}[k % 3] or small.width * small.height > 8000

    examples, faults = read_examples(f"{o.output_dir}/cold_start.json")
    assert not faults and [e.question.count("<image>") for e in examples] == [2] * 4
    sources, _ = read_examples(o.data)
    processor = Processor.from_pretrained(newborn, min_pixels=784, max_pixels=50_000)
    for example, source, made in zip(examples, sources, written(o), strict=True):
        assert (example.images, example.gold, example.id) == (source.images, source.gold, source.id)
        second = next(seen for seen in judged if seen.question == source.question).replies[1]
        assert example.turns[1] == ("assistant", second)
        cot = made["cot"]
        assert (cot["model"], cot["judge"], cot["iou"], cot["passed"]) == ("writer", "judge", 1.0, 3)
        assert (cot["source"], cot["gold"]) == (source.source, list(source.gold))
        # The prompt that the cold start learns is that of GRPO and of the evaluation.
        prompt = processor.prompt(source).input_ids
        assert processor.conversation(example).input_ids[: len(prompt)].tolist() == prompt.tolist()


def test_images_are_named_from_the_image_root(options, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    o = options(2, image_root=str(tmp_path), output_dir=str(tmp_path / "elsewhere/deep"))
    make(o)
    assert written(o)[1]["images"] == ["0.png", "2.png"]
    assert len(read_examples(f"{o.output_dir}/cold_start.json", image_root=tmp_path)[0]) == 2


GOOD = "<think>It is there.</think><answer>(0, 0), (100, 100)</answer>"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GOOD, "passed"),
        (GOOD.replace("<answer>", "\n<answer>"), "passed"),
        (GOOD.replace("(100, 100)", "(100, 51)"), "passed"),
        (GOOD.replace("(100, 100)", "(100, 50)"), "wrong_box"),  # IoU 0.5, not above it
        (GOOD.replace("(0, 0)", "(500, 500)"), "wrong_box"),
        (f"Sure! {GOOD}", "bad_form"),
        (f"{GOOD} Bye.", "bad_form"),
        (f"```{GOOD}```", "bad_form"),
        (GOOD.replace("It is there.", " "), "bad_form"),
        (GOOD.replace("It is", "<think>It is"), "bad_form"),
        (GOOD.replace("there.", "<answer>(0, 0), (100, 100)</answer>"), "bad_form"),
        (GOOD.replace("It is", "<|im_end|>"), "bad_form"),
        (GOOD.replace("It is", "<image>"), "bad_form"),
        (GOOD.replace("It is", "\ud83e"), "bad_form"),
        (GOOD.replace("(0, 0), (100, 100)", "[0, 0, 100, 100]"), "bad_form"),
        ("", "bad_form"),
    ],
)
def test_a_chain_must_have_the_form_and_the_box(text, word):
    words, ious = check_chains([GOOD, text], (0, 0, 100, 100), 0.5)
    assert words == ["passed", word] and ious[0] == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Best: 2", 2),
        ("Reply 1 is vague. Reply 3 is best.\n**Best: 1**", 1),
        ("The best one is 3", 3),
        ("Best: 1? No.\nBest: 0", 0),
        (" 2.\n", 2),
        ("Best: 4", None),
        ("Best: 99999999", None),
        ("Best: none", None),
        ("I like reply 2.", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_number_after_best(text, number):
    assert read_verdict(text, 3) == number


def test_only_chains_that_pass_are_judged_and_the_judge_may_refuse_all(server, options):
    """Record 0: all wrong; 1: one passes and is judged alone; 2: none is sound; 3: no such number."""
    requests = []

    def behave(seen):
        k = int(seen.question.split()[-1][:-1])
        if seen.kind == "judge":
            return Reply({1: "Best: 1", 2: "None convinces. Best: 0", 3: "Best: 7"}[k])
        requests.append(k)
        if k == 0 or (k == 1 and requests.count(1) != 2):
            return chain("(500, 500), (900, 900)") if len(requests) % 2 else Reply("It is on the left.")
        return well(seen)

    server.behave = behave
    o = options(4, concurrency=1)
    summary = make(o)
    ((made,), alone) = written(o), server.of("judge")[0]
    assert made["cot"]["passed"] == 1 and made["messages"][1]["content"] == alone.replies[0]
    assert summary["written"] == 1
    assert summary["left_out"] == {"no_chain_passed": 1, "none_sound": 1, "verdict_unreadable": 1}
    assert summary["chains"]["passed"] == 7 and summary["chains"]["wrong_box"] + summary["chains"]["bad_form"] == 5
    assert [len(seen.replies) for seen in server.of("judge")] == [1, 3, 3]
    sent = len(server.seen)
    assert make(o) == summary and len(server.seen) == sent  # nothing of this is requested again


FAILURES = {
    "status_429": Reply(status=429, headers={"retry-after": "0.1"}),
    "status_500": Reply(status=500),
    "timeout": Reply(delay=1.5),
    "timeout of a body that comes byte by byte": Reply(trickle=0.3),
    "half_body": Reply(body=b'{"id": "x", "choices": [{"index": 0, "mess'),
    "connection": Reply("<think>", missing=20),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_a_failed_request_is_repeated_and_counted(server, options, reason):
    """Each request fails once, then succeeds."""
    server.behave = lambda seen: FAILURES[reason] if seen.times == 1 else well(seen)
    slow = reason.startswith("timeout")  # on a busy machine a good answer may come too late as well
    o = options(1, timeout=0.6 if slow else 60.0)
    summary = make(o)
    ((counted, count),) = summary["failed_requests"].items()
    assert summary["written"] == 1 and counted == reason.partition(" ")[0] and (count == 4 or (slow and count > 4))
    assert summary["answers"] == {"chain": 3, "judge": 1} and len(server.seen) == 4 + count


@pytest.mark.parametrize(("headers", "backoff"), [({"retry-after": "0.3"}, 0.0), ({}, 0.6)])
def test_a_request_waits_for_its_next_try(server, options, headers, backoff):
    """For the seconds of Retry-After, else for half to all of the back-off."""
    server.behave = lambda seen: Reply(status=429, headers=headers) if len(server.seen) == 1 else well(seen)
    make(options(1, chains=1, backoff=backoff))
    assert server.seen[1].began - server.seen[0].began >= 0.3


def test_a_body_without_a_message_is_half_an_answer(server, options):
    choices = ("[]", "3", "[3]", '{"0": 1}', '[{"message": null}]', '[{"message": 3}]')
    bodies = [b"{}", b"[]", b'"good"', b'{"error": "busy"}', b"\xff"]
    bodies += [f'{{"choices": {value}}}'.encode() for value in choices]
    server.behave = lambda seen: Reply(body=bodies[seen.times - 1]) if seen.times <= len(bodies) else well(seen)
    assert make(options(1, chains=1, tries=12, backoff=0.0))["failed_requests"] == {"half_body": 2 * len(bodies)}


def test_a_truncated_answer_is_requested_again_and_counted(server, options):
    def behave(seen):
        if seen.kind == "chain" and len(server.of("chain")) <= 4:
            return Reply("<think>It goes on and", finish="length")
        return well(seen)

    server.behave = behave
    o = options(1, tries=2, concurrency=1)
    summary = make(o)
    # All three are truncated, then the first once more.
    assert summary["answers"]["chain"] == 6 and summary["tokens"]["chain"] == {"in": 6000, "out": 60}
    assert summary["chains"] == {"half_answer": 1, "passed": 2} and summary["written"] == 1
    assert len({seen.key for seen in server.seen}) == 7  # with another seed each time
    assert make(o) == summary and len(server.seen) == 7


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_in_a_field_of_its_own_is_put_before_the_answer(server, options, field):
    """Not a judge's: it may name the best more than once. Nor one that comes beside a <think> in the text."""

    def behave(seen):
        if seen.kind == "judge":
            return Reply("Best: 2", extra={field: "Best: 1?"})
        whole = seen is server.seen[0]
        text = f"<answer>{seen.box}</answer>"
        return Reply("<think>For all.</think>" * whole + text, extra={field: "\nFor me.\n"})

    server.behave = behave
    o = options(1, concurrency=1)
    assert make(o)["chains"] == {"passed": 3}
    chains = ["<think>For all.</think>", "<think>For me.</think>", "<think>For me.</think>"]
    assert [text.partition("<answer>")[0] for text in server.of("judge")[0].replies] == chains
    assert written(o)[0]["messages"][1]["content"].startswith(chains[1])


def test_a_record_without_answers_is_left_out_and_requested_next_time(server, options, caplog):
    def behave(seen):
        thing = seen.question.split()[-1]
        return {"1?": Reply(status=503), "2?": Reply("no such image", status=400)}.get(thing) or well(seen)

    server.behave = behave
    o = options([*map(record, range(4)), record(4, images=["0.png", "gone.png"])], tries=2)
    summary = make(o)
    assert summary["written"] == 2 and summary["left_out"] == {"status_503": 1, "status_400": 1, "bad_image": 1}
    assert summary["failed_requests"] == {"status_503": 6, "status_400": 3}  # 400 is not repeated
    assert "data.json#2 is left out: status_400" in caplog.text and "no such image" in caplog.text
    assert "gone.png" in caplog.text

    server.behave, before = well, len(server.seen)
    summary = make(o)
    assert summary["written"] == 4 and summary["left_out"] == {"bad_image": 1}
    assert {seen.question for seen in server.seen[before:]} == {"Where is thing 1?", "Where is thing 2?"}
    assert [made["cot"]["source"] for made in written(o)] == [f"data.json#{k}" for k in range(4)]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_the_key_or_the_model_ends_the_run(server, options, status):
    server.behave = lambda seen: Reply("not for you", status=status)
    with pytest.raises(ValueError, match=f"status_{status} for model 'writer'.*not for you.*--base_url"):
        make(options(50, concurrency=2))
    assert len(server.seen) < 10


def test_a_dead_server_ends_the_run_and_keeps_the_output(server, options):
    o = options(4, tries=1, max_failures=5, concurrency=2)
    make(o)
    before = written(o)
    server.behave = lambda seen: Reply(status=500)
    o = dataclasses.replace(o, temperature=0.5)  # another temperature: no answers are kept yet
    with pytest.raises(ValueError, match=r"failed in a row: 5.*status_500.*answers\.sqlite3"):
        make(o)
    assert written(o) == before
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="failed in a row: 5.*connection"):
        make(o)


def test_the_key_is_sent_and_written_nowhere(server, options, caplog, capsys):
    def behave(seen):
        if seen.question.endswith("1?"):
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
    make(o := options(1))
    assert "<think>It is there.</think>" in written(o)[0]["messages"][1]["content"]


def test_a_judge_on_another_server_has_its_own_key(server, options, monkeypatch):
    with FakeOpenAI() as other:
        o = options(1, judge_base_url=other.url)
        with pytest.raises(ValueError, match="JUDGE_API_KEY is not set.*any word"):
            make(o)
        monkeypatch.setenv("JUDGE_API_KEY", "another")
        assert make(o)["written"] == 1
        assert [s.headers["authorization"] for s in other.seen] == ["Bearer another"] and not server.of("judge")


def test_requests_at_once_are_bounded(server, options):
    server.behave = lambda seen: dataclasses.replace(well(seen), delay=0.02)
    make(options(4, concurrency=3))
    assert server.most_at_once == 3


def test_requests_in_a_minute_are_bounded(server, options):
    """1200 a minute: one every 50 ms, repeated ones included."""
    server.behave = lambda seen: Reply(status=500) if seen.times == 1 else well(seen)
    make(options(1, requests_per_minute=1200, backoff=0.0))
    began = [seen.began for seen in server.seen]
    assert len(began) == 8 and began[-1] - began[0] > 0.25  # 0.35, less the delay of the first


def test_records_that_no_chain_can_be_made_for_are_counted(server, options):
    records = [
        record(0),
        record(0, id="again"),
        record(1, answer_format="box"),
        record(2, answer=[10.2, 10, 10.4, 20]),
        record(3, answer=[300, 0, 100, 50]),
        {"images": ["0.png"], "question": "?", "answer": None},
    ]
    summary = make(options(records))
    assert summary["left_out"] == {"duplicate": 1, "no_thinking_asked": 1, "box_too_small": 1}
    assert summary["faulty"] == {"box_inverted": 1, "no_gold_box": 1}
    assert summary["records"] == summary["written"] + sum(summary["left_out"].values()) == 4
    assert len(server.seen) == 4


def test_a_conversations_box_is_that_of_its_first_answer(server, options):
    """MGrounding's form: question and box are those of the first two turns; one without a box has none."""
    answer = "<answer>(10, 20), (30, 40)</answer>"
    chats = [[("user", "Where?"), ("assistant", answer)], [("user", "What?"), ("assistant", "A cup.")]]
    records = [{"images": ["0.png"], "messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    summary = make(options(records))
    assert summary["written"] == 1 and summary["left_out"] == {"no_gold_box": 1}
    assert server.seen[0].question == "Where?" and server.seen[0].box == "(10, 20), (30, 40)"


def test_a_sample_is_drawn_by_seed(server, options):
    o = options(40, sample=5, chains=1)
    make(o)
    drawn = [made["cot"]["source"] for made in written(o)]
    expected = sorted(random.Random(42).sample(range(40), 5))
    assert drawn == [f"data.json#{k}" for k in expected]
    sent = len(server.seen)
    assert make(o)["written"] == 5 and len(server.seen) == sent == 10
    make(dataclasses.replace(o, seed=1))
    assert [made["cot"]["source"] for made in written(o)] != drawn


def test_cost_is_that_of_all_answers(server, options):
    server.behave = lambda seen: dataclasses.replace(well(seen), usage=not seen.question.endswith("1?"))
    o = options(3, input_price=3.0, output_price=50.0, judge_output_price=200.0)
    summary = make(o)
    assert summary["tokens"] == {"chain": {"in": 6000, "out": 60}, "judge": {"in": 2000, "out": 20}}
    assert summary["answers_without_usage"] == 4
    assert summary["cost"] == pytest.approx((6000 * 3 + 60 * 50 + 2000 * 3 + 20 * 200) / 1e6)
    assert json.loads(Path(o.output_dir, "summary.json").read_text()) == summary


@pytest.mark.slow
def test_a_killed_command_continues_and_sends_no_request_twice_whose_answer_it_kept(server, options, tmp_path):
    def behave(seen):
        if seen.times == 1 and seen.body["seed"] % 5 == 0:
            return Reply(status=500)
        return dataclasses.replace(well(seen), delay=0.03)

    def seeds():
        """The seeds of the answers kept: each request has its own."""
        return {int(entry["key"][:8], 16) >> 1 for entry in kept(o)}

    server.behave = behave
    o = options(12, concurrency=4)
    command = [sys.executable, "-P", "-m", "boxgrpo.trainer.make_cot", *flags(o)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while sum(seen.answered for seen in server.seen) < 20 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    out, _ = run.communicate()
    assert run.returncode == -signal.SIGKILL, out
    before, sent = seeds(), len(server.seen)
    assert 16 <= len(before) < 48 and not Path(o.output_dir, "cold_start.json").exists()

    main(flags(o))
    assert not before & {seen.body["seed"] for seen in server.seen[sent:]}
    answered = [seen.body["seed"] for seen in server.seen if seen.answered]
    assert len(answered) - len(set(answered)) <= o.concurrency  # in flight when the process died
    assert len(seeds()) == 48

    undisturbed = dataclasses.replace(o, output_dir=str(tmp_path / "undisturbed"))
    make(undisturbed)
    assert written(undisturbed) == written(o) and len(written(o)) == 12


def test_answers_of_an_earlier_version_are_read_once(server, options, tmp_path):
    """From `answers.jsonl`, whose last line a kill cut off; keys have not changed since."""
    o = options(2)
    make(o)
    assert EARLIER_KEY in {entry["key"] for entry in kept(o)}
    lines = [
        json.dumps(entry) + "\n" for entry in [*kept(o)[:5], {"failure": "timeout", "kind": "chain", "source": "x"}]
    ]
    later = dataclasses.replace(o, output_dir=str(tmp_path / "later"))
    (tmp_path / "later").mkdir()
    (tmp_path / "later/answers.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="answers.jsonl has a line that is no answer.*Remove"):
        make(later)
    (tmp_path / "later/answers.jsonl").write_text("".join(lines) + '{"key": "12')
    server.seen.clear()
    assert make(later)["failed_requests"] == {"timeout": 1} and len(server.seen) == 3
    assert make(later)["answers"] == {"chain": 6, "judge": 2} and len(server.seen) == 3
    assert written(later) == written(o)


def test_a_killed_process_loses_no_entry_that_add_returned(tmp_path):
    """A process prints each key after `add`, and is killed meanwhile."""
    program = f"""
import itertools
from boxgrpo.trainer.chains.journal import Journal
with Journal({str(tmp_path)!r}) as journal:
    for k in itertools.count():
        entry = journal.add({{"key": str(k), "kind": "chain", "text": "x" * 5000, "tokens": [2, 1]}})
        print(entry["key"], flush=True)
"""
    run = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    keys = [run.stdout.readline().strip() for _ in range(50)]
    with pytest.raises(ValueError, match=r"another process has .*answers\.sqlite3 open"):
        Journal(tmp_path)
    run.kill()
    keys += run.communicate()[0].split()
    with Journal(tmp_path) as journal:
        assert all(journal.get(key) for key in keys)
        answers = journal.summary(("chain",))["answers"]["chain"]
    assert len(keys) <= answers <= len(keys) + 1  # one may be added and not yet printed


def test_a_journal_has_one_writer_and_refuses_other_files(tmp_path):
    with Journal(tmp_path) as journal:
        journal.add({"key": "a", "kind": "chain", "text": "ö\ud83e", "finish": "stop", "tokens": None})
        with pytest.raises(ValueError, match=r"another process has .*answers\.sqlite3 open"):
            Journal(tmp_path)
        assert journal.get("a")["text"] == "ö\ud83e" and journal.get("b") is None
    (tmp_path / "answers.sqlite3").write_bytes(b"no database" * 500)
    with pytest.raises(ValueError, match=r"answers\.sqlite3 cannot be read .*not a database.*Remove it"):
        Journal(tmp_path)


def test_without_requests_the_records_of_the_answers_so_far_are_written(server, options, monkeypatch):
    o = options(3)
    make(dataclasses.replace(o, sample=2))
    sent = len(server.seen)
    monkeypatch.delenv("OPENAI_API_KEY")
    summary = make(dataclasses.replace(o, ask=False, base_url=""))
    assert summary["written"] == 2 and summary["left_out"] == {"not_asked": 1} and len(server.seen) == sent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model is empty.*--model"),
        ({"base_url": ""}, "base_url is empty.*--base_url"),
        ({"data": "nowhere.json"}, "'nowhere.json'; there is no such file"),
        ({"chains": 0}, "chains is 0.*--chains"),
        ({"requests_per_minute": -1.0}, "requests_per_minute is -1"),
        ({"min_iou": 1.0}, "min_iou is 1"),
        ({"timeout": 0.0}, "timeout is 0"),
    ],
)
def test_impossible_options_are_refused(server, options, change, message):
    with pytest.raises(ValueError, match=message):
        make(options(1, **change))
    assert not server.seen


def test_without_key_or_client_the_error_names_the_remedy(server, options, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        make(options(1))
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match="importing openai fails.*pip install 'openai"):
        make(options(1))

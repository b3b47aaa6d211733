"""Which chains pass, which one the judge chooses, and which records get none."""

import pytest

from boxgrpo.trainer.chains.judge import check_chains, read_verdict
from boxgrpo.trainer.chains.make import make_cold_start
from boxgrpo.trainer.data.example import THINK_SUFFIX
from boxgrpo.trainer.data.readers import read_examples
from chain_runs import chain, number, record, written
from fake_openai import Reply, well

GOOD = "<think>It is there.</think><answer>(0, 0), (100, 100)</answer>"


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("<answer>", "\n<answer>", "passed"),
        ("(100, 100)", "(100, 51)", "passed"),
        ("(100, 100)", "(100, 50)", "wrong_box"),  # IoU 0.5, not above it
        ("(0, 0)", "(500, 500)", "wrong_box"),
        ("<think>", "Sure! <think>", "bad_form"),
        ("</answer>", "</answer> Bye.", "bad_form"),
        ("It is there.", " ", "bad_form"),
        ("It is", "<think>It is", "bad_form"),
        ("there.", "<answer>(0, 0), (100, 100)</answer>", "bad_form"),
        ("It is", "<|im_end|>", "bad_form"),
        ("It is", "<image>", "bad_form"),
        ("It is", "\ud83e", "bad_form"),
        ("(0, 0), (100, 100)", "[0, 0, 100, 100]", "bad_form"),
        (GOOD, "", "bad_form"),
    ],
)
def test_a_chain_must_have_the_form_and_the_box(old, new, word):
    words, ious = check_chains([GOOD, GOOD.replace(old, new)], (0, 0, 100, 100), 0.5)
    assert words == ["passed", word] and ious[0] == 1


@pytest.mark.parametrize(
    ("text", "best"),
    [
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
def test_a_verdict_is_the_last_number_after_best(text, best):
    assert read_verdict(text, 3) == best


def test_only_chains_that_pass_are_judged_and_the_judge_may_refuse_all(server, options):
    """Record 0: all wrong; 1: one passes and is judged alone; 2: none is sound; 3: no such number."""

    def behave(seen):
        if seen.kind == "judge":
            return Reply({1: "Best: 1", 2: "None convinces. Best: 0", 3: "Best: 7"}[number(seen)])
        first = sum(one.question == seen.question for one in server.of("chain")) == 1
        if number(seen) == 0 or (number(seen) == 1 and not first):
            return chain("(500, 500), (900, 900)") if first else Reply("It is on the left.")
        return well(seen)

    server.behave = behave
    o = options(4, concurrency=1)
    summary = make_cold_start(o)
    (made,) = written(o)
    assert made["cot"]["passed"] == 1 and [made["messages"][1]["content"]] == server.of("judge")[0].replies
    assert summary["left_out"] == {"no_chain_passed": 1, "none_sound": 1, "verdict_unreadable": 1}
    assert summary["chains"] == {"passed": 7, "bad_form": 4, "wrong_box": 1}
    assert [len(seen.replies) for seen in server.of("judge")] == [1, 3, 3]


def test_records_that_no_chain_can_be_made_for_are_counted(server, options):
    records = [
        record(0),
        record(0, id="again"),
        record(1, answer_format="box"),
        record(2, answer=[10.2, 10, 10.4, 20]),
        record(3, answer=[300, 0, 100, 50]),
        {"images": ["0.png"], "question": "?", "answer": None},
    ]
    summary = make_cold_start(options(records))
    assert summary["left_out"] == {"duplicate": 1, "no_thinking_asked": 1, "box_too_small": 1}
    assert summary["faulty"] == {"box_inverted": 1, "no_gold_box": 1}
    assert summary["records"] == summary["written"] + sum(summary["left_out"].values()) == 4
    assert len(server.seen) == 4


def test_a_conversations_box_is_that_of_its_first_answer(server, options):
    """One without a box has none."""
    answers = ["<answer>(10, 20), (30, 40)</answer>", "A cup."]
    chats = [[{"role": "user", "content": "Where?"}, {"role": "assistant", "content": text}] for text in answers]
    summary = make_cold_start(options([{"images": ["0.png"], "messages": chat} for chat in chats]))
    assert summary["written"] == 1 and summary["left_out"] == {"no_gold_box": 1}
    assert server.seen[0].question == "Where?" and server.seen[0].box == "(10, 20), (30, 40)"


def test_images_between_words_and_the_systems_text_stay_in_the_new_record(server, options):
    """In a request, which shows all images first, they are named by number."""
    between = record(0, question="<image> Unlike this <image>, where is thing 0?", system="Be brief.")
    chat = [("Where is thing 1?", "<answer>(7, 5), (97, 65)</answer>"), ("In <image>?", "No.")]
    chat = [{"role": role, "content": text} for pair in chat for role, text in zip(("user", "assistant"), pair)]
    chat[0]["content"] = f"<image>{chat[0]['content']}"
    later = options([{"images": ["0.png", "1.png"], "messages": chat}])
    assert make_cold_start(later)["left_out"] == {"images_in_later_turns": 1}
    o = options([between])
    make_cold_start(o)
    assert server.seen[0].question == "Unlike this (image 2), where is thing 0?"
    ((new,), faults) = read_examples(o.output_dir + "/cold_start.json")
    assert not faults and new.system == "Be brief."
    assert new.question == f"<image>Unlike this <image>, where is thing 0?{THINK_SUFFIX}"

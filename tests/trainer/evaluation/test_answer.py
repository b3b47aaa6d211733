"""Answers of a model: shared out among ranks, in parts where memory is short, in the form that a model is asked for."""

import pytest
import torch

from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import Example, read_examples
from boxgrpo.trainer.evaluation.answer import REQUESTS, answer, asked, spoken
from boxgrpo.trainer.evaluation.grade import grade_texts
from boxgrpo.trainer.rollout.local import LocalRollout
from boxgrpo.trainer.runtime.ranks import Ranks

ANSWERING = {"batch_size": 64, "max_completion_length": 6, "workers": 0}


@pytest.fixture(scope="module")
def model(newborn):
    return load_model(newborn)


@pytest.fixture(scope="module")
def processor(newborn):
    return Processor.from_pretrained(newborn, min_pixels=784, max_pixels=9408)


class OneOfTwo(Ranks):
    """A rank that hears nothing of the other."""

    def gather(self, value):
        return [value]


def test_two_ranks_answer_what_one_does(model, processor, record_file):
    examples, _ = read_examples(record_file)
    alone, reasons = answer(model, processor, examples, range(7), Ranks(), **ANSWERING)
    assert list(alone) == [0, 1, 3, 4, 5, 6] and list(reasons) == [2]
    kept = []
    parts = [
        answer(
            model, processor, examples, range(7), OneOfTwo(rank, 2), **ANSWERING | {"batch_size": 2}, keep=kept.append
        )
        for rank in (0, 1)
    ]
    assert [(list(texts), list(why)) for texts, why in parts] == [([0, 4, 6], [2]), ([1, 3, 5], [])]
    assert parts[0][0] | parts[1][0] == alone
    assert [list(batch) for batch in kept] == [[0], [4, 6], [1, 3], [5]], "each batch is kept as soon as it is there"


def test_what_memory_has_no_room_for_is_answered_in_parts_or_left_out(model, processor, record_file, monkeypatch):
    """The model takes two prompts at once, and never the one of the largest image."""
    examples, _ = read_examples(record_file)
    whole, _ = answer(model, processor, examples, range(7), Ranks(), **ANSWERING)
    prefill = LocalRollout._sample
    largest = max(len(processor.prompt(examples[n]).input_ids) for n in whole)
    huge = [n for n in whole if len(processor.prompt(examples[n]).input_ids) == largest]

    def limited(rollout, policy, samples, embeds):
        if len(samples) > 2 or max(len(s.item.input_ids) for s in samples) == largest:
            raise torch.OutOfMemoryError("no room")
        return prefill(rollout, policy, samples, embeds)

    monkeypatch.setattr(LocalRollout, "_sample", limited)
    texts, reasons = answer(model, processor, examples, range(7), Ranks(), **ANSWERING)
    assert texts == {n: t for n, t in whole.items() if n not in huge}
    assert {n: reasons[n] for n in huge} == dict.fromkeys(huge, "decoding it alone runs out of memory")


def test_other_models_are_asked_for_their_own_form(processor):
    """The question as it stands, and the form; box marks are then part of what is read."""
    example = Example("0", "diff", ("a.png",), "<image>Where is it?", (0.0, 0.0, 500.0, 500.0), answer_format="think")
    marked = asked(example, "marked")
    assert (
        marked.turns == (("user", "Where is it?" + REQUESTS["marked"]),)
        and "<|box_start|>(x1,y1)" in REQUESTS["marked"]
    )
    assert asked(example, "auto") is example and asked(example, "box").answer_format == "box"
    ids = processor.tokenizer("<|box_start|>(0, 0), (500, 500)<|box_end|><|im_end|>", return_tensors="pt").input_ids[0]
    assert spoken(processor, ids, "think") == "(0, 0), (500, 500)"
    assert spoken(processor, ids, "marked") == "<|box_start|>(0, 0), (500, 500)<|box_end|>"
    (graded,) = grade_texts([example], [spoken(processor, ids, "marked")], answer_format="marked")
    assert graded["iou"] == 1.0

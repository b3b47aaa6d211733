"""Answers of a model: shared out among ranks, in parts where memory is short, in the format that is requested."""

import dataclasses
import io
import json

import pytest
import torch

from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer.data import images as image_files
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.evaluation.answer import REQUESTS, answer_examples, decode_answer, in_format
from boxgrpo.trainer.evaluation.decode import GreedyDecoder
from boxgrpo.trainer.evaluation.grade import grade_texts
from boxgrpo.trainer.options import EvalOptions
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed

OPTIONS = EvalOptions(eval_batch_size=64, dataloader_num_workers=0)


@pytest.fixture
def decoder(initial):
    """Of at most six tokens."""
    processor = Processor.from_pretrained(initial, min_pixels=784, max_pixels=9408)
    return GreedyDecoder(load_model(initial), processor, max_completion_length=6)


class OneOfTwo(Ranks):
    """A rank whose collectives return its own value alone."""

    def gather(self, value):
        return [value]


def test_two_ranks_answer_what_one_does(decoder, record_file):
    examples, _ = read_examples(record_file)
    alone, reasons = answer_examples(decoder, examples, range(7), Ranks(), OPTIONS)
    assert list(alone) == [0, 1, 3, 4, 5, 6] and list(reasons) == [2]
    stored, two = io.StringIO(), dataclasses.replace(OPTIONS, eval_batch_size=2)
    parts = [answer_examples(decoder, examples, range(7), OneOfTwo(rank, 2), two, store=stored) for rank in (0, 1)]
    assert [(list(texts), list(why)) for texts, why in parts] == [([0, 4, 6], [2]), ([1, 3, 5], [])]
    assert parts[0][0] | parts[1][0] == alone
    lines = [json.loads(line) for line in stored.getvalue().splitlines()]
    assert lines == [{"record": n, "answer": alone[n]} for n in (0, 4, 6, 1, 3, 5)]


def test_a_record_that_cannot_be_read_any_more_is_left_out(decoder, record_file, write):
    """Its box is in pixels, so reading it opens the image. No other record is answered in its place."""
    images = [f"{i}.png" for i in (0, 1, 3, 4)]
    records = [{"image": image, "problem": "Where is it?", "solution": [10, 20, 40, 50]} for image in images]
    examples, _ = read_examples(write(records, "pixels.json"))
    whole, _ = answer_examples(decoder, examples, range(4), Ranks(), OPTIONS)
    (record_file.parent / "1.png").unlink()
    image_files._header_of_file.cache_clear()
    texts, reasons = answer_examples(decoder, examples, range(4), Ranks(), OPTIONS)
    assert texts == {n: whole[n] for n in (0, 2, 3)} and "there is no image at" in reasons[1]


def test_a_rank_that_fails_ends_the_answering_of_all(decoder, record_file, monkeypatch):
    """After the exchange, for which the others wait; and an image that breaks the processor is one record's fault."""

    def broken(*_):
        raise ZeroDivisionError("one side is 0")

    class Second(Ranks):
        def gather(self, value):
            return [({}, {}, "RuntimeError: CUDA error"), value]

    examples, _ = read_examples(record_file)
    with pytest.raises(RunFailed, match=r"answering the records failed \(rank 0: RuntimeError: CUDA error\)"):
        answer_examples(decoder, examples, range(1), Second(), OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(decoder, "complete", broken)
        answer_examples(decoder, examples, range(1), Second(), OPTIONS)
    monkeypatch.setattr(decoder.processor, "prompt", broken)
    _, reasons = answer_examples(decoder, examples, range(1), Ranks(), OPTIONS)
    assert reasons == {0: "benchmark.json#0: preparing it fails with ZeroDivisionError: one side is 0"}


def test_prompts_that_exceed_memory_are_answered_in_parts_or_left_out(decoder, record_file, monkeypatch):
    """Two prompts fit into memory together, and the one with the largest image not at all."""
    examples, _ = read_examples(record_file)
    whole, _ = answer_examples(decoder, examples, range(7), Ranks(), OPTIONS)
    prefill = decoder._prefill
    lengths = {n: len(decoder.processor.prompt(examples[n]).input_ids) for n in whole}
    largest = max(lengths.values())
    huge = [n for n, length in lengths.items() if length == largest]
    sizes = []

    def limited(prompts):
        sizes.append(len(prompts))
        if len(prompts) > 2 or max(len(p.input_ids) for p in prompts) == largest:
            raise torch.OutOfMemoryError("no room")
        return prefill(prompts)

    monkeypatch.setattr(decoder, "_prefill", limited)
    texts, reasons = answer_examples(decoder, examples, range(7), Ranks(), OPTIONS)
    assert texts == {n: t for n, t in whole.items() if n not in huge}
    assert all(reasons[n] == f"benchmark.json#{n}: decoding it alone runs out of memory" for n in huge)
    assert sizes[:2] == [6, 3] and max(sizes[2:]) <= 3, "a number of prompts that failed is not tried again"


def test_other_models_get_a_request_for_their_own_format(decoder):
    """The question unchanged, and the request; box marks are then part of what is read."""
    example = Example("0", "diff", ("a.png",), "<image>Where is it?", (0.0, 0.0, 500.0, 500.0), answer_format="think")
    marked = in_format(example, "marked")
    assert marked.turns == (("user", "<image>Where is it?" + REQUESTS["marked"]),)
    assert "<|box_start|>(x1,y1)" in REQUESTS["marked"]
    assert in_format(example, "auto") is example and in_format(example, "box").answer_format == "box"
    processor = decoder.processor
    ids = processor.tokenizer("<|box_start|>(0, 0), (500, 500)<|box_end|><|im_end|>", return_tensors="pt").input_ids[0]
    assert decode_answer(processor, ids, "think") == "(0, 0), (500, 500)"
    assert decode_answer(processor, ids, "marked") == "<|box_start|>(0, 0), (500, 500)<|box_end|>"
    (graded,) = grade_texts([example], [decode_answer(processor, ids, "marked")], answer_format="marked")
    assert graded["iou"] == 1.0

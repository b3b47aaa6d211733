"""From records to cold-start data: what is written, counted and drawn."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from boxgrpo.trainer.chains.make import make_cold_start
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples
from chain_runs import number, record, sources, written
from fake_openai import Reply, well


def test_each_request_shows_question_box_and_images(server, options):
    make_cold_start(options(4))
    assert len(server.of("judge")) == 4 and len({seen.key for seen in server.of("chain")}) == 12
    for seen in server.seen:
        k = number(seen)
        assert seen.question == record(k)["question"]
        assert [int(v) for v in re.findall(r"\d+", seen.box)] == record(k)["answer"]
        assert seen.body["model"] == {"chain": "writer", "judge": "judge"}[seen.kind]
        large, small = seen.images
        assert large.format == "JPEG" and 8000 < large.width * large.height <= 9000
        assert abs(large.width / large.height - 270 / 210) < 0.03
        assert small.size == {0: (60, 80), 1: (28, 56)}.get(k % 3) or 8000 < small.width * small.height <= 9000


def test_records_are_written_as_stage_1_with_the_chain_that_the_judge_chose(server, options, initial):
    server.behave = lambda seen: Reply("2 is the clearest. Best: 2") if seen.kind == "judge" else well(seen)
    o = options(4)
    summary = make_cold_start(o)
    assert (summary["records"], summary["written"], summary["left_out"]) == (4, 4, {})
    assert summary["chains"] == {"passed": 12}
    chosen = {seen.question: seen.replies[1] for seen in server.of("judge")}
    examples, faults = read_examples(f"{o.output_dir}/cold_start.json")
    assert not faults and [e.question.count("<image>") for e in examples] == [2] * 4
    processor = Processor.from_pretrained(initial, min_pixels=784, max_pixels=50_000)
    for example, source, made in zip(examples, read_examples(o.data, box_unit=o.box_unit)[0], written(o), strict=True):
        assert (example.images, example.gold, example.id) == (source.images, source.gold, source.id)
        assert example.turns[1] == ("assistant", chosen[source.question])
        cot = made["cot"]
        assert (cot["model"], cot["judge"], cot["iou"], cot["passed"]) == ("writer", "judge", 1.0, 3)
        assert (cot["source"], cot["gold"]) == (source.source, list(source.gold))
        # The prompt that the cold start learns is that of GRPO and of the evaluation.
        prompt = processor.prompt(source).input_ids
        assert processor.conversation(example).input_ids[: len(prompt)].tolist() == prompt.tolist()


def test_images_are_named_from_the_image_root(options, tmp_path):
    o = options(2, image_root=str(tmp_path), output_dir=str(tmp_path / "elsewhere/deep"))
    make_cold_start(o)
    assert written(o)[1]["images"] == ["0.png", "2.png"]
    assert len(read_examples(f"{o.output_dir}/cold_start.json", image_root=tmp_path)[0]) == 2


def test_a_sample_is_drawn_by_seed(server, options):
    o = options(40, sample=5, chains=1)
    make_cold_start(o)
    drawn = sources(o)
    assert drawn == sorted(random.Random(42).sample(range(40), 5)) and len(server.seen) == 10
    make_cold_start(dataclasses.replace(o, seed=1))
    assert sources(o) != drawn


def test_tokens_of_all_answers_are_counted(server, options):
    server.behave = lambda seen: dataclasses.replace(well(seen), usage=number(seen) != 1)
    o = options(3)
    summary = make_cold_start(o)
    assert summary["tokens"] == {"chain": {"in": 6000, "out": 60}, "judge": {"in": 2000, "out": 20}}
    assert summary["answers_without_usage"] == 4
    assert json.loads(Path(o.output_dir, "summary.json").read_text()) == summary


def test_without_requests_the_records_of_the_answers_so_far_are_written(server, options, monkeypatch):
    o = options(3)
    make_cold_start(dataclasses.replace(o, sample=2))
    sent = len(server.seen)
    monkeypatch.delenv("OPENAI_API_KEY")
    summary = make_cold_start(dataclasses.replace(o, ask=False, base_url=""))
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
        make_cold_start(options(1, **change))
    assert not server.seen

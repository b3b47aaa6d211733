"""The evaluator on real records: gold scores 100, a wrong box costs its own task alone, every usable record counts."""

import dataclasses
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.generate import generate
from boxgrpo.trainer import evaluator
from boxgrpo.trainer.common import read_usable
from boxgrpo.trainer.evaluator import answer, draw, evaluate, grade_texts, main, summarize, table
from boxgrpo.trainer.options import EvalOptions
from boxgrpo.trainer.processing import Processor
from boxgrpo.trainer.ranks import Ranks
from boxgrpo.trainer.readers import Example, read_examples

GOLD = (200.0, 200.0, 600.0, 600.0)
WHOLE = Example("0", "region", (), "Where?", (0.0, 0.0, 1000.0, 1000.0), source="data.json#0")


@pytest.fixture(scope="module")
def real(shared):
    examples, faults = read_examples(shared / "data/mig_bench/MIG_data.sample.json")
    assert len(examples) == 121 and not faults
    return examples


def text(box, think="It is there."):
    x1, y1, x2, y2 = box
    return f"<think>{think}</think><answer>({x1:.0f}, {y1:.0f}), ({x2:.0f}, {y2:.0f})</answer>"


def accuracies(summary):
    return {task: found["accuracy_at_0.5"] for task, found in summary["tasks"].items()}


def test_gold_boxes_score_100_on_each_task(real):
    summary = summarize(grade_texts(real, [text(e.gold) for e in real]))
    assert summary["count"] == 121 and summary["format"] == 1.0
    assert len(summary["tasks"]) == 10
    for found in (summary, *summary["tasks"].values()):
        for name in ("accuracy_at_0.3", "accuracy_at_0.5", "accuracy_at_least_0.5", "accuracy_at_0.7", "mean_iou"):
            assert found[name] == 1.0
    shown = table(summary).splitlines()
    assert len(shown) == 1 + 10 + 1 and all("100.00" in line for line in shown[1:])


def test_one_wrong_box_lowers_exactly_its_task(real):
    texts = [text(e.gold) for e in real]
    counts = {task: sum(e.task == task for e in real) for task in {e.task for e in real}}
    for task, count in counts.items():
        wrong = next(i for i, e in enumerate(real) if e.task == task)
        *_, x2, y2 = real[wrong].gold
        beside = text((x2, y2, x2 + 100, y2 + 100))  # touches the gold box in a corner
        summary = summarize(grade_texts(real, [*texts[:wrong], beside, *texts[wrong + 1 :]]))
        assert accuracies(summary) == dict.fromkeys(counts, 1.0) | {task: pytest.approx(1 - 1 / count)}
        assert summary["accuracy_at_0.5"] == pytest.approx(1 - 1 / count / 10)  # tasks weigh alike, records do not


@pytest.mark.parametrize(
    ("answered", "iou"),
    [
        (text(GOLD, think="Not (0, 0), (100, 100)."), 1.0),
        (text((0, 0, 100, 100), think="It is (200, 200), (600, 600)."), 0.0),
        ("<think>It is (200, 200), (600, 600).</think><answer>I do not know.</answer>", 0.0),
        ("<think>It is (200, 200), (600, 600).</think>", 0.0),
        ("<answer>(0, 0), (100, 100)</answer><answer>(200, 200), (600, 600)</answer>", 0.0),  # the first answer counts
        ("<think></think><answer>In image 2: (200, 200), (600, 600).</answer>", 1.0),
    ],
)
def test_only_the_answer_counts(answered, iou):
    (graded,) = grade_texts([dataclasses.replace(WHOLE, gold=GOLD)], [answered])
    assert graded["iou"] == iou


@pytest.mark.parametrize(
    ("answer_format", "answered"),
    [
        ("marked", "<|object_ref_start|>it<|object_ref_end|><|box_start|>(200,200),(600,600)<|box_end|>"),
        ("list", "The box is [200, 200, 600, 600]."),
        ("fractions", "[0.2, 0.200, 0.6, 0.6]"),
        ("box", "(200,200),(600,600)"),
    ],
)
def test_another_models_boxes_are_read_as_it_writes_them(answer_format, answered):
    example = dataclasses.replace(WHOLE, gold=GOLD)
    (graded,) = grade_texts([example], [answered], answer_format=answer_format)
    assert (graded["iou"], graded["format"], graded["box"]) == (1.0, 1.0, list(GOLD))
    (graded,) = grade_texts([example], [answered])  # as the example asks: thinking, and an answer in tags
    assert (graded["iou"], graded["format"], graded["box"]) == (0.0, 0.0, None)


def test_an_iou_of_exactly_a_half_is_not_above_it():
    (graded,) = grade_texts([WHOLE], [text((0, 0, 500, 1000))])
    summary = summarize([graded])
    assert graded["iou"] == 0.5
    assert (summary["accuracy_at_0.5"], summary["accuracy_at_least_0.5"]) == (0.0, 1.0)
    more = summarize(grade_texts([WHOLE], [text((0, 0, 501, 1000))]))
    assert more["accuracy_at_0.5"] == more["accuracy_at_least_0.5"] == 1.0


def counted(box):
    """The box's own squares on a sheet of 1300 x 1300; an inverted box has none."""
    sheet = np.zeros((1300, 1300), dtype=bool)
    x1, y1, x2, y2 = map(int, box)
    sheet[y1:y2, x1:x2] = True
    return sheet


def scored_by_counting(examples, texts):
    """Task -> (Acc@0.5, mean IoU): the paper's rule in its plainest form, areas counted square by square."""
    ious = {}
    for example, answered in zip(examples, texts):
        numbers = re.findall(r"\d+", answered.split("<answer>")[1].split("</answer>")[0])
        gold, box = counted(example.gold), counted(numbers if len(numbers) == 4 else (0, 0, 0, 0))
        ious.setdefault(example.task, []).append((gold & box).sum() / (gold | box).sum())
    return {task: (np.mean(np.array(found) > 0.5), np.mean(found)) for task, found in ious.items()}


def test_scores_are_those_of_an_independent_scorer(real):
    """On answers near and far, beyond the image, inverted, and without a box."""
    draw = random.Random(0)
    texts = []
    for example in real:
        kind = draw.random()
        if kind < 0.1:
            texts.append("<think>It is (1, 2), (3, 4).</think><answer>nowhere</answer>")
            continue
        box = [max(0, round(value + draw.gauss(0, 60))) for value in example.gold]
        texts.append(text(box[2:] + box[:2] if kind < 0.2 else box))
    assert any(int(n) > 1000 for answered in texts for n in re.findall(r"\d+", answered))
    summary, expected = summarize(grade_texts(real, texts)), scored_by_counting(real, texts)
    assert summary["tasks"].keys() == expected.keys()
    for task, (accuracy, iou) in expected.items():
        assert summary["tasks"][task]["accuracy_at_0.5"] == pytest.approx(accuracy)
        assert summary["tasks"][task]["mean_iou"] == pytest.approx(iou, abs=1e-6)
    assert summary["accuracy_at_0.5"] == pytest.approx(np.mean([a for a, _ in expected.values()]))
    assert 0.2 < summary["accuracy_at_0.5"] < 0.9  # the answers tell something


def test_iou_of_well_formed_answers_leaves_the_others_out():
    bare = "<answer>(0, 0), (1000, 1000)</answer>"  # right, but without its thinking
    summary = summarize(grade_texts([WHOLE, WHOLE], [bare, text((0, 0, 500, 1000))]))
    assert (summary["format"], summary["mean_iou"], summary["well_formed_iou"]) == (0.5, 0.75, 0.5)
    assert summarize(grade_texts([WHOLE], [bare]))["well_formed_iou"] == 0.0


def test_answers_and_records_must_match():
    with pytest.raises(ValueError, match="1 answers for 2 usable records"):
        grade_texts([WHOLE, WHOLE], ["one"])
    with pytest.raises(ValueError, match="there are 0 answers"):
        summarize([])


def test_what_cannot_be_evaluated_is_refused_by_name(shared, tmp_path):
    faulty = shared / "data/mig_bench/MIG_data.faulty.json"
    with pytest.raises(ValueError, match=r"0 of 2 records.*box_inverted 1, box_outside 1.*MIG_data\.faulty\.json#0"):
        read_usable(EvalOptions(data=str(faulty)), needs="gold")
    with pytest.raises(ValueError, match=r"data is .*gone\.json; there is no such file"):
        read_usable(EvalOptions(data=str(tmp_path / "gone.json")), needs="gold")
    with pytest.raises(ValueError, match="no data"):
        read_usable(EvalOptions(), needs="gold")
    with pytest.raises(ValueError, match="no model"):
        main([])


def test_chats_without_a_box_are_no_benchmark(tmp_path):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Left."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"images": ["a.png"], "messages": turns}]))
    options = SimpleNamespace(data=[str(tmp_path / "chat.json")], schema="auto", image_root="")
    with pytest.raises(ValueError, match=r"0 of 1 records can be used; they need the gold box.*chat\.json#0.*--data"):
        read_usable(options, needs="gold")
    assert len(read_usable(options, needs="turns")[0]) == 1


def test_every_fault_is_named_however_many(tmp_path, caplog):
    good = {"images": ["a.png"], "question": "Where?", "answer": [1, 2, 30, 40]}
    (tmp_path / "many.json").write_text(json.dumps([good, *[good | {"answer": None}] * 30]))
    _, faults = read_usable(EvalOptions(data=str(tmp_path / "many.json")), needs="gold")
    assert len(faults) == 30
    for fault in faults:
        assert sum(bool(re.search(rf"{fault.source}\b", message)) for message in caplog.messages) == 1


@pytest.fixture
def record_file(tmp_path):
    """Seven records of two tasks, of which the third has lost its image: a file and its examples."""
    records = []
    for i in range(7):
        if i != 2:
            Image.effect_noise((56 + 14 * i, 56), 60).save(tmp_path / f"{i}.png")
        task = ("diff", "region")[i % 2]
        records.append({"task": task, "images": [f"{i}.png"], "question": "Where is it?", "answer": [10, 20, 300, 400]})
    (tmp_path / "benchmark.json").write_text(json.dumps(records))
    return tmp_path / "benchmark.json"


def options_for(newborn, record_file, **changes):
    values = {"model": str(newborn), "data": str(record_file), "output_dir": str(record_file.parent / "eval")}
    values |= {"max_completion_length": 6, "dataloader_num_workers": 0, "min_pixels": 784, "max_pixels": 9408}
    return EvalOptions(**values | changes)


def test_a_record_without_its_image_is_skipped_and_the_others_are_scored_once(newborn, record_file, monkeypatch):
    decoded = []

    def counting(model, prompts, **options):
        decoded.extend(options["prompt_ids"])
        return generate(model, prompts, **options)

    monkeypatch.setattr(evaluator, "generate", counting)
    summary = evaluate(options_for(newborn, record_file, eval_batch_size=3, pictures=100), Ranks())
    results = json.loads((record_file.parent / "eval/results.json").read_text())
    assert results["summary"] == summary
    assert summary["count"] == 6 and summary["skipped"] == 1
    assert [a["source"] for a in results["answers"]] == [f"benchmark.json#{i}" for i in (0, 1, 3, 4, 5, 6)]
    assert {task: found["count"] for task, found in summary["tasks"].items()} == {"diff": 3, "region": 3}
    assert decoded == [0, 1, 2, 4, 5, 6]  # slots: the third took the fourth record, which does not come again
    assert len(list((record_file.parent / "eval/pictures").iterdir())) == 6

    (record_file.parent / "eval/pictures/0001.png").write_text("not ours")
    assert evaluate(options_for(newborn, record_file, limit=2, pictures=1), Ranks())["count"] == 2
    left = {p.name for p in (record_file.parent / "eval/pictures").iterdir()}
    assert left == {"00.png", "0001.png"}, "its own earlier cases go, what it never drew stays"


class OneOfTwo(Ranks):
    """A rank that hears nothing of the other."""

    def gather(self, value):
        return [value]


def test_two_ranks_answer_what_one_does(newborn, record_file):
    options = options_for(newborn, record_file, eval_batch_size=2)
    model = load_model(newborn)
    processor = Processor.from_pretrained(newborn, min_pixels=784, max_pixels=9408)
    examples, _ = read_usable(options, needs="gold")
    alone = {a["source"]: a["answer"] for a in answer(model, processor, examples, options, Ranks())}
    parts = [answer(model, processor, examples, options, OneOfTwo(rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 3]  # records 0, 3, 4, 6 and 1, 3, 5: the last slot is past the end
    assert {a["source"]: a["answer"] for part in parts for a in part} == alone


def test_pictures_are_spread_over_the_tasks(record_file, tmp_path):
    examples = [e for e in read_examples(record_file)[0] if not e.source.endswith("#2")]
    graded = grade_texts(examples, [text(e.gold) for e in examples])

    def drawn(answers, count):
        folder = tmp_path / f"pictures of {count}"
        draw(answers, examples, folder, count)
        return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

    more = drawn(graded, 100)
    assert list(more) == [f"{i:02d}.png" for i in range(6)]
    assert len(set(more.values())) == 6, "each case once, also where more pictures are asked for than there are cases"
    fewer = drawn(graded, 2)
    assert list(fewer.values()) == [more["00.png"], more["03.png"]], "one of each task"

"""The evaluator: every usable record is answered once, killed or not; other programs' answers are scored alike."""

import dataclasses
import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from boxgrpo.bench.processes import kill
from boxgrpo.trainer.evaluation.decode import GreedyDecoder
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.evaluator import main
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, eval_options, finish, flags, start_forked, wait_for


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "model is '' and predictions ''; answers come from one of them"),
        (["--model=a", "--predictions=b"], "model is 'a' and predictions 'b'; answers come from one of them"),
        (["--model=a", "--bench=coco"], "bench is 'coco'; it must be one of mig, refcoco"),
        (["--model=a", "--resamples=-1"], "resamples is -1; it must be at least 0"),
        (["--model=a"], "no data"),
        (["--model=a", "--data=gone.json"], r"data is gone\.json; there is no such file"),
        (["--model=a", "--data", "a", "a", "--bench=mmiu"], "data is a a; MMIU is one file or folder"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "a" / name).touch()
    with pytest.raises(ValueError, match=message):
        main(given)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def answered(folder) -> list[list[int]]:
    """The numbers of the records whose answers are on the disk, rank by rank in the order of their decoding."""
    files = sorted((folder / "answers").glob("rank*.jsonl"))
    return [[json.loads(line)["record"] for line in f.read_text().split("\n")[:-1]] for f in files]


def test_a_record_without_its_image_is_skipped_and_the_others_are_scored_once(initial, record_file, caplog):
    summary = evaluate(eval_options(initial, record_file, bench="mig", eval_batch_size=3, pictures=100), Ranks())
    folder = record_file.parent / "eval"
    results = results_of(folder)
    assert results["summary"] == summary
    assert summary["count"] == 6 and summary["skipped"] == 1
    assert [a["source"] for a in results["answers"]] == [f"benchmark.json#{i}" for i in (0, 1, 3, 4, 5, 6)]
    assert {task: found["count"] for task, found in summary["tasks"].items()} == {"diff": 3, "region": 3}
    (fault,) = results["skipped_records"]
    assert re.search(r"benchmark\.json#2: There is no image at .*2\.png", fault) and fault in caplog.text
    assert results["mean"] == 100 * summary["accuracy_at_0.5"] and results["tasks"].keys() == {"diff", "region"}
    assert fault.replace("'", "&#39;") in (folder / "report.html").read_text()
    assert "| initial0 | this run |" in (folder / "table.md").read_text()
    assert len(list((folder / "pictures").iterdir())) == 6

    (folder / "pictures/0001.png").write_text("not ours")
    assert evaluate(eval_options(initial, record_file, limit=2, pictures=1), Ranks())["count"] == 2
    assert answered(folder) == [[0, 1, 3, 4, 5, 6]], "what is answered already is not answered again"
    left = {p.name for p in (folder / "pictures").iterdir()}
    assert left == {"00.png", "0001.png"}, "its own earlier cases go, what it never drew stays"


def test_an_evaluation_without_one_image_stops(initial, record_file, write):
    data = write(json.loads(record_file.read_text())[2:3], "lost.json")
    with pytest.raises(ValueError, match=r"none of the 1 records can be prepared.*2\.png"):
        evaluate(eval_options(initial, data), Ranks())


def test_a_killed_evaluation_is_resumed(initial, record_file, monkeypatch):
    """After two batches it dies, in the middle of a line; then it goes on, and a third run has nothing left to do."""
    options, folder = eval_options(initial, record_file, eval_batch_size=2, pictures=0), record_file.parent / "eval"
    whole = evaluate(eval_options(initial, record_file, output_dir=str(record_file.parent / "whole")), Ranks())
    complete = GreedyDecoder.complete

    def interrupted(decoder, prompts):
        if answered(folder) == [[0, 1, 3]]:
            raise KeyboardInterrupt
        return complete(decoder, prompts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GreedyDecoder, "complete", interrupted)
        evaluate(options, Ranks())
    assert answered(folder) == [[0, 1, 3]] and not (folder / "results.json").exists()
    with (folder / "answers/rank0.jsonl").open("a") as file:
        file.write('{"record": 4, "answer": "<thi')  # what a kill can leave
    assert evaluate(options, Ranks()) == whole
    assert answered(folder) == [[0, 1, 3, 4, 5, 6]]
    Image.effect_noise((56, 56), 60).save(record_file.parent / "2.png")  # the lost image is found
    assert evaluate(options, Ranks())["count"] == 7
    assert answered(folder) == [[0, 1, 3, 4, 5, 6, 2]]


def test_answers_of_another_evaluation_are_refused_or_thrown_away(initial, record_file, write, tmp_path, caplog):
    options = eval_options(initial, record_file, pictures=0)
    evaluate(options, Ranks())
    records = json.loads(record_file.read_text())
    records[0]["question"] = "Where is the other?"
    for changes, named in (
        ({"max_completion_length": 5}, "max_completion_length"),
        ({"answer_format": "list"}, "answer_format"),
        ({"max_pixels": 20000}, "max_pixels"),
        ({"data": str(write(records, "other/benchmark.json")), "image_root": str(tmp_path)}, "questions"),
    ):
        with pytest.raises(ValueError, match=rf"eval holds the answers of another evaluation \(other: {named}\)"):
            evaluate(eval_options(initial, record_file, **changes), Ranks())
    other = tmp_path / "model"
    shutil.copytree(initial, other)
    caplog.clear()
    evaluate(eval_options(other, record_file), Ranks())
    assert "6 answers exist already" in caplog.text, "the same model, wherever it lies"
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"\(other: model\)\. Name another .* --overwrite_output_dir true"):
        evaluate(eval_options(other, record_file), Ranks())
    caplog.clear()
    evaluate(eval_options(other, record_file, overwrite_output_dir=True, pictures=0), Ranks())
    assert "an earlier evaluation is removed" in caplog.text and "exist already" not in caplog.text
    with pytest.raises(ValueError, match=r"\(other: model\)"):
        evaluate(options, Ranks())


@pytest.mark.slow
def test_two_killed_processes_resume(initial, write, tmp_path):
    """SIGKILL for both as soon as some answers are there; afterwards each record has one answer, as one process has."""
    records = []
    for i in range(60):
        Image.effect_noise((56 + 14 * (i % 7), 56), 60).save(tmp_path / f"{i}.png")
        records.append({"task": "diff", "images": [f"{i}.png"], "question": "Where is it?", "answer": [1, 2, 30, 40]})
    options = eval_options(initial, write(records, "records.json"), eval_batch_size=1, pictures=0, cases=0)
    options.box_unit = "thousandths"  # which the boxes do not tell
    options.max_completion_length = 24
    folder = tmp_path / "eval"

    run = start_forked(ROOT / "trainer/evaluator.py", options)
    assert wait_for(run, lambda: sum(map(len, answered(folder))) >= 4)
    kill(run)
    before = answered(folder)
    assert 4 <= sum(map(len, before)) < 60 and not (folder / "results.json").exists()
    out = finish(start_forked(ROOT / "trainer/evaluator.py", options))
    assert f"{sum(map(len, before))} answers exist already" in out
    after = answered(folder)
    assert sorted(n for part in after for n in part) == list(range(60))
    assert all(now[: len(then)] == then for now, then in zip(after, before))
    alone = evaluate(dataclasses.replace(options, output_dir=str(tmp_path / "alone")), Ranks())
    assert results_of(folder)["summary"] == alone
    assert results_of(folder)["answers"] == results_of(tmp_path / "alone")["answers"]


CHOICES = {"task": "person_reid", "options": "A: The second image\nB: The third image", "question": "Which is alike?"}


def test_multiple_choice_is_scored_by_its_own_module(initial, write, tmp_path, capsys):
    """MMIU: by the model, which gives no letter, and with another program's answers."""
    Image.effect_noise((60, 60), 60).convert("RGB").save(tmp_path / "a.jpg")
    records = [CHOICES | {"input_image_path": ["./a.jpg", "./a.jpg"], "output": letter} for letter in "AB"]
    data = write(records, "all.json")
    answers = write(["<think>B?</think><answer>A</answer>", "The answer is A."], "answers.json")

    def scored(**changes) -> dict:
        main([*flags(eval_options(initial, data, bench="mmiu", **changes)), "--json=-"])
        return json.loads(capsys.readouterr().out)

    assert scored()["mean"] == 0 and len(results_of(tmp_path / "eval")["answers"]) == 2
    assert "| UniVG-R1 | published | 53.03 |" in (tmp_path / "eval/table.md").read_text()
    found = scored(predictions=str(answers), model="", output_dir=str(tmp_path / "others"))
    assert found["mean"] == 50 and found["tasks"] == {"person_reid": 50} and found["skipped"] == 0

"""The published rows are the paper's, and a run's row has the same columns."""

import re

import pytest

from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluation.grade import summarize
from boxgrpo.trainer.evaluation.questions import FACTS
from boxgrpo.trainer.evaluation.report import comparison, markdown, scores_table

ROWS = [(table, model, row) for table, rows in FACTS["tables"].items() for model, row in rows.items()]


def test_every_published_row_stands_in_the_paper(shared):
    (paper,) = list((shared / "seeds").glob("001*.txt")) or pytest.skip(f"no text of the paper in {shared / 'seeds'}")
    lines = paper.read_text().splitlines()
    numbers = [[float(n) for n in re.findall(r"(?<=\s)\d+\.\d+(?=\s)", f" {line} ")] for line in lines]
    assert [row[:2] for row in ROWS if not any(found[-len(row[2]) :] == row[2] for found in numbers)] == []
    assert all(f"{table}: " in paper.read_text() for table in FACTS["tables"])
    columns = {"Table 2": "reasoning", "Table 3": "refcoco"}
    assert all(len(row) == len(FACTS["columns"][columns.get(table, "mig")]) + 1 for table, _, row in ROWS)
    assert " ".join(FACTS["columns"]["mig"].values()) in lines


def summary_of(ious: dict[str, list[float]], **options) -> dict:
    answers = [{"task": task, "iou": iou, "format": 1.0} for task, found in ious.items() for iou in found]
    return summarize(answers, **options) | {"skipped": 0}


def test_a_run_is_shown_in_the_order_of_the_published_columns():
    """Task k of MIG-Bench has k of 10 right; the tasks come in the records' order, the columns in the paper's."""
    mig = BENCHES["mig"]
    ious = {task: [0.9] * k + [0.1] * (10 - k) for k, task in enumerate(mig.columns)}
    columns, rows = comparison(mig, summary_of(dict(sorted(ious.items())), resamples=100), "out/grpo")
    assert columns[2:] == "Static Robust Common OT MV Region Refer GG Reason Co-Re AVG".split()
    assert [row[:2] for row in rows[:2] + rows[9:10]] == [
        ["Qwen2-VL-72B", "Table 1"],
        ["Mantis", "Table 1"],
        ["Qwen2-VL-2B", "Table 6"],
    ]
    assert len(rows) == 9 + 4 + 2
    run, interval = rows[-2:]
    assert run == ["out/grpo", "this run", *(f"{10 * k}.00" for k in range(10)), "45.00"]
    assert interval[2] == "0.0–0.0" and re.fullmatch(r"\d+\.\d–\d+\.\d", interval[-1])
    expected = dict(zip(mig.columns, columns[2:]))
    assert expected["correspondence"] == "Co-Re" and expected["view_diff"] == "Robust" and expected["diff"] == "Static"


def test_part_of_the_columns_has_no_average():
    _, rows = comparison(BENCHES["lisa"], summary_of({"lisa_val": [0.9], "lisa_test": [0.9, 0.1]}), "ours")
    assert rows[-1] == ["ours", "this run", "100.00", "50.00", "–", "–", "–", "–"]
    columns, rows = comparison(BENCHES[""], summary_of({"b": [0.9], "a": [0.1]}), "ours")
    assert (columns[2:], rows) == (["a", "b", "AVG"], [["ours", "this run", "0.00", "100.00", "50.00"]])


def test_the_markdown_holds_every_row_and_escapes_foreign_text():
    page = markdown(BENCHES["mig"], summary_of({"diff": [0.5], "a|b <b>`*": [0.9]}), "out|[x](y)")
    assert (
        "| UniVG-R1 | Table 1 | 71.97 | 58.51 | 93.13 | 76.36 | 66.32 | 81.71 | 82.83 | 88.04 | 62.89 | 44.44 | 72.64 |"
        in page
    )
    assert r"| out\|\[x\](y) | this run | 0.00 |" in page
    assert r"| a\|b \<b\>\`\* | 1 |" in page
    assert "its scorer also counts 0.5 itself, which gives 100.00" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {15, 10}


def test_a_benchmark_without_boxes_is_compared_by_its_mean():
    summary = {"mean": 50.0, "tasks": {"a": 40.0, "b": None}, "skipped": 3, "count": 8}
    page = markdown(BENCHES["mmiu"], summary, "ours")
    assert "| UniVG-R1 | published | 53.03 |\n| ours | this run | 50.00 |" in page
    assert "| a | 40.00 |\n| b | – |" in page and "8 records scored, 3 skipped" in page
    assert re.search(r"^a +40\.00\nb +–\n", scores_table(summary, BENCHES["mmiu"]), re.MULTILINE)


@pytest.mark.parametrize(
    ("bench", "task", "file", "expected"),
    [
        ("refcoco", "grounding", "RefCOCO+_testB.jsonl", "refcoco+_testB"),
        ("refcoco", "refcoco_plus_test_a", "records.json", "refcoco+_testA"),
        ("refcoco", "grounding", "refcoco_train.json", "grounding"),
        ("lisa", "grounding", "lisa_test.json", "lisa_test"),
        ("lisa", "val", "records.json", "lisa_val"),
        ("lisa", "grounding", "lisa_eval_test.json", "lisa_test"),
        ("lisa", "grounding", "records.json", "lisa"),
        ("llmseg", "grounding", "LLMSeg_eval.json", "llmseg"),
        ("mig", "diff", "refcoco_val.json", "diff"),
    ],
)
def test_a_records_split_is_its_tasks_or_its_files(bench, task, file, expected):
    example = Example("0", task, (), "Where?", None, source=f"{file}#3")
    assert BENCHES[bench].labelled(example).task == expected

"""MMIU's published records become questions, answers become accuracies."""

import json

import pytest

from boxgrpo.trainer.evaluation.mmiu import ANSWER_SUFFIX, grade, read, score

# As FanqingM/MMIU-Benchmark publishes them: every task spells its options and its context a little differently.
FORENSIC = {
    "task": "forensic_detection_blink",
    "options": "A: the first image\nB: the second image\nC: the third image\nD: the fourth image",
    "question": "Which image is most likely to be a real photograph?",
    "context": "You are a judge in a photography competition.\nSelect from the following choices.\nA: the first image\n"
    "B: the second image\nC: the third image\nD: the fourth image\n",
    "input_image_path": [f"./Low-level-semantic/forensic_detection_blink/blink_0_{i}.jpg" for i in range(4)],
    "output": "D",
}
REID = {
    "task": "person_reid",
    "options": "A: The second image\nB: The third image",
    "question": "Please retrieve the most similar person to the query in the candidate.",
    "context": "Select from the following choices.\nA: The second image\nB: The third image",
    "input_image_path": ["./High-level-obj-semantic/person_reid/person_reid_0_0.jpg"],
    "output": "A",
}
QUALITY = {
    "task": "visual_quality_assessment_q_bench+",
    "options": "A: No\nB: Yes\n",
    "question": "Are both of these images relatively realistic?",
    "context": "Candidates: A. No B. Yes",
    "input_image_path": ["./Low-level-semantic/visual_quality_assessment_q_bench+/q_0_0.bmp"],
    "output": "B",
}
HOMOGRAPHY = {
    "task": "Homography_estimation",
    "options": "A: 0.2 0.04 -122\n-0.3 0.6 172\n\nB: 0.6 0.002 123\n-0.005 0.6 83\n",
    "question": "Please compute the matrix.",
    "context": "Select from these choices.\nA: 0.2 0.04 -122\n-0.3 0.6 172\n\nB: 0.6 0.002 123\n-0.005 0.6 83\n",
    "input_image_path": ["./2D-spatial/Homography_estimation/Homography_estimation_0_0.png"],
    "output": "B",
}
RECORDS = [FORENSIC, REID, QUALITY, HOMOGRAPHY]


def test_records_become_questions(write, tmp_path):
    questions, faults = read(write(RECORDS, "all.json"), tmp_path)
    assert not faults
    forensic, reid, quality, homography = questions
    assert forensic.options == {
        "A": "the first image", "B": "the second image", "C": "the third image", "D": "the fourth image"
    }  # fmt: skip
    assert (forensic.letter, forensic.task, forensic.source) == ("D", "forensic_detection_blink", "all.json#0")
    assert forensic.images[3] == str(tmp_path / "Low-level-semantic/forensic_detection_blink/blink_0_3.jpg")
    assert [q.relationship for q in questions] == [
        "Low-level-semantic", "High-level-obj-semantic", "Low-level-semantic", "2D-spatial"
    ]  # fmt: skip
    assert quality.options == {"A": "No", "B": "Yes"}
    assert homography.options == {"A": "0.2 0.04 -122\n-0.3 0.6 172", "B": "0.6 0.002 123\n-0.005 0.6 83"}
    assert reid.gold is None and reid.turns == (("user", reid.question),), "so that no box is requested"


def test_prompts_hold_context_question_and_options_once(write):
    context_missing, half_a_list = REID | {"context": None}, REID | {"context": "Not B: The third image"}
    questions, _ = read(write([*RECORDS, context_missing, half_a_list], "all.json"), None)
    forensic, reid, quality, homography, added, half = (q.question.removesuffix(ANSWER_SUFFIX) for q in questions)
    assert forensic == FORENSIC["context"] + FORENSIC["question"]
    assert reid == REID["question"] + "\n" + REID["context"], "one of the tasks whose question comes first"
    assert quality == QUALITY["context"] + "\n" + QUALITY["question"]
    assert homography.count("0.002") == 1
    assert added == REID["question"] + "\nA: The second image\nB: The third image"
    assert half.count("A: The second image") == 1
    assert all(q.question.endswith("the chosen option in <answer> </answer> tags.") for q in questions)


def test_the_published_parquet_reads_like_the_json(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "all.parquet")
    questions, faults = read(tmp_path / "all.parquet", None)
    expected, _ = read(write(RECORDS, "all.json"), None)
    assert [(q.question, q.letter) for q in questions] == [(q.question, q.letter) for q in expected]
    assert not faults and questions[0].source == "all.parquet#0"


@pytest.mark.parametrize(
    ("change", "reason", "value"),
    [
        ({"output": None}, "bad_output", "None"),
        ({"output": "E"}, "bad_output", "'E'"),
        ({"output": ["A"]}, "bad_output", "['A']"),
        ({"options": "the first\nthe second"}, "bad_options", "the first"),
        ({"options": "A: only one"}, "bad_options", "only one"),
        ({"options": ["A: x", "B: y"]}, "no_options", "['A: x', 'B: y']"),
        ({"task": ""}, "no_task", "''"),
        ({"question": "", "context": " "}, "no_question", "''"),
        ({"question": "half \ud83e"}, "bad_text", "surrogates"),
        ({"input_image_path": []}, "no_images", "input_image_path is []"),
        ({"input_image_path": ["../../secret.png"]}, "image_outside_root", "'../../secret.png'"),
        ({"input_image_path": ["/etc/passwd"]}, "image_outside_root", "'/etc/passwd'"),
    ],
)
def test_a_faulty_record_names_itself_the_rule_and_the_value(write, tmp_path, change, reason, value):
    questions, faults = read(write([REID, REID | change, FORENSIC], "all.json"), tmp_path)
    assert [q.source for q in questions] == ["all.json#0", "all.json#2"]
    (fault,) = faults
    assert (fault.source, fault.reason) == ("all.json#1", reason)
    assert fault.message.startswith("all.json#1: ") and value in fault.message


def test_files_that_hold_nothing_are_refused_by_name(write, tmp_path):
    with pytest.raises(ValueError, match=r"0 of 2 records.*not_a_record 1, bad_output 1|bad_output 1, not_a_record 1"):
        read(write([7, REID | {"output": ""}], "all.json"), None)
    with pytest.raises(ValueError, match="0 of 1 records can be used .no_task 1.*Pass MMIU's all.parquet or all.json"):
        read(write({"data": []}, "all.json"), None)
    (tmp_path / "all.json").write_text("[{")
    with pytest.raises(ValueError, match=r"all\.json is not JSON"):
        read(tmp_path / "all.json", None)
    pytest.importorskip("pyarrow")
    (tmp_path / "all.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        read(tmp_path / "all.parquet", None)


def test_accuracies_by_hand(write):
    """Three questions of one task, one of each of two others: means over tasks and over questions differ."""
    unnamed = QUALITY | {"input_image_path": ["images/q.bmp"], "output": " b. "}
    questions, _ = read(write([FORENSIC, FORENSIC, FORENSIC, REID, unnamed], "all.json"), None)
    texts = ["D", "<think>D</think><answer>A</answer>", "I cannot tell.", "Answer: A", "no"]
    graded = grade(questions, texts)
    result = score(questions, graded)
    third = 100 / 3
    assert result["tasks"] == pytest.approx(
        {"forensic_detection_blink": third, "person_reid": 100, "visual_quality_assessment_q_bench+": 0}
    )
    assert result["mean"] == pytest.approx((third + 100 + 0) / 3)
    assert result["overall"] == pytest.approx(100 * 2 / 5)
    assert result["relationships"] == pytest.approx({"Low-level-semantic": third, "High-level-obj-semantic": 100})
    assert (result["count"], result["unread"], result["counts"]["forensic_detection_blink"]) == (5, 1, 3)
    assert [(g["chosen"], g["gold"], g["correct"]) for g in graded] == [
        ("D", "D", True), ("A", "D", False), (None, "D", False), ("A", "A", True), ("A", "B", False)
    ]  # fmt: skip
    json.dumps([result, graded])

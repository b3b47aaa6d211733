"""Scores on real records: gold scores 100, a wrong box costs its own task alone, another scorer finds the same."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.evaluation.grade import bootstrap, grade_texts, summarize
from scoring import text

GOLD = (200.0, 200.0, 600.0, 600.0)
WHOLE = Example("0", "region", (), "Where?", (0.0, 0.0, 1000.0, 1000.0), source="data.json#0")
MEASURES = ("accuracy_at_0.3", "accuracy_at_0.5", "accuracy_at_least_0.5", "accuracy_at_0.7", "mean_iou")


@pytest.mark.parametrize(
    ("answer_format", "form"),
    [
        ("marked", "<|object_ref_start|>it<|object_ref_end|><|box_start|>({0}00,{0}00),({1}00,{1}00)<|box_end|>"),
        ("list", "The box is [{0}00, {0}00, {1}00, {1}00]."),
        ("list", "<box>[[{0}00,{0}00,{1}00,{1}00]]</box>"),  # InternVL2's
        ("fractions", "[0.{0}, 0.{0}00, 0.{1}, 0.{1}]"),
        ("fractions", "(0.{0},0.{0}),(0.{1},0.{1})"),
        ("fractions", "(0.{0}, 0.{0}, 0.{1}, 0.{1})"),
        ("tagged", "<ref>it</ref><box>{0}00 {0}00 {1}00 {1}00</box>"),  # MiniCPM-V's
        ("box", "({0}00,{0}00),({1}00,{1}00)"),
    ],
)
def test_another_models_boxes_are_read_as_it_writes_them_and_none_in_its_reasoning(answer_format, form):
    """In its reasoning neither beside another box in the answer, nor alone."""
    example = dataclasses.replace(WHOLE, gold=GOLD)
    right, wrong = form.format(2, 6), form.format(7, 9)
    texts = [right, f"<think>{wrong}</think><answer>{right}</answer>"]
    texts += [f"<think>{right}</think><answer>{final}</answer>" for final in (wrong, "there")]
    graded = grade_texts([example] * 4, texts, answer_format=answer_format)
    assert [g["iou"] for g in graded] == [1.0, 1.0, 0.0, 0.0]
    assert (graded[0]["format"], graded[0]["box"]) == (1.0, list(GOLD))
    (own,) = grade_texts([example], [right])  # in the example's own format: thinking, and an answer in tags
    assert (own["iou"], own["format"], own["box"]) == (0.0, 0.0, None)


def test_a_box_in_pixels_is_one_of_the_target_image_as_it_is_seen(tmp_path):
    """Of several images the target; a photo with an EXIF turn has its sides swapped."""
    Image.new("RGB", (50, 50)).save(tmp_path / "other.png")
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.new("RGB", (300, 400)).save(tmp_path / "turned.jpg", exif=turn)
    images = (str(tmp_path / "other.png"), str(tmp_path / "turned.jpg"))
    example = dataclasses.replace(WHOLE, gold=GOLD, images=images, target_image=1)
    (graded,) = grade_texts([example], ["bbox: [80.0, 60, 240.0, 180]"], answer_format="pixels")
    assert graded["box"] == pytest.approx(GOLD) and graded["iou"] == pytest.approx(1.0)
    gone = dataclasses.replace(example, images=(images[0], str(tmp_path / "gone.png")))
    with pytest.raises(ValueError, match=r"data\.json#0: there is no image at .*gone\.png"):
        grade_texts([gone], ["[1, 2, 3, 4]"], answer_format="pixels")


@pytest.mark.parametrize("answer_format", ["list", "fractions", "pixels"])
def test_case_07_any_json_number_is_a_coordinate(tmp_path, answer_format):
    """In thousandths, fractions or pixels."""
    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    width, height = {"list": (1000, 1000), "fractions": (1, 1), "pixels": (400, 200)}[answer_format]
    box = 12.333333333333334 / 400 * width, 30e-3 * height, 0.5 * width, 0.75 * height
    gold = 1000 * 12.333333333333334 / 400, 30.0, 500.0, 750.0
    example = dataclasses.replace(WHOLE, gold=gold, images=(str(tmp_path / "a.png"),))
    x1, y1, x2, y2 = box
    texts = [f"[{x1!r}, {y1:.17e}, {x2}, {y2}]", f'{{"x1": "{x1!r}", "y1": {y1}, "x2": {x2}, "y2": {y2}}}']
    for graded in grade_texts([example] * 2, texts, answer_format=answer_format):
        assert graded["iou"] == pytest.approx(1.0, abs=1e-12) and graded["format"] == 1.0


def test_an_iou_of_exactly_a_half_is_not_above_it():
    (graded,) = grade_texts([WHOLE], [text((0, 0, 500, 1000))])
    summary = summarize([graded])
    assert graded["iou"] == 0.5
    assert (summary["accuracy_at_0.5"], summary["accuracy_at_least_0.5"]) == (0.0, 1.0)
    more = summarize(grade_texts([WHOLE], [text((0, 0, 501, 1000))]))
    assert more["accuracy_at_0.5"] == more["accuracy_at_least_0.5"] == 1.0
    narrower = dataclasses.replace(WHOLE, gold=(0.0, 0.0, 999.999999, 1000.0))
    (graded,) = grade_texts([narrower], [text((0, 0, 500, 1000))])
    assert 0.5 < graded["iou"] < 0.5 + 1e-8, "in fp32 it would be 0.5"


def test_iou_of_well_formed_answers_leaves_the_others_out():
    bare = "<answer>(0, 0), (1000, 1000)</answer>"  # right, but without its thinking
    summary = summarize(grade_texts([WHOLE, WHOLE], [bare, text((0, 0, 500, 1000))]))
    assert (summary["format"], summary["mean_iou"], summary["well_formed_iou"]) == (0.5, 0.75, 0.5)
    assert summarize(grade_texts([WHOLE], [bare]))["well_formed_iou"] == 0.0


def answers_with(ious: dict[str, list[float]]) -> list[dict]:
    return [{"task": task, "iou": iou, "format": 1.0} for task, found in ious.items() for iou in found]


def test_an_interval_is_the_binomials_and_the_same_for_the_same_seed():
    """60 hits of 100: a bootstrap's share of hits is binomial, with 2.5 % below 0.50 and above 0.69 or 0.70."""
    answers = answers_with({"region": [0.9] * 60 + [0.1] * 40})
    once, again, other = (summarize(answers, resamples=4000, seed=seed)["interval"] for seed in (1, 1, 2))
    assert once == again != other
    assert once["accuracy_at_0.5"] == pytest.approx([0.50, 0.695], abs=0.011)
    assert once["mean_iou"] == pytest.approx([0.1 + 0.8 * 0.50, 0.1 + 0.8 * 0.695], abs=0.011)
    few = summarize(answers[:55] + answers[-5:], resamples=4000)["interval"]["accuracy_at_0.5"]
    assert few[0] < 55 / 60 < few[1]
    assert "interval" not in summarize(answers)


def test_records_are_drawn_within_their_task():
    """One task all right, the other all wrong: whatever is drawn, the mean over tasks is a half."""
    certain = answers_with({"diff": [0.9] * 30, "region": [0.0] * 10})
    assert summarize(certain, resamples=500)["interval"]["accuracy_at_0.5"] == [0.5, 0.5]
    open_ones = {"diff": [0.9, 0.1] * 20, "region": [0.9, 0.1] * 20}
    both = summarize(answers_with(open_ones), resamples=4000)
    alone = summarize(answers_with({"diff": open_ones["diff"]}), resamples=4000)
    assert both["tasks"]["diff"]["interval"] == alone["tasks"]["diff"]["interval"], "a task's do not hang on others"

    def width(interval):
        low, high = interval["accuracy_at_0.5"]
        return high - low

    # Two tasks drawn alike would be as wide as one.
    assert width(both["interval"]) == pytest.approx(width(alone["interval"]) / 2**0.5, rel=0.1)


def test_many_records_are_drawn_in_parts(monkeypatch):
    """As many values at once as memory is meant for, and all resamples in the end."""
    ious = np.linspace(0, 1, 300)
    monkeypatch.setattr("boxgrpo.trainer.evaluation.grade.MAX_RESAMPLED", 700)  # two rows
    drawn = bootstrap(ious, 15, np.random.default_rng(0))
    assert {name: len(values) for name, values in drawn.items()} == dict.fromkeys(MEASURES, 15)
    assert drawn["mean_iou"].std() == pytest.approx(ious.std() / 300**0.5, rel=0.5)

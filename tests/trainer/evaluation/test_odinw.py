"""ODinW-13's folders become questions, one an image and category; answers become AP of each set."""

import json
import random

import pytest

from boxgrpo.trainer.evaluation.odinw import SETS, grade, read, score

pytest.importorskip("pycocotools")

PISTOLS = {
    "images": [
        {"id": 0, "file_name": "a.jpg", "height": 500, "width": 1000},
        {"id": 1, "file_name": "b.jpg", "height": 100, "width": 100},
    ],
    "categories": [{"id": 1, "name": "pistol", "supercategory": "Guns"}],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 1, "bbox": [100, 50, 200, 100], "area": 20000, "iscrowd": 0},
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [500, 250, 500, 250], "area": 125000, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0},
    ],
}
THERMAL = {
    "images": [{"id": 4, "file_name": "t.jpg", "height": 100, "width": 100}],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}],
    "annotations": [{"id": 0, "image_id": 4, "category_id": 1, "bbox": [10, 10, 40, 40], "iscrowd": 0}],
}


@pytest.fixture
def write_sets(write, tmp_path):
    """write_sets(pistols=...) -> the folder with the annotation file of each set."""

    def write_files(**sets):
        for name, data in sets.items():
            write(data, f"odinw/{SETS[name]}")
        return tmp_path / "odinw"

    return write_files


def scores_of(questions, texts):
    return score(questions, grade(questions, texts))


def answer(question, *, shift=0.0):
    """What a perfect model writes, moved to the right by `shift` thousandths; in one of the forms it may take."""
    return "".join(
        f"<|box_start|>({x1 + shift:g},{y1:g}),({x2 + shift:g},{y2:g})<|box_end|>"
        for x1, y1, x2, y2 in grade([question], [""])[0]["gold"]
    )


def test_each_image_has_a_question_for_each_category(write_sets):
    folder = write_sets(pistols=PISTOLS, thermalDogsAndPeople=THERMAL)
    questions, faults = read(folder, None)
    assert [(q.task, q.image_id, q.category, len(q.truth)) for q in questions] == [
        ("pistols", 0, "pistol", 2),
        ("pistols", 1, "pistol", 1),
        ("thermalDogsAndPeople", 4, "dog", 1),
        ("thermalDogsAndPeople", 4, "person", 0),
    ]
    assert questions[0].images == (str(folder / "pistols/export/a.jpg"),), "where GLIP unpacks the set"
    assert [q.source for q in questions[1:3]] == ["pistols#1/1", "thermalDogsAndPeople#4/1"]
    assert len({q.source for q in questions}) == 4
    assert len(SETS) == 13 and [f.reason for f in faults] == ["no_annotations"] * 11
    assert questions[0].question == (
        "Locate every pistol in the image. First output the thinking process in <think> </think> tags"
        " and then output the bounding boxes in <answer> </answer> tags."
    )
    # `Processor.prompt` adds its own request for one box to a question without turns.
    assert questions[0].turns == (("user", questions[0].question),)


def test_images_stay_under_their_root(write_sets, write, tmp_path):
    """In the sets' own layout; one file is a set of its own, and its images are in the root itself."""
    images = [*PISTOLS["images"], {"id": 2, "file_name": "../../../secret.jpg", "height": 1, "width": 1}]
    folder = write_sets(pistols=PISTOLS | {"images": images})
    questions, faults = read(folder, tmp_path)
    assert questions[0].images == (str(tmp_path / "pistols/export/a.jpg"),) and len(questions) == 2
    assert ("pistols/images#2", "image_outside_root") in {(f.source, f.reason) for f in faults}
    questions, _ = read(folder / SETS["pistols"], tmp_path / "photos")
    assert {q.task for q in questions} == {"pistols"}
    assert questions[0].images == (str(tmp_path / "photos/a.jpg"),)
    assert {q.task for q in read(write(THERMAL, "mine.json"), None)[0]} == {"mine"}


def test_a_folder_without_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"0 of 13 records can be used \(no_annotations 13\).*odinw/download\.py"):
        read(tmp_path, None)


def test_a_perfect_answer_scores_100(write_sets, capsys):
    """And pycocotools prints nothing."""
    questions, _ = read(write_sets(pistols=PISTOLS, thermalDogsAndPeople=THERMAL), None)
    result = scores_of(questions, [answer(q) for q in questions])
    assert result["mean"] == result["mean_equal_scores"] == pytest.approx(100)
    assert result["tasks"] == pytest.approx({"pistols": 100, "thermalDogsAndPeople": 100})
    assert result["sets"]["pistols"] == pytest.approx(
        {"ap": 100, "ap50": 100, "ap75": 100, "ap_equal_scores": 100, "images": 2, "true_boxes": 3, "boxes": 3}
    )
    assert len(result["missing"]) == 11 and "pistols" not in result["missing"]
    assert (result["count"], result["unread"]) == (4, 1)  # there is no person, and none is found
    json.dumps(result)
    assert capsys.readouterr().out == ""


def test_the_first_box_of_an_answer_gets_the_highest_score(write_sets):
    """A wrong box after the right one: with equal scores it comes before the next image's right one."""
    questions, _ = read(write_sets(pistols=PISTOLS | {"annotations": PISTOLS["annotations"][::2]}), None)
    texts = ["(100, 100), (300, 300), (900, 0), (950, 50)", answer(questions[1])]
    result = scores_of(questions, texts)
    assert result["mean"] == pytest.approx(100)
    assert result["mean_equal_scores"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert grade(questions, texts)[0]["scores"] == [1, 0.5]
    scored = '[{"bbox_2d": [900, 0, 950, 50], "score": 0.9}, {"bbox_2d": [100, 100, 300, 300], "score": 0.2}]'
    assert grade(questions, [scored, ""])[0]["scores"] == [0.9, 0.2]


def test_an_inverted_box_is_wrong_and_no_error(write_sets):
    questions, _ = read(write_sets(thermalDogsAndPeople=THERMAL), None)
    inverted = "(250, 100), (0, 500)"  # turned round about its corner, it would have IoU 0.625
    assert scores_of(questions, [inverted, ""])["mean"] == 0
    assert scores_of(questions, [f"{inverted}, (100, 100), (500, 500)", ""])["mean"] == pytest.approx(50)


def test_equal_to_pycocotools_on_the_file_itself(write_sets):
    """Answers moved at random, against COCO's own loader on the annotation file (its ids from 1) and pixel results.

    Some boxes are crowds; one image has no box, and one category has none.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    g = random.Random(1)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(21)]
    annotations = [
        {"id": n + 1, "image_id": n % 20, "category_id": 1 + n % 3, "iscrowd": int(n % 11 == 0)}
        | {"bbox": [w := g.randrange(200), h := g.randrange(200), 20 + w, 30 + h], "area": (20 + w) * (30 + h)}
        for n in range(90)
    ]
    categories = [{"id": i, "name": f"c{i}"} for i in (1, 2, 3, 4)]
    folder = write_sets(Aquarium={"images": images, "annotations": annotations, "categories": categories})
    questions, _ = read(folder, None)
    wrong = "(10, 10), (200, 200)"
    texts = [g.choice(["", wrong]) + answer(q, shift=g.choice([0, 10, 30])) for q in questions]
    results = [
        {"image_id": q.image_id, "category_id": q.category_id, "score": 1 / (1 + n)}
        | {"bbox": [x1 * 0.64, y1 * 0.48, (x2 - x1) * 0.64, (y2 - y1) * 0.48]}
        for q, graded in zip(questions, grade(questions, texts))
        for n, (x1, y1, x2, y2) in enumerate(graded["boxes"])
    ]
    coco = COCO(str(folder / SETS["Aquarium"]))
    direct = COCOeval(coco, coco.loadRes(results), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    ours = scores_of(questions, texts)["sets"]["Aquarium"]
    assert [ours["ap"], ours["ap50"], ours["ap75"]] == pytest.approx(list(100 * direct.stats[:3]), abs=1e-9)
    assert 10 < ours["ap"] < 95


def test_scores_need_a_true_box(write_sets):
    questions, _ = read(write_sets(pistols=PISTOLS, thermalDogsAndPeople=THERMAL), None)
    with pytest.raises(ValueError, match="1 questions have 0 true boxes"):
        scores_of(questions[3:], [""])
    people = [q for q in questions if q.category != "dog"]
    result = scores_of(people, [answer(q) for q in people])
    assert result["tasks"] == {"pistols": pytest.approx(100), "thermalDogsAndPeople": None}
    assert result["mean"] == pytest.approx(100)

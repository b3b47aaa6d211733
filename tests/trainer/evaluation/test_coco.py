"""COCO files are read entry by entry; average precision equals the hand's and pycocotools' own."""

import json
import random

import pytest

from boxgrpo.trainer.data.example import Refused
from boxgrpo.trainer.evaluation.coco import average_precision, read_coco

pytest.importorskip("pycocotools")

# As Roboflow exports them, and so ODinW: ids from 0, file names beside the file.
FILE = {
    "images": [
        {"id": 0, "file_name": "a.jpg", "height": 100, "width": 200},
        {"id": 1, "file_name": "b c.jpg", "height": 50, "width": 50},
    ],
    "categories": [{"id": 1, "name": "fish", "supercategory": "sea"}, {"id": 2, "name": "shark"}],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0},
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [100, 20, 30.5, 40]},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 50, 50], "iscrowd": 1},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write_file(data):
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(data))
        return path

    return write_file


def boxes_at(where, boxes, scores):
    image_id, category_id = where
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": [*map(float, box)], "area": box[2] * box[3]}
        | {"iscrowd": 0, "score": score}
        for box, score in zip(boxes, scores, strict=True)
    ]


def true(*boxes):
    return boxes, [0.0] * len(boxes)


def found(*boxes, scores=None):
    return boxes, scores or [1.0] * len(boxes)


def precision(true_boxes, found_boxes):
    """`average_precision` of boxes by (image, category)."""
    rows = ([row for where, boxes in of.items() for row in boxes_at(where, *boxes)] for of in (true_boxes, found_boxes))
    return average_precision([*true_boxes, *found_boxes], *rows)


def content(coco):
    return coco.imgs, coco.cats, coco.anns


def test_a_file_is_images_categories_and_boxes(write, tmp_path):
    coco, faults = read_coco(write(FILE), "sea")
    assert not faults
    assert coco.imgs == {
        0: {"id": 0, "file_name": str(tmp_path / "a.jpg"), "width": 200.0, "height": 100.0},
        1: {"id": 1, "file_name": str(tmp_path / "b c.jpg"), "width": 50.0, "height": 50.0},
    }
    assert coco.cats == {1: {"id": 1, "name": "fish"}, 2: {"id": 2, "name": "shark"}}
    assert coco.anns == {
        1: {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0},
        2: {"id": 2, "image_id": 0, "category_id": 1, "bbox": [100, 20, 30.5, 40], "area": 1220, "iscrowd": 0},
        3: {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1},
    }


@pytest.mark.parametrize(
    ("key", "row", "reason", "value"),
    [
        ("annotations", {"image_id": 7, "category_id": 1, "bbox": [1, 1, 1, 1]}, "unknown_image", "7"),
        ("annotations", {"image_id": 0, "category_id": 9, "bbox": [1, 1, 1, 1]}, "unknown_category", "9"),
        ("annotations", {"image_id": [0], "category_id": 1, "bbox": [1, 1, 1, 1]}, "bad_image_id", "[0]"),
        ("annotations", {"image_id": 0, "category_id": 1, "bbox": [1, 1, 1]}, "bad_box", "[1, 1, 1]"),
        ("annotations", {"image_id": 0, "category_id": 1, "bbox": [1, 1, 1, float("nan")]}, "bad_box", "nan"),
        ("annotations", {"image_id": 0, "category_id": 1, "bbox": [1, 1, 0, 5]}, "box_empty", "[1, 1, 0, 5]"),
        ("annotations", {"image_id": 0, "category_id": 1, "bbox": [200, 1, 5, 5]}, "box_outside", "200 x 100"),
        ("annotations", "box", "not_a_record", "'box'"),
        ("images", {"id": 0, "file_name": "z.jpg", "height": 1, "width": 1}, "id_twice", "0"),
        ("images", {"id": "3", "file_name": "z.jpg", "height": 1, "width": 1}, "bad_id", "'3'"),
        ("images", {"id": 3, "file_name": "", "height": 1, "width": 1}, "no_file_name", "''"),
        ("images", {"id": 3, "file_name": "z.jpg", "height": 0, "width": 1}, "bad_size", "[1, 0]"),
        ("images", {"id": 3, "file_name": "../../z.jpg", "height": 1, "width": 1}, "image_outside_root", "../../z.jpg"),
        ("images", {"id": 3, "file_name": "/z.jpg", "height": 1, "width": 1}, "image_outside_root", "/z.jpg"),
        ("categories", {"id": 2, "name": "again"}, "id_twice", "2"),
        ("categories", {"id": 3, "name": None}, "no_name", "None"),
    ],
)
def test_a_faulty_entry_is_named_and_the_others_stay(write, tmp_path, key, row, reason, value):
    good, _ = read_coco(write(FILE), "sea", tmp_path)
    coco, faults = read_coco(write(FILE | {key: [*FILE[key], row]}), "sea", tmp_path)
    assert content(coco) == content(good)
    (fault,) = faults
    assert (fault.source, fault.reason) == (f"sea/{key}#{len(FILE[key])}", reason)
    assert value in fault.message


def test_boxes_that_only_lean_out_of_the_image_stay(write):
    row = {"image_id": 0, "category_id": 1, "bbox": [-0.5, 90, 20, 20]}
    coco, faults = read_coco(write(FILE | {"annotations": [row]}), "sea")
    assert not faults and len(coco.imgToAnns[0]) == 1


def test_what_is_no_coco_file_is_refused(write, tmp_path):
    with pytest.raises(Refused, match="cannot be read") as missing:
        read_coco(tmp_path / "none.json", "sea")
    with pytest.raises(Refused, match="no COCO annotation file"):
        read_coco(write([1, 2]), "sea")
    with pytest.raises(Refused, match="no COCO annotation file"):
        read_coco(write({"images": [], "annotations": {}, "categories": []}), "sea")
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(Refused, match="is not JSON"):
        read_coco(tmp_path / "annotations.json", "sea")
    assert missing.value.reason == "no_annotations"


BOX, FAR = (0, 0, 100, 100), (500, 500, 100, 100)


@pytest.mark.parametrize(
    ("true_boxes", "found_boxes", "ap"),
    [
        ({(0, 1): true(BOX)}, {(0, 1): found(BOX)}, 100),
        ({(0, 1): true(BOX)}, {(0, 1): true()}, 0),
        ({(0, 1): true(BOX)}, {(0, 1): found(FAR)}, 0),
        # One of two: precision 1 up to recall 0.5, which is 51 of COCO's 101 points.
        ({(0, 1): true(BOX, FAR)}, {(0, 1): found(BOX)}, 100 * 51 / 101),
        # Two, the surer one wrong: precision 1/2 at every recall; the other way round the wrong one costs nothing.
        ({(0, 1): true(BOX)}, {(0, 1): found(FAR, BOX, scores=[0.9, 0.8])}, 50),
        ({(0, 1): true(BOX)}, {(0, 1): found(FAR, BOX, scores=[0.8, 0.9])}, 100),
        # The same box twice: the second is wrong, but comes after recall 1.
        ({(0, 1): true(BOX)}, {(0, 1): found(BOX, BOX)}, 100),
        # IoU 0.6 counts at 0.50, 0.55 and 0.60, three of ten thresholds.
        ({(0, 1): true(BOX)}, {(0, 1): found((0, 0, 60, 100))}, 30),
        # A box in an image without one: as likely as the right one, and the right one comes first.
        ({(0, 1): true(BOX), (1, 1): true()}, {(0, 1): found(BOX), (1, 1): found(BOX)}, 100),
        ({(0, 1): true(), (1, 1): true(BOX)}, {(0, 1): found(BOX), (1, 1): found(BOX)}, 50),
        # A category without truth does not count; one with truth and nothing found does.
        ({(0, 1): true(BOX), (0, 2): true()}, {(0, 1): found(BOX), (0, 2): found(BOX)}, 100),
        ({(0, 1): true(BOX), (0, 2): true(BOX)}, {(0, 1): found(BOX), (0, 2): true()}, 50),
        # A box without area finds nothing, and is wrong.
        ({(0, 1): true(BOX)}, {(0, 1): found((10, 10, 0, 0), BOX, scores=[0.9, 0.8])}, 50),
    ],
)
def test_average_precision_by_hand(true_boxes, found_boxes, ap, capsys):
    assert precision(true_boxes, found_boxes)[0] == pytest.approx(ap, abs=1e-9)
    assert capsys.readouterr().out == ""


def test_a_box_found_in_a_crowd_counts_neither_way():
    crowd = boxes_at((0, 1), *true((400, 400, 400, 400)))[0] | {"iscrowd": 1}
    boxes = boxes_at((0, 1), *found(FAR, BOX, scores=[0.9, 0.8]))
    assert average_precision([(0, 1)], [*boxes_at((0, 1), *true(BOX)), crowd], boxes)[0] == pytest.approx(100)


def test_ap_at_one_threshold():
    ap, ap50, ap75 = precision({(0, 1): true(BOX)}, {(0, 1): found((0, 0, 60, 100))})
    assert (ap, ap50, ap75) == pytest.approx((30, 100, 0))


def test_no_true_box_has_no_average_precision():
    assert precision({(0, 1): true()}, {(0, 1): found(BOX)}) is None


def test_equal_to_a_direct_call_of_pycocotools(tmp_path):
    """Random boxes in 12 images of 3 categories, through files and loadRes as its own demo goes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    g = random.Random(0)
    true_boxes, found_boxes = {}, {}
    for where in [(image, category) for image in range(12) for category in (1, 2, 5)]:
        boxes = [[g.uniform(0, 300), g.uniform(0, 300), g.uniform(5, 200), g.uniform(5, 200)] for _ in range(3)]
        true_boxes[where] = true(*boxes[: g.randrange(4)])
        moved = [[x + g.gauss(0, 8), y + g.gauss(0, 8), w * g.uniform(0.8, 1.2), h] for x, y, w, h in boxes]
        found_boxes[where] = found(*moved, scores=[g.random() for _ in moved])
    places = {"images": [{"id": i} for i in range(12)], "categories": [{"id": i} for i in (1, 2, 5)]}
    truth = [row for where, boxes in true_boxes.items() for row in boxes_at(where, *boxes)]
    truth = [row | {"id": number} for number, row in enumerate(truth, 1)]
    results = [row for where, boxes in found_boxes.items() for row in boxes_at(where, *boxes)]
    (tmp_path / "true.json").write_text(json.dumps(places | {"annotations": truth}))
    (tmp_path / "found.json").write_text(json.dumps(results))
    coco = COCO(str(tmp_path / "true.json"))
    direct = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    ours = precision(true_boxes, found_boxes)
    assert ours == pytest.approx([100 * s for s in direct.stats[:3]], abs=1e-9)
    assert 20 < ours[0] < 90 and ours[1] > ours[2]

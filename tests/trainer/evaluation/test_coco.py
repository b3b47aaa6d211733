"""COCO files are read entry by entry."""

import pytest

from boxgrpo.trainer.data.example import Refused
from boxgrpo.trainer.evaluation.coco import read_coco

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
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [-0.5, 40, 20, 20], "iscrowd": 1},  # leans out
    ],
}


def test_a_file_is_images_categories_and_boxes(write, tmp_path):
    coco, faults = read_coco(write(FILE, "annotations.json"), "sea")
    assert not faults
    assert coco.imgs == {
        0: {"id": 0, "file_name": str(tmp_path / "a.jpg"), "width": 200.0, "height": 100.0},
        1: {"id": 1, "file_name": str(tmp_path / "b c.jpg"), "width": 50.0, "height": 50.0},
    }
    assert coco.cats == {1: {"id": 1, "name": "fish"}, 2: {"id": 2, "name": "shark"}}
    assert coco.anns == {
        1: {"id": 1, "image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0},
        2: {"id": 2, "image_id": 0, "category_id": 1, "bbox": [100, 20, 30.5, 40], "area": 1220, "iscrowd": 0},
        3: {"id": 3, "image_id": 1, "category_id": 2, "bbox": [-0.5, 40, 20, 20], "area": 400, "iscrowd": 1},
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
    good, _ = read_coco(write(FILE, "annotations.json"), "sea", tmp_path)
    coco, faults = read_coco(write(FILE | {key: [*FILE[key], row]}, "annotations.json"), "sea", tmp_path)
    assert coco.dataset == good.dataset
    (fault,) = faults
    assert (fault.source, fault.reason) == (f"sea/{key}#{len(FILE[key])}", reason)
    assert value in fault.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no_annotations"),
        ("[1, 2]", "not_coco"),
        ('{"images": [], "annotations": {}, "categories": []}', "not_coco"),
        ("{", "not_json"),
    ],
)
def test_what_is_no_coco_file_is_refused(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(Refused, match=r"annotations\.json") as refused:
        read_coco(tmp_path / "annotations.json", "sea")
    assert refused.value.reason == reason

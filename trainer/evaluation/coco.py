"""COCO's annotation files, whose faulty entries are named and passed over, and its average precision (pycocotools).

An annotation or a detection is COCO's dictionary of `id`, `image_id`, `category_id`, `bbox` ([x, y, width, height] in
pixels), `area`, `iscrowd` and, for a detection, `score` (0-1; only the order matters).
"""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from boxgrpo.trainer.data.example import Place, Refused, is_numbers, resolve_images, text_of


def read_coco(path: Path, name: str, image_root: str | os.PathLike | None = None, folder: str = ""):
    """The usable entries of an annotation file as a `pycocotools.coco.COCO`. No image is opened.

    Args:
        path: the file.
        name: begins the faults' sources: "NAME/annotations#3" is the fourth annotation.
        image_root, folder: an image lies at `image_root/folder/file_name` and must not leave the root. Without a root
            it lies beside the file, and any path is allowed.

    Returns:
        The COCO, whose images' `file_name` are resolved paths and whose annotations are numbered from 1, and one
        `Fault` for each entry that cannot be used.

    Raises:
        Refused: there is no such file, or it is no COCO annotation file.
        ValueError: pycocotools is not installed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused("no_annotations", f"{path} cannot be read ({error.strerror}). Fetch the set.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refused("not_json", f"{path} is not JSON ({error}). Fetch the set again.") from error
    checks = {"images": _image, "categories": _category, "annotations": _annotation}  # in the order of their references
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in checks):
        raise Refused("not_coco", f"{path} is no COCO annotation file; it needs lists {', '.join(checks)}.")
    place = Place.of(path, image_root)
    usable, faults = {key: {} for key in checks}, []
    for key, checked in checks.items():
        for index, row in enumerate(data[key]):
            try:
                if not isinstance(row, dict):
                    raise Refused("not_a_record", f"{row!r:.80} is no JSON object. Drop it.")
                entry = checked(row, usable, place, folder)
                usable[key][entry["id"]] = entry
            except Refused as refused:
                faults.append(refused.fault(f"{name}/{key}#{index}"))
    return make_coco(**{key: [*entries.values()] for key, entries in usable.items()}), faults


def average_precision(
    asked: Sequence[tuple[int, int]], true: Sequence[dict], found: Sequence[dict]
) -> tuple[float, float, float] | None:
    """COCO's AP over IoU 0.50 to 0.95, at 0.50 and at 0.75, in percent, by pycocotools; None without a true box.

    Args:
        asked: (image id, category id). A category without a true box does not enter the mean; an image without one
            does, with what was found in it.
        true, found: annotations and detections.
    """
    from pycocotools.cocoeval import COCOeval

    images, categories = ([{"id": number} for number in dict.fromkeys(ids)] for ids in zip(*asked))
    evaluation = COCOeval(make_coco(images, categories, true), make_coco(images, categories, found), "bbox")
    # Boxes of every size, at most 100 an image and category: the part of COCO's table that is reported here.
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    evaluation.params.maxDets = [100]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (10 thresholds, 101 recalls, categories, 1, 1), 0-1; -1 without truth
    with_truth = precision[:, :, (precision > -1).all(axis=(0, 1, 3, 4))]
    if not with_truth.size:
        return None
    return tuple(100 * float(part.mean()) for part in (with_truth, with_truth[0], with_truth[5]))


def make_coco(images: Sequence[dict], categories: Sequence[dict], annotations: Sequence[dict]):
    """A COCO with its index. Annotations are numbered from 1: COCOeval takes a match with id 0 for none."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ValueError("COCO files need pycocotools, which is missing. Run `pip install pycocotools`.") from error
    coco = COCO()
    numbered = [row | {"id": number} for number, row in enumerate(annotations, 1)]
    coco.dataset = {"images": [*images], "categories": [*categories], "annotations": numbered}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _image(row: dict, usable: dict, place: Place, folder: str) -> dict:
    number = _new_id(row, usable["images"])
    file_name = text_of(row.get("file_name"), "file_name")
    (resolved,) = resolve_images([os.path.join(folder, file_name) if place.bounded else file_name], place)
    sides = [row.get("width"), row.get("height")]
    if not is_numbers(sides) or min(sides) <= 0:
        raise Refused("bad_size", f"width and height are {sides!r:.80}; two numbers above 0 are needed.")
    return {"id": number, "file_name": resolved, "width": float(sides[0]), "height": float(sides[1])}


def _category(row: dict, usable: dict, place: Place, folder: str) -> dict:
    return {"id": _new_id(row, usable["categories"]), "name": text_of(row.get("name"), "name")}


def _annotation(row: dict, usable: dict, place: Place, folder: str) -> dict:
    image = _known(row, "image", usable["images"])
    category = _known(row, "category", usable["categories"])
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not is_numbers(box):
        raise Refused("bad_box", f"bbox is {box!r:.80}; [x, y, width, height] in pixels is needed.")
    x, y, width, height = map(float, box)
    if width <= 0 or height <= 0:
        raise Refused("box_empty", f"bbox {box} has no area; width and height must be above 0.")
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        size = f"{image['width']:g} x {image['height']:g}"
        raise Refused("box_outside", f"bbox {box} lies outside the image of {size} pixels.")
    place_of = {"id": len(usable["annotations"]), "image_id": image["id"], "category_id": category["id"]}
    return place_of | {"bbox": [x, y, width, height], "area": width * height, "iscrowd": int(bool(row.get("iscrowd")))}


def _known(row: dict, kind: str, usable: dict[int, dict]) -> dict:
    number = _whole(row, f"{kind}_id")
    if number not in usable:
        raise Refused(f"unknown_{kind}", f"{kind}_id is {number}; no usable {kind} has that id.")
    return usable[number]


def _new_id(row: dict, known: dict[int, object]) -> int:
    number = _whole(row, "id")
    if number in known:
        raise Refused("id_twice", f"id {number} was there before. Number the entries anew.")
    return number


def _whole(row: dict, key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"bad_{key}", f"{key} is {value!r:.80}; a whole number is needed.")
    return value

"""Read COCO's annotation files, skipping and reporting faulty entries, and compute its average precision.

An annotation or a detection is COCO's dictionary of `id`, `image_id`, `category_id`, `bbox` ([x, y, width, height] in
pixels), `area`, `iscrowd` and, for a detection, `score` (0-1; only the order matters).
"""

import contextlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.data.example import Refused, Source, check_text, is_numbers
from boxgrpo.trainer.data.images import resolve_images

from .questions import read_each


def read_coco(path: Path, name: str, image_root: str | os.PathLike | None = None, folder: str = ""):
    """The usable entries of an annotation file as a `pycocotools.coco.COCO`. No image is opened.

    Args:
        path: the file.
        name: prefix of the faults' sources: "NAME/annotations#3" is the fourth annotation.
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
    entries, faults = _Entries(Source.of(path, image_root), folder), []
    add = {"images": entries.add_image, "categories": entries.add_category, "annotations": entries.add_annotation}
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in add):
        raise Refused("not_coco", f"{path} is no COCO annotation file; it needs lists {', '.join(add)}.")
    for key in add:
        faults += read_each(data[key], add[key], f"{name}/{key}")[1]
    return make_coco(entries.images.values(), entries.categories.values(), entries.annotations), faults


def average_precision(
    pairs: Sequence[tuple[int, int]], true: Sequence[dict], found: Sequence[dict]
) -> tuple[float, float, float] | tuple[None, None, None]:
    """COCO's AP over IoU 0.50 to 0.95, at 0.50 and at 0.75, in percent, by pycocotools; None if there is no true box.

    Args:
        pairs: the questions' (image id, category id). A category without a true box is not part of the
            mean; the boxes found in an image without a true box count as wrong.
        true, found: annotations and detections.
    """
    from pycocotools.cocoeval import COCOeval

    images, categories = ([{"id": number} for number in dict.fromkeys(ids)] for ids in zip(*pairs))
    evaluation = COCOeval(make_coco(images, categories, true), make_coco(images, categories, found), "bbox")
    # Boxes of every size, at most 100 an image and category: the part of COCO's table that is reported here.
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    evaluation.params.maxDets = [100]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (10 thresholds, 101 recalls, categories, 1, 1), 0-1; -1: no true box
    with_truth = precision[:, :, (precision > -1).all(axis=(0, 1, 3, 4))]
    if not with_truth.size:
        return None, None, None
    return tuple(100 * float(part.mean()) for part in (with_truth, with_truth[0], with_truth[5]))


def make_coco(images: Iterable[dict], categories: Iterable[dict], annotations: Iterable[dict]):
    """A COCO with its index. Annotations are numbered from 1: COCOeval treats a match with id 0 as none."""
    with optional_import("bench is 'odinw'", "Run `pip install pycocotools`."):
        from pycocotools.coco import COCO
    coco = COCO()
    numbered = [row | {"id": number} for number, row in enumerate(annotations, 1)]
    coco.dataset = {"images": [*images], "categories": [*categories], "annotations": numbered}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class _Entries:
    """The usable entries of an annotation file. Each `add_...` raises Refused for an entry that breaks a rule."""

    def __init__(self, file: Source, folder: str):
        self.file, self.folder = file, folder
        self.images: dict[int, dict] = {}
        self.categories: dict[int, dict] = {}
        self.annotations: list[dict] = []

    def add_image(self, row: dict, source: str) -> None:
        number = _new_id(row, self.images)
        file_name = check_text(row.get("file_name"), "file_name")
        path = os.path.join(self.folder, file_name) if self.file.bounded else file_name
        (resolved,) = resolve_images([path], self.file)
        sides = [row.get("width"), row.get("height")]
        if not is_numbers(sides) or min(sides) <= 0:
            raise Refused("bad_size", f"width and height are {sides!r:.80}; two numbers above 0 are needed.")
        width, height = map(float, sides)
        self.images[number] = {"id": number, "file_name": resolved, "width": width, "height": height}

    def add_category(self, row: dict, source: str) -> None:
        number = _new_id(row, self.categories)
        self.categories[number] = {"id": number, "name": check_text(row.get("name"), "name")}

    def add_annotation(self, row: dict, source: str) -> None:
        owners = {"image": self.images, "category": self.categories}
        ids = {f"{kind}_id": _whole(row, f"{kind}_id") for kind in owners}
        for (kind, known), number in zip(owners.items(), ids.values()):
            if number not in known:
                raise Refused(f"unknown_{kind}", f"{kind}_id is {number}; no usable {kind} has that id.")
        box = row.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not is_numbers(box):
            raise Refused("bad_box", f"bbox is {box!r:.80}; [x, y, width, height] in pixels is needed.")
        x, y, width, height = map(float, box)
        if width <= 0 or height <= 0:
            raise Refused("box_empty", f"bbox {box} has no area; width and height must be above 0.")
        image = self.images[ids["image_id"]]
        if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
            size = f"{image['width']:g} x {image['height']:g}"
            raise Refused("box_outside", f"bbox {box} lies outside the image of {size} pixels.")
        shape = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": int(bool(row.get("iscrowd")))}
        self.annotations.append({"id": len(self.annotations) + 1} | ids | shape)


def _new_id(row: dict, known: dict[int, dict]) -> int:
    number = _whole(row, "id")
    if number in known:
        raise Refused("id_twice", f"id {number} occurs twice. Renumber the entries.")
    return number


def _whole(row: dict, key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"bad_{key}", f"{key} is {value!r:.80}; a whole number is needed.")
    return value

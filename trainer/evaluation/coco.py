"""COCO's annotation files, whose faulty entries are named and passed over, and its average precision."""

import contextlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from boxgrpo.trainer.data.example import Box, Fault, Place, Refused, is_numbers, resolve_images, text_of


@dataclass(frozen=True)
class CocoImage:
    path: str  # resolved
    width: float  # pixels
    height: float


@dataclass(frozen=True)
class TrueBox:
    """An annotation of one category in one image."""

    xywh: Box  # pixels
    crowd: bool  # a box found there counts neither for nor against


@dataclass(frozen=True)
class FoundBox:
    """A detection."""

    xywh: Box  # pixels
    score: float  # 0-1; only the order matters


@dataclass(frozen=True)
class CocoFile:
    images: dict[int, CocoImage]
    categories: dict[int, str]  # id to name
    boxes: dict[tuple[int, int], tuple[TrueBox, ...]]  # (image id, category id) to its boxes


def read_coco(
    path: Path, name: str, image_root: str | os.PathLike | None = None, folder: str = ""
) -> tuple[CocoFile, list[Fault]]:
    """What is usable of an annotation file, and one `Fault` for each entry that is not. No image is opened.

    Args:
        path: the file.
        name: begins the faults' sources: "NAME/annotations#3" is the fourth annotation.
        image_root, folder: an image lies at `image_root/folder/file_name` and must not leave the root. Without a root
            it lies beside the file, and any path is allowed.

    Raises:
        Refused: there is no such file, or it is no COCO annotation file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused("no_annotations", f"{path} cannot be read ({error.strerror}). Fetch the set.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refused("not_json", f"{path} is not JSON ({error}). Fetch the set again.") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        raise Refused("not_coco", f"{path} is no COCO annotation file; it needs lists {', '.join(keys)}.")

    faults: list[Fault] = []

    def each(key: str, enter: Callable[[dict], None]) -> None:
        for index, row in enumerate(data[key]):
            try:
                if not isinstance(row, dict):
                    raise Refused("not_a_record", f"{row!r:.80} is no JSON object. Drop it.")
                enter(row)
            except Refused as refused:
                faults.append(refused.fault(f"{name}/{key}#{index}"))

    images: dict[int, CocoImage] = {}
    categories: dict[int, str] = {}
    boxes = defaultdict(list)

    def image(row: dict) -> None:
        number = _new_id(row, images)
        file_name = text_of(row.get("file_name"), "file_name")
        within = file_name if image_root is None else os.path.join(folder, file_name)
        (resolved,) = resolve_images([within], Place.of(path, image_root))
        sides = [row.get("width"), row.get("height")]
        if not is_numbers(sides) or min(sides) <= 0:
            raise Refused("bad_size", f"width and height are {sides!r:.80}; two numbers above 0 are needed.")
        images[number] = CocoImage(resolved, *map(float, sides))

    def category(row: dict) -> None:
        categories[_new_id(row, categories)] = text_of(row.get("name"), "name")

    def annotation(row: dict) -> None:
        where = _whole(row, "image_id"), _whole(row, "category_id")
        for known, number, kind in zip((images, categories), where, ("image", "category")):
            if number not in known:
                raise Refused(f"unknown_{kind}", f"{kind}_id is {number}; no usable {kind} has that id.")
        boxes[where].append(TrueBox(_xywh(row.get("bbox"), images[where[0]]), bool(row.get("iscrowd"))))

    each("images", image)
    each("categories", category)
    each("annotations", annotation)
    return CocoFile(images, categories, {where: tuple(found) for where, found in boxes.items()}), faults


def average_precision(
    true: dict[tuple[int, int], Sequence[TrueBox]], found: dict[tuple[int, int], Sequence[FoundBox]]
) -> tuple[float, float, float] | None:
    """COCO's AP over IoU 0.50 to 0.95, at 0.50 and at 0.75, in percent, by pycocotools; None without a true box.

    Args:
        true, found: boxes by (image id, category id). A category without a true box does not enter the mean; an image
            without one does, with what was found in it.

    Raises:
        ValueError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ValueError("COCO's AP needs pycocotools, which is missing. Run `pip install pycocotools`.") from error
    asked = [*true, *found]
    images = [{"id": number} for number in dict.fromkeys(image_id for image_id, _ in asked)]
    categories = [{"id": number} for number in dict.fromkeys(category_id for _, category_id in asked)]

    def indexed(boxes: dict[tuple[int, int], Sequence[TrueBox | FoundBox]]) -> COCO:
        coco = COCO()
        placed = [(where, box) for where in boxes for box in boxes[where]]
        coco.dataset = {
            "images": images,
            "categories": categories,
            "annotations": [
                {
                    "id": number,  # from 1: COCOeval takes a match with id 0, which Roboflow's files begin at, for none
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": list(box.xywh),
                    "area": box.xywh[2] * box.xywh[3],
                    "iscrowd": int(getattr(box, "crowd", False)),
                    "score": getattr(box, "score", 0.0),
                }
                for number, ((image_id, category_id), box) in enumerate(placed, 1)
            ],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(indexed(true), indexed(found), "bbox")
        # Boxes of every size, at most 100 an image and category: of what COCO's table asks for, the part that is used.
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (10 thresholds, 101 recalls, categories, 1, 1), 0-1; -1 without truth
    with_truth = precision[:, :, (precision > -1).all(axis=(0, 1, 3, 4))]
    if not with_truth.size:
        return None
    return tuple(100 * float(part.mean()) for part in (with_truth, with_truth[0], with_truth[5]))


def _xywh(box: object, image: CocoImage) -> Box:
    if not isinstance(box, list) or len(box) != 4 or not is_numbers(box):
        raise Refused("bad_box", f"bbox is {box!r:.80}; [x, y, width, height] in pixels is needed.")
    x, y, width, height = map(float, box)
    if width <= 0 or height <= 0:
        raise Refused("box_empty", f"bbox {box} has no area; width and height must be above 0.")
    if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
        raise Refused("box_outside", f"bbox {box} lies outside the image of {image.width:g} x {image.height:g} pixels.")
    return x, y, width, height


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

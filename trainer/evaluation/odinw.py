"""ODinW-13: object detection in 13 small domains, scored by COCO's average precision through pycocotools.

A task is one of the 13 sets. They are those of GLIP (microsoft/GLIP, configs/odinw_13 and odinw/README.md), laid out as
its odinw/download.py unpacks them, images beside their annotations. Each set's annotation file (of the validation
part) and category names are those of mmdetection's configs/odinw/grounding_dino_swin-t_pretrain_odinw13.py, by which
Qwen's authors evaluate (QwenLM/Qwen3-VL, issue 839). GLIP's own configurations use mini_val for EgoHands and
VehiclesOpenImages.

As in their evaluation, a question names one category, in the wording of that issue; the requested answer format is
this project's, in the plural. The parser also accepts Qwen2-VL's box marks and Qwen2.5-VL's list of {"bbox_2d": [...],
"label": ...}, always as 0-1000 of the image: it misreads a model that writes pixels, as Qwen2.5-VL does. Labels are
ignored, because the question names the category.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boxgrpo.trainer.data.example import Example, Fault, Refused, require_some

from .answer_text import listed_boxes
from .coco import average_precision, read_coco
from .questions import FACTS, answer_row, user_turn

# Annotation file by set. FACTS has the folder of its validation part and, of several files there, the name's prefix.
SETS = {name: f"{name}/{part}annotations_without_background.json" for name, part in FACTS["odinw"].items()}

QUESTION = (
    "Locate every {category} in the image. First output the thinking process in <think> </think> tags"
    " and then output the bounding boxes in <answer> </answer> tags."
)


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """One image and one category."""

    category: str
    category_id: int  # within the set, as image_id
    image_id: int
    size: tuple[float, float]  # width and height of the image in pixels
    truth: tuple[dict, ...]  # the category's annotations in the image; empty where the image has none


def read(path: str | os.PathLike, image_root: str | os.PathLike | None) -> tuple[list[Question], list[Fault]]:
    """Read the folder of the 13 sets, or one COCO annotation file as a set of its own.

    There is a question for every image and every category of its set, whether the image has that category or not.

    Args:
        path: the folder that holds AerialMaritimeDrone and the others, or a file.
        image_root: a folder with the images in the same layout; for a file, the folder of its images.

    Returns:
        The questions, and one `Fault` for each set, category, image or annotation that was left out.

    Raises:
        ValueError: no question can be made, or pycocotools is missing.
    """
    path = Path(path)
    if path.is_dir():
        files = {name: (path / file, os.path.dirname(file)) for name, file in SETS.items()}
    else:
        whole = Path(os.path.abspath(path))
        name = next((name for name, file in SETS.items() if whole.match(file)), path.stem)
        files = {name: (path, "")}
    questions, faults = [], []
    for name, (file, folder) in files.items():
        try:
            coco, found = read_coco(file, name, image_root, folder)
        except Refused as refused:
            faults.append(refused.fault(name))
            continue
        faults += found
        questions += [_question(name, coco, image, kind) for image in coco.imgs.values() for kind in coco.cats.values()]
    require_some(path, questions, faults, remedy="Pass the folder that GLIP's odinw/download.py fills.")
    return questions, faults


def _question(name: str, coco, image: dict, category: dict) -> Question:
    return Question(
        **user_turn(QUESTION.format(category=category["name"])),
        id=f"{image['id']}-{category['id']}",
        task=name,
        images=(image["file_name"],),
        source=f"{name}#{image['id']}/{category['id']}",
        category=category["name"],
        category_id=category["id"],
        image_id=image["id"],
        size=(image["width"], image["height"]),
        truth=tuple(box for box in coco.imgToAnns[image["id"]] if box["category_id"] == category["id"]),
    )


def grade(questions: Sequence[Question], texts: Sequence[str]) -> list[dict]:
    """A dictionary each: source, id, task, category, question, answer (the text), boxes, scores, gold.

    `boxes` and `gold` are lists of [x1, y1, x2, y2] in 0-1000. A box without a score of the model's own gets
    1 / (1 + the number of boxes before it in the answer): the first box has the highest score.
    """
    answers = []
    for q, text in zip(questions, texts, strict=True):
        listed = listed_boxes(text)
        scores = [1 / (1 + i) if score is None else score for i, (_, score) in enumerate(listed)]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (box["bbox"] for box in q.truth)]
        gold = [[1000 * v / side for v, side in zip(box, q.size * 2)] for box in corners]
        boxes = [list(box) for box, _ in listed]
        answers.append(answer_row(q, text, category=q.category, boxes=boxes, scores=scores, gold=gold))
    return answers


def score(questions: Sequence[Question], answers: Sequence[dict]) -> dict:
    """COCO's AP (IoU 0.50 to 0.95) in percent: of each set over its categories, and their `mean` over the sets.

    `mean_equal_scores` is the same with a score of 1 for every box, which is what Qwen's authors (QwenLM/Qwen3-VL,
    issue 1041) and lmms-eval do. `sets` adds AP at IoU 0.5 and 0.75 and counts. A category without a true box does not
    enter its set's AP, and a set without one is None and not in the mean; `missing` names those of the 13 that are
    not in the data. `unread` of `count` answers list no box.

    Args:
        answers: of `grade`.

    Raises:
        ValueError: no true box at all.
    """
    by_set = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        by_set[question.task].append((question, answer))
    sets = {name: _set_scores(answered) for name, answered in sorted(by_set.items())}
    scored = [s for s in sets.values() if s["ap"] is not None]
    if not scored:
        raise ValueError(f"{len(answers)} questions have 0 true boxes; AP needs at least 1. Check --data and --limit.")
    return {
        "mean": sum(s["ap"] for s in scored) / len(scored),
        "mean_equal_scores": sum(s["ap_equal_scores"] for s in scored) / len(scored),
        "tasks": {name: s["ap"] for name, s in sets.items()},
        "sets": sets,
        "missing": [name for name in SETS if name not in sets],
        "count": len(answers),
        "unread": sum(not answer["boxes"] for answer in answers),
    }


def _set_scores(answered: Sequence[tuple[Question, dict]]) -> dict:
    pairs = [(q.image_id, q.category_id) for q, _ in answered]
    true = [box for q, _ in answered for box in q.truth]
    found = [detection for q, answer in answered for detection in _detections(q, answer)]
    ap, ap50, ap75 = average_precision(pairs, true, found)
    equal_ap, *_ = average_precision(pairs, true, [detection | {"score": 1.0} for detection in found])
    return {
        "ap": ap,
        "ap50": ap50,
        "ap75": ap75,
        "ap_equal_scores": equal_ap,
        "images": len({image_id for image_id, _ in pairs}),
        "true_boxes": len(true),
        "boxes": len(found),
    }


def _detections(question: Question, answer: dict) -> list[dict]:
    """The answer's boxes in pixels. An inverted box has no area: it matches no true box and counts as wrong."""
    found, (width, height) = [], question.size
    for (x1, y1, x2, y2), score in zip(answer["boxes"], answer["scores"], strict=True):
        w, h = max(0.0, x2 - x1) * width / 1000, max(0.0, y2 - y1) * height / 1000
        box = {"bbox": [x1 * width / 1000, y1 * height / 1000, w, h], "area": w * h, "iscrowd": 0, "score": score}
        found.append({"image_id": question.image_id, "category_id": question.category_id, **box})
    return found

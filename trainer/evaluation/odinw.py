"""ODinW-13: object detection in 13 small domains, scored by COCO's average precision through pycocotools.

`read`, `question.prompt`, `grade` and `score` as in mmiu.py; a task is one of the 13 sets.

The sets are those of GLIP (microsoft/GLIP, configs/odinw_13 and odinw/README.md), laid out as its odinw/download.py
unpacks them, images beside their annotations. The file of each, its validation part, and the categories' names are
those of mmdetection's configs/odinw/grounding_dino_swin-t_pretrain_odinw13.py, the repository whose configuration
Qwen's authors evaluate by (QwenLM/Qwen3-VL, issue 839). GLIP's own configurations take mini_val for EgoHands and
VehiclesOpenImages.

What is asked is those authors', too: one category at a time, in the words they give there. Boxes are asked for in one
of three forms: "think" is this project's, in the plural; "box" is Qwen2-VL's box marks, as UniVG-R1's code asks
Qwen2-VL for them (eval/MIG_bench); "json" is Qwen2.5-VL's list of {"bbox_2d": [...], "label": ...}. UniVG-R1's own code
knows no answer of several boxes. An answer is read alike in all three, always as 0-1000 of the image: a model that
answers in pixels, as Qwen2.5-VL does, is not understood. Labels are not read, for the question names the category.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from boxgrpo.trainer.data.example import Box, Example, Fault, Refused, require_some

from .answer_text import listed_boxes
from .coco import CocoFile, FoundBox, TrueBox, average_precision, read_coco

PUBLISHED = {"UniVG-R1": 33.3}  # AP in percent; how it was asked and scored is not published with it

SETS = {  # name to annotation file
    "AerialMaritimeDrone": "AerialMaritimeDrone/large/valid/annotations_without_background.json",
    "Aquarium": "Aquarium/Aquarium Combined.v2-raw-1024.coco/valid/annotations_without_background.json",
    "CottontailRabbits": "CottontailRabbits/valid/annotations_without_background.json",
    "EgoHands": "EgoHands/generic/valid/annotations_without_background.json",
    "NorthAmericaMushrooms": "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco/valid/"
    "annotations_without_background.json",
    "Packages": "Packages/Raw/valid/annotations_without_background.json",
    "PascalVOC": "PascalVOC/valid/annotations_without_background.json",
    "Raccoon": "Raccoon/Raccoon.v2-raw.coco/valid/annotations_without_background.json",
    "ShellfishOpenImages": "ShellfishOpenImages/raw/valid/annotations_without_background.json",
    "VehiclesOpenImages": "VehiclesOpenImages/416x416/valid/annotations_without_background.json",
    "pistols": "pistols/export/val_annotations_without_background.json",
    "pothole": "pothole/valid/annotations_without_background.json",
    "thermalDogsAndPeople": "thermalDogsAndPeople/valid/annotations_without_background.json",
}

ANSWER_FORMATS = {
    "think": "Locate every {category} in the image. First output the thinking process in <think> </think> tags"
    " and then output the bounding boxes in <answer> </answer> tags.",
    "box": "Locate every {category} in the image. Format: <|box_start|>(x1,y1),(x2,y2)<|box_end|>.",
    "json": "Locate every {category} in the image and output the coordinates in JSON format.",
}


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """One image and one category. Its `turns` hold the user's turn alone, so that a prompt adds nothing to the text."""

    category: str
    category_id: int  # within the set, as image_id
    image_id: int
    size: tuple[float, float]  # width and height of the image in pixels
    truth: tuple[TrueBox, ...]  # the category's boxes in the image; empty where it is asked for in vain

    @property
    def prompt(self) -> str:
        return self.question


def read(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    *,
    answer_format: str = "think",
    present_only: bool = False,
) -> tuple[list[Question], list[Fault]]:
    """Read the folder of the 13 sets, or one COCO annotation file as a set of its own. No image is opened.

    Args:
        path: the folder that holds AerialMaritimeDrone and the others, or a file.
        image_root: a folder with the images in the same layout, which their paths must not leave; for a file, the
            folder of its images. None: images lie beside the annotations, and any path is allowed.
        answer_format: what is asked for: "think", "box" or "json".
        present_only: ask for the categories only that an image has. Easier, for no box can be found where none is;
            the default asks every image for every category of its set.

    Returns:
        The questions, and one `Fault` for each set, category, image or annotation that was passed over.

    Raises:
        ValueError: unknown answer format, or not one question.
    """
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format is {answer_format!r}; ODinW is asked in {', '.join(ANSWER_FORMATS)}.")
    path = Path(path)
    if path.is_dir():
        files = {name: (path / file, os.path.dirname(file)) for name, file in SETS.items()}
    else:
        files = {_name_of(path): (path, "")}
    questions: list[Question] = []
    faults: list[Fault] = []
    for name, (file, folder) in files.items():
        try:
            coco, found = read_coco(file, name, image_root, folder)
        except Refused as refused:
            faults.append(refused.fault(name))
            continue
        faults += found
        questions += _questions(name, coco, answer_format, present_only)
    require_some(path, questions, faults, remedy="Pass the folder that GLIP's odinw/download.py fills.")
    return questions, faults


def _name_of(path: Path) -> str:
    """Which of the 13 a file belongs to, by where it lies; else its own name."""
    whole = Path(os.path.abspath(path)).as_posix()
    return next((name for name, file in SETS.items() if whole.endswith(f"/{file}")), path.stem)


def _questions(name: str, coco: CocoFile, answer_format: str, present_only: bool) -> list[Question]:
    questions = []
    for image_id, image in coco.images.items():
        for category_id, category in coco.categories.items():
            truth = coco.boxes.get((image_id, category_id), ())
            if present_only and not truth:
                continue
            text = ANSWER_FORMATS[answer_format].format(category=category)
            questions.append(
                Question(
                    id=f"{image_id}-{category_id}",
                    task=name,
                    images=(image.path,),
                    question=text,
                    gold=None,
                    turns=(("user", text),),
                    answer_format="think" if answer_format == "think" else "box",
                    source=f"{name}#{image_id}/{category_id}",
                    category=category,
                    category_id=category_id,
                    image_id=image_id,
                    size=(image.width, image.height),
                    truth=truth,
                )
            )
    return questions


def grade(questions: Sequence[Question], texts: Sequence[str]) -> list[dict]:
    """A dictionary each: source, id, task, category, question, answer (the text), boxes, scores, gold.

    `boxes` and `gold` are lists of [x1, y1, x2, y2] in 0-1000. A box without a score of the model's own gets
    1 / (1 + the number of boxes before it in the answer): what is named first is held to be surest.

    Raises:
        ValueError: not one text a question.
    """
    if len(texts) != len(questions):
        raise ValueError(f"{len(texts)} answers for {len(questions)} questions; there must be one each, in order.")
    graded = []
    for q, text in zip(questions, texts):
        listed = listed_boxes(text)
        graded.append(
            {
                "source": q.source,
                "id": q.id,
                "task": q.task,
                "category": q.category,
                "question": q.question,
                "answer": text,
                "boxes": [list(box) for box, _ in listed],
                "scores": [1 / (1 + i) if sure is None else sure for i, (_, sure) in enumerate(listed)],
                "gold": [_in_thousandths(truth.xywh, q.size) for truth in q.truth],
            }
        )
    return graded


def score(questions: Sequence[Question], texts: Sequence[str]) -> dict:
    """COCO's AP (IoU 0.50 to 0.95) in percent: of each set over its categories, and their `mean` over the sets.

    `mean_equal_scores` is the same with a score of 1 for every box, which is what Qwen's authors (QwenLM/Qwen3-VL,
    issue 1041) and lmms-eval do. `sets` adds AP at IoU 0.5 and 0.75 and counts. A category without a true box does not
    enter its set's AP, and a set without one is None and not in the mean; `missing` names those of the 13 that were
    not asked. `unread` of `count` answers list no box.

    Raises:
        ValueError: not one text a question, no true box at all, or pycocotools is missing.
    """
    graded = grade(questions, texts)
    by_set = defaultdict(list)
    for question, answer in zip(questions, graded):
        by_set[question.task].append((question, answer))
    sets = {}
    for name, asked in sorted(by_set.items()):
        true = {(q.image_id, q.category_id): q.truth for q, _ in asked}
        found = {(q.image_id, q.category_id): _found(q, answer) for q, answer in asked}
        equal = {where: [FoundBox(box.xywh, 1.0) for box in boxes] for where, boxes in found.items()}
        ap, ap50, ap75 = average_precision(true, found) or (None, None, None)
        # With one box an answer, as models for one box give, the scores are equal as they are.
        equal_ap = ap if equal == found else (average_precision(true, equal) or (None,))[0]
        sets[name] = {
            "ap": ap,
            "ap50": ap50,
            "ap75": ap75,
            "ap_equal_scores": equal_ap,
            "images": len({image_id for image_id, _ in true}),
            "true_boxes": sum(map(len, true.values())),
            "boxes": sum(map(len, found.values())),
        }
    scored = [s for s in sets.values() if s["ap"] is not None]
    if not scored:
        raise ValueError(f"{len(graded)} questions have 0 true boxes; AP needs at least 1. Check --data and --limit.")
    return {
        "mean": sum(s["ap"] for s in scored) / len(scored),
        "mean_equal_scores": sum(s["ap_equal_scores"] for s in scored) / len(scored),
        "tasks": {name: s["ap"] for name, s in sets.items()},
        "sets": sets,
        "missing": [name for name in SETS if name not in sets],
        "count": len(graded),
        "unread": sum(not answer["boxes"] for answer in graded),
    }


def _found(question: Question, answer: dict) -> list[FoundBox]:
    """The answer's boxes in pixels. An inverted one has no area: it finds nothing, and counts as one that is wrong."""
    width, height = question.size
    return [
        FoundBox((x1 * width / 1000, y1 * height / 1000, _side(x1, x2, width), _side(y1, y2, height)), sure)
        for (x1, y1, x2, y2), sure in zip(answer["boxes"], answer["scores"])
    ]


def _side(start: float, end: float, pixels: float) -> float:
    return max(0.0, end - start) * pixels / 1000


def _in_thousandths(xywh: Box, size: tuple[float, float]) -> list[float]:
    x, y, w, h = xywh
    width, height = size
    return [1000 * x / width, 1000 * y / height, 1000 * (x + w) / width, 1000 * (y + h) / height]

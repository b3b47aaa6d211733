"""The record formats of all data sets (DESIGN section 7): how to tell one, and how to read it into an `Example`.

Where a format was read: UniVG-R1's own loaders (AMAP-ML/UniVG-R1: grpo_univg.py, eval/zero_shot/*/eval.py), which also
give the questions that the zero-shot sets are asked with; VLM-R1's files for RefCOCO; MGrounding-630k's records.
"""

import functools
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from boxgrpo.kernels import grounding_rewards, pack_texts

from .example import Box, Example, Place, Refused, checked_box, is_numbers, pixel_box, resolve_images, text_of

FRAMES, ASKED_FRAME = 6, 2  # of a video; the box is asked for in the third
ON_IMAGE = "Output the bounding box in the image corresponding to the instruction: {}."
ON_VIDEO = (
    "This is a sequence of images from a video. Please understand the entire video content, and then output the "
    "bounding box in the third image according to the instruction: {}."
)
DESCRIBED = "Please provide the bounding box coordinate of the region this sentence describes: {}."
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKED = re.compile(r"\((\d{1,9}),\s*(\d{1,9})\),\s*\((\d{1,9}),\s*(\d{1,9})\)")


@dataclass(frozen=True)
class Schema:
    """How to tell a record format and how to read it. `parse(record, place)` gives the `Example` fields it knows."""

    sign: str
    recognise: Callable[[dict], bool]
    parse: Callable[[dict, Place], dict]


def parse(record: dict, schema: str, place: Place, *, name: str, source: str, scanned: bool = False) -> Example:
    """The record as an example; `name` is its id where it has none.

    `scanned`: only looked at for what it has, so its target image is not worked out of the question's wording.

    Raises:
        Refused: it breaks a rule.
    """
    answer_format = record.get("answer_format", "think")
    if answer_format not in ("think", "box"):
        raise Refused("bad_answer_format", f'answer_format is {answer_format!r}; it must be "think" or "box".')
    task = record.get("task") or record.get("type") or "grounding"
    if not isinstance(task, str):
        raise Refused("bad_task", f"task is {task!r:.80}; it must be a name.")
    fields = {"id": str(record.get("id", name)), "task": task, "answer_format": answer_format}
    fields |= SCHEMAS[schema].parse(record, place)
    if "target_image" not in fields and (not scanned or "target_image" in record):
        fields["target_image"] = target_image(record, fields["question"], len(fields["images"]))
    return Example(source=source, **fields)


def recognise(record: dict) -> str | None:
    """The first schema that the record fits."""
    return next((name for name, schema in SCHEMAS.items() if schema.recognise(record)), None)


def box_scale(records: Sequence[dict]) -> float:
    """What brings a file's boxes to 0-1000: 1000 for a file of fractions, of which half the boxes end at 2 or less.

    Decided for a file, because one bad record may say 1.048.
    """
    ends = [max(record["answer"]) for record in records if is_numbers(record.get("answer"))]
    return 1000.0 if ends and statistics.median(ends) <= 2 else 1.0


def _parse_question(record: dict, place: Place) -> dict:
    gold = checked_box(record.get("answer"), (place.scale, place.scale))
    return {
        "images": resolve_images(record.get("images"), place),
        "question": text_of(record.get("question"), "question"),
        "gold": gold,
    }


def _parse_stage2(record: dict, place: Place) -> dict:
    fields = _parse_question(record, place)
    # The paper's code tells its single-image RefCOCO records, asked without thinking, by this path.
    if "answer_format" not in record and "coco/train2014/COCO" in record["images"][0]:
        fields["answer_format"] = "box"
    return fields


def _turns(record: dict) -> tuple[tuple[str, str], ...]:
    chat = record.get("messages", record.get("conversations"))
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise Refused("no_turns", f"messages is {chat!r:.80}; a list of turns is needed.")
    turns = []
    for index, turn in enumerate(chat):
        role = turn.get("role", turn.get("from"))
        expected = ("user", "assistant")[index % 2]
        if _ROLES.get(str(role)) != expected:
            raise Refused(
                "turn_order", f"turn {index} is from {role!r}; user and assistant must alternate, user first."
            )
        text = turn.get("content", turn.get("value"))
        turns.append((expected, text_of(text, "answer" if index % 2 else "question")))
    if len(turns) % 2:
        raise Refused("no_answer", f"the last of {len(turns)} turns is the user's; a chat must end with an answer.")
    return tuple(turns)


def _parse_chat(record: dict, place: Place) -> dict:
    """A chat with answers. The gold box is the one in the first answer's tags, if there is one."""
    turns = _turns(record)
    gold = None
    if "<answer>" in turns[1][1]:  # the reader below is a kernel: it is not asked for nothing
        read = grounding_rewards(*pack_texts([turns[1][1].encode()]), torch.zeros(1, 4))
        gold = checked_box(read.boxes[0].tolist()) if read.found else None
    return {
        "images": resolve_images(record.get("images"), place),
        "question": turns[0][1],
        "turns": turns,
        "gold": gold,
    }


def _parse_mgrounding(record: dict, place: Place) -> dict:
    """A chat of MGrounding-630k: several turns, boxes between marks. The gold box is the first answer's only one."""
    turns = _turns(record)
    boxes = [[_marked_box(found) for found in _MARKED.findall(text)] for _, text in turns[1::2]]
    gold = boxes[0][0] if len(boxes[0]) == 1 else None
    return {
        "images": resolve_images(record.get("images"), place),
        "question": turns[0][1],
        "turns": turns,
        "gold": gold,
    }


def _marked_box(found: tuple[str, ...]) -> Box:
    x1, y1, x2, y2 = box = [int(value) for value in found]
    if 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000:
        return float(x1), float(y1), float(x2), float(y2)
    return checked_box(box, what="box")


def _parse_refcoco(record: dict, place: Place) -> dict:
    """RefCOCO/+/g: `problem` and `solution`, or `expression` and `bbox` (x, y, width, height); boxes in pixels."""
    image = place.path(record.get("image"))
    if "expression" in record:
        box, what = record.get("bbox"), "bbox"
        if is_numbers(box) and len(box) == 4:
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        question = DESCRIBED.format(text_of(record["expression"], "expression").strip().rstrip("."))
    else:
        box, what = record.get("solution"), "solution"
        question = text_of(record.get("problem"), "problem")
    fields = {"images": (image,), "question": question, "gold": pixel_box(box, image, place, what, record)}
    return fields | ({} if "answer_format" in record else {"answer_format": "box"})


def _parse_lisa(record: dict, place: Place) -> dict:
    image, boxes = place.path(record.get("image_path")), record.get("boxes")
    box = boxes[0] if isinstance(boxes, list) and boxes else boxes
    question = ON_IMAGE.format(_instruction(record, "instruction"))
    return {"images": (image,), "question": question, "gold": pixel_box(box, image, place, "boxes[0]", record)}


def _parse_llmseg(record: dict, place: Place) -> dict:
    image, box = place.path(record.get("image_path")), record.get("bbox")
    if isinstance(box, list) and all(isinstance(part, list) for part in box):
        box = [value for part in box for value in part][:4]
    question = ON_IMAGE.format(_instruction(record, "question"))
    return {"images": (image,), "question": question, "gold": pixel_box(box, image, place, "bbox", record)}


def _instruction(record: dict, name: str) -> str:
    return text_of(record.get(name), name).strip().rstrip(".")


def _parse_reasonvos(record: dict, place: Place) -> dict:
    frames = record.get("image_list")
    if not isinstance(frames, list) or len(frames) <= ASKED_FRAME:
        raise Refused("too_few_frames", f"image_list is {frames!r:.80}; the third frame is asked for.")
    return _video(record, place, frames)


def _parse_revos(record: dict, place: Place) -> dict:
    """`frames` are numbers among the sorted images of the folder `video_id`, or file names in it."""
    frames, video = record.get("frames"), record.get("video_id")
    if not isinstance(frames, list) or len(frames) <= ASKED_FRAME:
        raise Refused("too_few_frames", f"frames is {frames!r:.80}; the third frame is asked for.")
    folder = place.path(str(video))
    if all(isinstance(frame, str) for frame in frames):
        return _video(record, place, [os.path.join(folder, frame) for frame in frames])
    if not is_numbers(frames) or any(frame != int(frame) or frame < 0 for frame in frames):
        raise Refused("bad_frames", f"frames is {frames!r:.80}; it holds numbers of frames, or names.")
    there = frames_of(folder)
    if there and max(frames) >= len(there):
        raise Refused("bad_frames", f"frames asks for {max(frames)}; {folder} has {len(there)} images. Correct it.")
    names = [there[int(frame)] if there else f"{int(frame):05d}.jpg" for frame in frames]
    return _video(record, place, [os.path.join(folder, name) for name in names])


@functools.lru_cache(maxsize=512)
def frames_of(folder: str) -> tuple[str, ...]:
    """Names of the folder's images by their first number; empty where there is no folder."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    except OSError:
        return ()
    return tuple(sorted(names, key=lambda name: (int((re.findall(r"\d+", name) or ["0"])[0]), name)))


def _video(record: dict, place: Place, frames: list) -> dict:
    """Six of the frames, uniformly; the box of the third of them, in its pixels."""
    boxes = record.get("bbox_list")
    # Of six frames or fewer all are shown, and one box is asked for, whatever the others are.
    least = ASKED_FRAME + 1 if len(frames) <= FRAMES else len(frames)
    if not isinstance(boxes, list) or not least <= len(boxes) <= len(frames):
        raise Refused("box_list", f"bbox_list is {boxes!r:.80}; it holds a box for each of {len(frames)} frames.")
    count = min(len(frames), FRAMES)
    chosen = [round(i * (len(frames) - 1) / (count - 1)) for i in range(count)]
    images = tuple(place.path(frames[i]) for i in chosen)
    box = boxes[chosen[ASKED_FRAME]]
    if isinstance(box, str):
        box = [float(value) for value in re.findall(r"-?\d+(?:\.\d+)?", box)]
    question = ON_VIDEO.format(_instruction(record, "question"))
    gold = pixel_box(box, images[ASKED_FRAME], place, f"bbox_list[{chosen[ASKED_FRAME]}]")
    return {"images": images, "question": question, "gold": gold, "target_image": ASKED_FRAME}


def _has_marks(record: dict) -> bool:
    chat = record.get("conversations", record.get("messages"))
    return isinstance(chat, list) and "<|box_start|>" in str(chat)


# A new format is one more entry; the first that recognises a record wins.
SCHEMAS: dict[str, Schema] = {
    "mgrounding": Schema("conversations with <|box_start|>", _has_marks, _parse_mgrounding),
    "univg_stage1": Schema("messages or conversations", lambda r: "messages" in r or "conversations" in r, _parse_chat),
    "mig_bench": Schema(
        "question, answer and additional_info or need_format",
        lambda r: {"question", "answer"} <= r.keys() and ("additional_info" in r or "need_format" in r),
        _parse_question,
    ),
    "univg_stage2": Schema(
        "images, question and answer", lambda r: {"images", "question", "answer"} <= r.keys(), _parse_stage2
    ),
    "refcoco": Schema(
        "image, and problem with solution or expression with bbox",
        lambda r: "image" in r and ({"problem", "solution"} <= r.keys() or {"expression", "bbox"} <= r.keys()),
        _parse_refcoco,
    ),
    "lisa": Schema(
        "image_path, instruction and boxes", lambda r: {"image_path", "instruction", "boxes"} <= r.keys(), _parse_lisa
    ),
    "llmseg": Schema(
        "image_path, question and bbox", lambda r: {"image_path", "question", "bbox"} <= r.keys(), _parse_llmseg
    ),
    "reasonvos": Schema(
        "image_list, question and bbox_list",
        lambda r: {"image_list", "question", "bbox_list"} <= r.keys(),
        _parse_reasonvos,
    ),
    "revos": Schema(
        "video_id, frames, question and bbox_list",
        lambda r: {"video_id", "frames", "question", "bbox_list"} <= r.keys(),
        _parse_revos,
    ),
}

_ORDINALS = {"source": 0, "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "seventh": 6}
_MENTION = rf"(?:image[- ]?(\d{{1,4}})|(\d{{1,4}})(?:st|nd|rd|th) image|({'|'.join(_ORDINALS)}) image)"
_STATED = re.compile(rf"\bit is in the {_MENTION}", re.IGNORECASE)
_SOUGHT = re.compile(
    rf"\b(?:locat|ground|find|identif|recogni|which|what|where)[^.?!]*?\b(?:in|on|of) (?:the )?{_MENTION}",
    re.IGNORECASE,
)
_MENTIONED = re.compile(_MENTION, re.IGNORECASE)


def target_image(record: dict, question: str, images: int) -> int:
    """Index of the image that the box lies in: the record's own word, else the wording's, else the last image.

    A box is relative to its image, so only pictures need it, and answers in pixels (`grade_texts`). The wording is read
    for what it most likely means: the last image in which something is to be found, else the last one mentioned.
    """
    if "target_image" in record:
        target = record["target_image"]
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < images:
            raise Refused("bad_target_image", f"target_image is {target!r}; it must be 0 to {images - 1}.")
        return target
    question = question[:2000]  # the patterns take quadratic time, and questions are anybody's
    stated = _STATED.findall(str(record.get("additional_info", "")))
    mentions = stated or _MENTIONED.findall(question)
    if not mentions:
        return images - 1
    mentions = stated or _SOUGHT.findall(question) or mentions  # the slow pattern last: a file has 630,000 questions
    number, nth, word = mentions[-1]
    index = _ORDINALS[word.lower()] if word else int(number or nth) - 1
    return min(max(index, 0), images - 1)

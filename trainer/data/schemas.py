"""The record formats of all data sets (ARCHITECTURE.md, section "Data"): how to recognise and how to read each.

The formats follow UniVG-R1's own loaders (AMAP-ML/UniVG-R1: grpo_univg.py, eval/zero_shot/*/eval.py), which also give
the questions of the zero-shot sets; VLM-R1's files for RefCOCO; MGrounding-630k's records.
"""

import os
import re
from collections.abc import Callable, Sequence, Set
from functools import lru_cache, partial
from typing import NamedTuple

from .boxes import gold_box, only_box, tells_size
from .chats import CHAT, only_marked_box, read_chat, tagged_box
from .example import Refused, Source, check_text, is_numbers, target_image
from .images import IMAGE_KEYS, Embedded, listed_images, resolve_images

FRAMES, TARGET_FRAME = 6, 2  # frames used of a video, and the index of the one with the box
ON_IMAGE = "Output the bounding box in the image corresponding to the instruction: {}."
ON_VIDEO = (
    "This is a sequence of images from a video. Please understand the entire video content, and then output the "
    "bounding box in the third image according to the instruction: {}."
)
DESCRIBED = "Please provide the bounding box coordinate of the region this sentence describes: {}."


class Schema(NamedTuple):
    """How to recognise a record format and how to read it."""

    keys: Sequence[str]  # alternatives: the keys that a record must have; `image` and `images` are one
    read: Callable[[dict, Source], dict]  # returns fields of the `Example`
    mark: str = ""  # must occur in the values of these keys
    unit: str = "thousandths"  # of its published gold boxes

    def fits(self, record: dict) -> bool:
        have = _keys(record)
        for names in self.keys:
            if have >= set(keys := names.split()):
                return not self.mark or self.mark in str([record.get(key) for key in keys])
        return False

    def __str__(self) -> str:
        """The keys and the mark that its records have, for the log."""
        wanted = [names.split() for names in self.keys]
        words = [f"{', '.join(first)} and {last}" if first else last for *first, last in wanted]
        return f"{self.mark} in " * bool(self.mark) + " or ".join(words)


def _keys(record: dict) -> Set[str]:
    """The record's keys, with both of `image` and `images` if it has one."""
    return record.keys() if record.keys().isdisjoint(IMAGE_KEYS) else {*record, *IMAGE_KEYS}


def recognise(record: dict) -> str | None:
    """The first schema that the record fits."""
    return next((name for name, schema in SCHEMAS.items() if schema.fits(record)), None)


def nearest(record: dict) -> str:
    """The schema of whose keys the record has most."""
    have = _keys(record)
    known = {name: max(len(have & {*keys.split()}) for keys in schema.keys) for name, schema in SCHEMAS.items()}
    return max(known, key=known.get) if any(known.values()) else "univg_stage2"


def _read_question(record: dict, file: Source, box_only: str | None = None) -> dict:
    """Read a question and its box; the format is "box" if the first image's path contains `box_only`."""
    images = resolve_images(listed_images(record), file)
    question = check_text(record.get("question"), "question")
    # The image matters only for its size, and finding it costs time.
    sized = file.unit in ("auto", "pixels") or tells_size(record)
    target = target_image(record, question, len(images)) if sized else 0
    gold = gold_box(record.get("answer"), images[target], file, "answer", record)
    fields = {"images": images, "question": question, "gold": gold}
    return fields | {"answer_format": "box"} if box_only and box_only in str(images[0]) else fields


def _only_image(value: object, file: Source, name: str = "image_path") -> str | Embedded:
    image, *more = resolve_images(value, file, name=name)
    if more:
        rule = "this form has one. Use `images`, `question` and `answer` for several"
        raise Refused("several_images", f"{name} is {value!r:.80}; {rule}.")
    return image


def _read_refcoco(record: dict, file: Source) -> dict:
    """RefCOCO/+/g: `problem` and `solution`, or `expression` and `bbox` (x, y, width, height); boxes in pixels."""
    image = _only_image(listed_images(record), file, "image")
    if "expression" in record:
        box, what = only_box(record.get("bbox"), "bbox"), "bbox"
        if is_numbers(box) and len(box) == 4:
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        question = DESCRIBED.format(check_text(record["expression"], "expression").strip().rstrip("."))
    else:
        box, what = record.get("solution"), "solution"
        question = check_text(record.get("problem"), "problem")
    gold = gold_box(box, image, file, what, record)
    return {"images": (image,), "question": question, "gold": gold, "answer_format": "box"}


def _read_lisa(record: dict, file: Source) -> dict:
    image, boxes = _only_image(record.get("image_path"), file), record.get("boxes")
    nested = isinstance(boxes, list) and isinstance(next(iter(boxes), None), list)
    box = boxes[0] if nested else boxes
    file.counts["several"] += nested and len(boxes) > 1
    question = ON_IMAGE.format(_instruction(record, "instruction"))
    return {"images": (image,), "question": question, "gold": gold_box(box, image, file, "boxes[0]", record)}


def _read_llmseg(record: dict, file: Source) -> dict:
    image, box = _only_image(record.get("image_path"), file), record.get("bbox")
    if isinstance(box, list) and all(isinstance(part, list) for part in box):
        box = [value for part in box for value in part]  # a box, boxes, or two corners
        file.counts["several"] += len(box) > 4
        box = box[:4]
    question = ON_IMAGE.format(_instruction(record, "question"))
    return {"images": (image,), "question": question, "gold": gold_box(box, image, file, "bbox", record)}


def _instruction(record: dict, name: str) -> str:
    return check_text(record.get(name), name).strip().rstrip(".")


def _frame_paths(frames: list, video: object, file: Source) -> list[str]:
    """Paths of ReVOS frames, given as indices into the sorted images of the folder `video` or as file names in it."""
    (folder,) = resolve_images([str(video)], file)
    if all(isinstance(frame, str) for frame in frames):
        return [os.path.join(folder, frame) for frame in frames]
    if not is_numbers(frames) or any(frame != int(frame) or frame < 0 for frame in frames):
        raise Refused("bad_frames", f"frames is {frames!r:.80}; it must hold frame numbers or file names. Correct it.")
    names = _images_of(folder)
    if names and max(frames) >= len(names):
        raise Refused("bad_frames", f"frames names {max(frames)}; {folder} has {len(names)} images. Correct it.")
    return [os.path.join(folder, names[int(frame)] if names else f"{int(frame):05d}.jpg") for frame in frames]


@lru_cache(maxsize=512)
def _images_of(folder: str) -> tuple[str, ...]:
    """Names of the folder's images, sorted by the first number in each; empty if there is no folder."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    except OSError:
        return ()
    return tuple(sorted(names, key=lambda name: (int((re.findall(r"\d+", name) or ["0"])[0]), name)))


def _read_video(record: dict, file: Source, key: str) -> dict:
    """Read six frames under `key`, uniformly spaced, and the box of the third of them, in its pixels."""
    frames, boxes = record.get(key), record.get("bbox_list")
    if not isinstance(frames, list) or len(frames) <= TARGET_FRAME:
        raise Refused("too_few_frames", f"{key} is {frames!r:.80}; at least 3 frames are needed. Add them.")
    if key == "frames":
        frames = _frame_paths(frames, record.get("video_id"), file)
    # Six frames or fewer are all used, and then only the third one's box is needed.
    least = TARGET_FRAME + 1 if len(frames) <= FRAMES else len(frames)
    if not isinstance(boxes, list) or not least <= len(boxes) <= len(frames):
        raise Refused("box_list", f"bbox_list is {boxes!r:.80}; {len(frames)} frames need a box each. Add them.")
    count = min(len(frames), FRAMES)
    chosen = [round(i * (len(frames) - 1) / (count - 1)) for i in range(count)]
    images = resolve_images([frames[i] for i in chosen], file)
    box = boxes[chosen[TARGET_FRAME]]
    if isinstance(box, str):
        box = [float(value) for value in re.findall(r"-?\d+(?:\.\d+)?", box)]
    question = ON_VIDEO.format(_instruction(record, "question"))
    gold = gold_box(box, images[TARGET_FRAME], file, f"bbox_list[{chosen[TARGET_FRAME]}]", record)
    return {"images": images, "question": question, "gold": gold, "target_image": TARGET_FRAME}


# To add a format, add an entry. A record's format is the first entry that it fits.
SCHEMAS = {
    "mgrounding": Schema(CHAT, partial(read_chat, box_in=only_marked_box), mark="<|box_start|>"),
    "ms_swift": Schema(
        ["messages objects", "conversations objects"], partial(read_chat, box_in=only_marked_box), "<bbox>"
    ),
    "univg_stage1": Schema(CHAT, partial(read_chat, box_in=tagged_box)),
    "mig_bench": Schema(["question answer additional_info", "question answer need_format"], _read_question),
    # The paper's code recognises its single-image RefCOCO records by this path.
    "univg_stage2": Schema(["images question answer"], partial(_read_question, box_only="coco/train2014/COCO")),
    "refcoco": Schema(["image problem solution", "image expression bbox"], _read_refcoco, unit="pixels"),
    "lisa": Schema(["image_path instruction boxes"], _read_lisa, unit="pixels"),
    "llmseg": Schema(["image_path question bbox"], _read_llmseg, unit="pixels"),
    "reasonvos": Schema(["image_list question bbox_list"], partial(_read_video, key="image_list"), unit="pixels"),
    "revos": Schema(["video_id frames question bbox_list"], partial(_read_video, key="frames"), unit="pixels"),
}

"""Users' record files become `Example`s; a faulty record is refused by name and never fatal (DESIGN section 7)."""

import json
import logging
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from boxgrpo.kernels import grounding_rewards, pack_texts

logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Example:
    """One question about some images, and what is known of its answer."""

    id: str
    task: str
    images: tuple[str, ...]  # paths, resolved
    question: str
    gold: Box | None  # 0-1000 on the target image; needed for GRPO and evaluation
    turns: tuple[tuple[str, str], ...] = ()  # (role, text), user and assistant in turn; empty: no answer text
    answer_format: str = "think"  # or "box": no thinking asked for
    target_image: int = 0  # index of the image that the box lies in
    source: str = ""  # "file.json#12": record 12, counted from 0


@dataclass(frozen=True)
class Fault:
    """A record that was refused: which one, the rule it breaks, and the value that breaks it."""

    source: str
    reason: str  # a short code to count by, such as "box_inverted"
    message: str


class _Refused(Exception):
    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Schema:
    """How to tell a record format and how to read it. `parse(record, scale)` gives the `Example` fields it knows."""

    sign: str
    recognise: Callable[[dict], bool]
    parse: Callable[[dict, float], dict]


def read_examples(
    path: str | os.PathLike, *, schema: str = "auto", image_root: str | os.PathLike | None = None
) -> tuple[list[Example], list[Fault]]:
    """Read a JSON array or JSONL file of records. No image is opened.

    Args:
        path: the file.
        schema: "univg_stage1" (LLaMA-Factory chats with answers), "univg_stage2" and "mig_bench" (question and gold
            box), or "auto": the first record that fits a schema decides, and the log says why.
        image_root: folder that the records' image paths are relative to and must not leave. None: the file's own
            folder, and any path is allowed.

    Returns:
        The good examples in file order, and one `Fault` for each record refused.

    Raises:
        ValueError: unknown schema, no record that fits one, a broken JSON array, or not a single good record.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if schema not in SCHEMAS and schema != "auto":
        raise ValueError(
            f"schema is {schema!r}; known schemas are auto, {', '.join(SCHEMAS)}. Pass one of them as --schema."
        )
    records, faults = _load(path)
    if schema == "auto" and records:
        schema = _recognise(path, [record for _, record in records])
    scale = _box_scale(path, [record for _, record in records])

    examples = []
    for index, record in records:
        source = f"{path.name}#{index}"
        try:
            fields = {"id": str(record.get("id", f"{path.stem}-{index}"))}
            fields |= _common_fields(record, path, image_root) | SCHEMAS[schema].parse(record, scale)
            target = _target_image(record, fields["question"], len(fields["images"]))
            examples.append(Example(target_image=target, source=source, **fields))
        except _Refused as refused:
            faults.append(Fault(source, refused.reason, f"{source}: {refused}"))
    if not examples:
        counts = ", ".join(f"{reason} {n}" for reason, n in Counter(f.reason for f in faults).most_common())
        why = f" ({counts}). The first: {faults[0].message}" if faults else "."
        raise ValueError(
            f"{path}: 0 of {len(faults)} records can be used{why} Correct the file, or name its format with --schema."
        )
    return examples, faults


def plain_text(text: str) -> str:
    """Text without `<image>` marks: all images stand before the question (DESIGN section 3)."""
    return text.replace("<image>", "").strip()


def _load(path: Path) -> tuple[list[tuple[int, dict]], list[Fault]]:
    """Numbered records of a JSON array, or of a file with one JSON object a line; faults for what is no record."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Write the file again.") from error
    rows, faults = [], []
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}). Write the file again.") from error
    else:
        for index, line in enumerate(line for line in text.split("\n") if line.strip()):
            try:
                rows.append((index, json.loads(line)))
            except json.JSONDecodeError as error:
                source = f"{path.name}#{index}"
                faults.append(Fault(source, "not_json", f"{source}: the line is not JSON ({error}). Write it again."))
    for index, row in rows:
        if not isinstance(row, dict):
            source = f"{path.name}#{index}"
            faults.append(Fault(source, "not_a_record", f"{source}: {row!r:.80} is no JSON object. Drop it."))
    return [(index, row) for index, row in rows if isinstance(row, dict)], faults


def _recognise(path: Path, records: list[dict]) -> str:
    for index, record in enumerate(records):
        for name, schema in SCHEMAS.items():
            if schema.recognise(record):
                logger.info("%s: schema %s, because record %d has %s", path.name, name, index, schema.sign)
                return name
    known = "; ".join(f"{name} has {schema.sign}" for name, schema in SCHEMAS.items())
    raise ValueError(
        f"{path}: records with the keys {sorted(records[0])} fit no known schema ({known}). "
        "Rename the keys, or name the format with --schema."
    )


def _box_scale(path: Path, records: list[dict]) -> float:
    """What brings the file's boxes to 0-1000: 1000 for a file of fractions.

    Decided for the whole file, because one bad record may say 1.048: half of the boxes must end at 2 or less.
    """
    ends = [max(record["answer"]) for record in records if _is_numbers(record.get("answer"))]
    if not ends or statistics.median(ends) > 2:
        return 1.0
    logger.info("%s: boxes are fractions of the image (half of them end at 2 or less); times 1000", path.name)
    return 1000.0


def _common_fields(record: dict, path: Path, image_root: str | os.PathLike | None) -> dict:
    answer_format = record.get("answer_format", "think")
    if answer_format not in ("think", "box"):
        raise _Refused("bad_answer_format", f'answer_format is {answer_format!r}; it must be "think" or "box".')
    task = record.get("task") or record.get("type") or "grounding"
    return {"images": _images(record, path, image_root), "answer_format": answer_format, "task": str(task)}


def _images(record: dict, path: Path, image_root: str | os.PathLike | None) -> tuple[str, ...]:
    images = record.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) and image for image in images):
        raise _Refused("no_images", f"images is {images!r:.80}; a list of at least one path is needed.")
    root = os.path.abspath(path.parent if image_root is None else image_root)
    # Lexical on purpose: a link inside the root was put there by its owner, a ".." by whoever wrote the record.
    resolved = tuple(os.path.abspath(os.path.join(root, image)) for image in images)
    for image, full in zip(images, resolved):
        if image_root is not None and os.path.commonpath([root, full]) != root:
            raise _Refused("image_outside_root", f"image {image!r} lies outside --image_root {root}. Correct the path.")
    return resolved


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not plain_text(value):
        raise _Refused(f"no_{name}", f"{name} is {value!r:.80}; text is needed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise _Refused("bad_text", f"{name} holds half a character ({error}). Write the text again.") from error
    return value


def _is_numbers(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in values)
    )


def _box(answer: object, scale: float) -> Box:
    """The answer in 0-1000, or the rule of a gold box that it breaks."""
    if answer is None or answer == []:
        raise _Refused("no_gold_box", f"answer is {answer!r}; a gold box [x1, y1, x2, y2] is needed.")
    if not isinstance(answer, list) or len(answer) != 4:
        raise _Refused("box_length", f"answer is {answer!r:.80}; a box is a list of 4 numbers.")
    if not _is_numbers(answer):
        raise _Refused("box_not_numbers", f"answer is {answer!r:.80}; a box is made of numbers.")
    x1, y1, x2, y2 = box = tuple(round(value * scale, 3) for value in answer)
    if min(box) < 0 or max(box) > 1000:
        raise _Refused("box_outside", f"box {answer} leaves the image, 0 to {1000 / scale:g}. Correct it.")
    if x1 >= x2 or y1 >= y2:
        raise _Refused("box_inverted", f"box {answer} is inverted or empty; x1 < x2 and y1 < y2 must hold. Correct it.")
    return box


def _parse_question(record: dict, scale: float) -> dict:
    return {"question": _text(record.get("question"), "question"), "gold": _box(record.get("answer"), scale)}


def _parse_stage2(record: dict, scale: float) -> dict:
    fields = _parse_question(record, scale)
    # The paper's code tells its single-image RefCOCO records, asked without thinking, by this path.
    if "answer_format" not in record and "coco/train2014/COCO" in record["images"][0]:
        fields["answer_format"] = "box"
    return fields


def _parse_chat(record: dict, scale: float) -> dict:
    """A chat with answers. The gold box is the one in the first answer's tags, if there is one."""
    chat = record.get("messages", record.get("conversations"))
    if not isinstance(chat, list) or not chat or not all(isinstance(turn, dict) for turn in chat):
        raise _Refused("no_turns", f"messages is {chat!r:.80}; a list of turns is needed.")
    turns = []
    for index, turn in enumerate(chat):
        role = turn.get("role", turn.get("from"))
        expected = ("user", "assistant")[index % 2]
        if _ROLES.get(str(role)) != expected:
            raise _Refused(
                "turn_order", f"turn {index} is from {role!r}; user and assistant must alternate, user first."
            )
        text = turn.get("content", turn.get("value"))
        turns.append((expected, _text(text, "answer" if index % 2 else "question")))
    if len(turns) % 2:
        raise _Refused("no_answer", f"the last of {len(turns)} turns is the user's; a chat must end with an answer.")
    read = grounding_rewards(*pack_texts([turns[1][1].encode()]), torch.zeros(1, 4))
    gold = _box(read.boxes[0].tolist(), 1.0) if read.found else None
    return {"question": turns[0][1], "turns": tuple(turns), "gold": gold}


# A new format is one more entry; the first that recognises a record wins.
SCHEMAS: dict[str, Schema] = {
    "univg_stage1": Schema("messages or conversations", lambda r: "messages" in r or "conversations" in r, _parse_chat),
    "mig_bench": Schema(
        "question, answer and additional_info or need_format",
        lambda r: {"question", "answer"} <= r.keys() and ("additional_info" in r or "need_format" in r),
        _parse_question,
    ),
    "univg_stage2": Schema(
        "images, question and answer", lambda r: {"images", "question", "answer"} <= r.keys(), _parse_stage2
    ),
}

_ORDINALS = {"source": 0, "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "seventh": 6}
_MENTION = rf"(?:image[- ]?(\d+)|(\d+)(?:st|nd|rd|th) image|({'|'.join(_ORDINALS)}) image)"
_STATED = re.compile(rf"\bit is in the {_MENTION}", re.IGNORECASE)
_SOUGHT = re.compile(
    rf"\b(?:locat|ground|find|identif|recogni|which|what|where)[^.?!]*?\b(?:in|on|of) (?:the )?{_MENTION}",
    re.IGNORECASE,
)
_MENTIONED = re.compile(_MENTION, re.IGNORECASE)


def _target_image(record: dict, question: str, images: int) -> int:
    """Index of the image that the box lies in: the record's own word, else the wording's, else the last image.

    Only pictures need it (a box is relative to its image), so the wording is read for what it most likely means: the
    last image in which something is to be found, else the last one mentioned.
    """
    if "target_image" in record:
        target = record["target_image"]
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < images:
            raise _Refused("bad_target_image", f"target_image is {target!r}; it must be 0 to {images - 1}.")
        return target
    stated = _STATED.findall(str(record.get("additional_info", "")))
    mentions = stated or _SOUGHT.findall(question) or _MENTIONED.findall(question)
    if not mentions:
        return images - 1
    number, nth, word = mentions[-1]
    index = _ORDINALS[word.lower()] if word else int(number or nth) - 1
    return min(max(index, 0), images - 1)

"""`Example`, the parsed form of every record, and the checks of a record's texts, paths and boxes."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .tables import is_table

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
# As in the paper's code (ARCHITECTURE.md, section "The mathematics").
THINK_SUFFIX = (
    " First output the thinking process in <think> </think> tags"
    " and then output the bounding box in <answer> </answer> tags."
)
BOX_PREFIX = "This is a single image grounding task with simple reference. "
MARK = "<image>"  # where an image stands in a text
OTHER_MARKS = "<video>", "<audio>"
EMPTY = (None, "", [], {})
# Keys that would change what is asked, in a record of any form.
_CHANGING = frozenset(
    """
    system_prompt system_message tools functions documents chat_template chat_template_kwargs enable_thinking history
    audios audio min_pixels max_pixels mm_processor_kwargs
    """.split()
)
_FIRST_MARKS = re.compile(rf"(?:\s*{MARK})*\s*")
_ORDINALS = {"source": 0, "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5, "seventh": 6}
_MENTION = rf"(?:image[- ]?(\d{{1,4}})|(\d{{1,4}})(?:st|nd|rd|th) image|({'|'.join(_ORDINALS)}) image)"
_MENTIONED = re.compile(_MENTION, re.IGNORECASE)
_STATED = re.compile(rf"\bit is in the {_MENTION}", re.IGNORECASE)
_SOUGHT = re.compile(
    rf"\b(?:locat|ground|find|identif|recogni|which|what|where)[^.?!]*?\b(?:in|on|of) (?:the )?{_MENTION}",
    re.IGNORECASE,
)


def box_text(box: Sequence[float]) -> str:
    """A box (0-1000) in the answers' notation, rounded to whole numbers."""
    x1, y1, x2, y2 = (round(value) for value in box)
    return f"({x1}, {y1}), ({x2}, {y2})"


@dataclass(frozen=True)
class Example:
    """A question about one or several images, with its gold box, its answer text, or both.

    Each image stands where its mark `<image>` is; without marks all images stand before the first question.

    Raises:
        Refused: the marks are not as many as the images, an answer holds one, or there are marks of video or audio.
    """

    id: str
    task: str
    images: tuple  # a resolved path each, or an `Embedded` (images.py)
    question: str
    gold: Box | None  # 0-1000 on the target image; needed for GRPO and evaluation
    turns: tuple[tuple[str, str], ...] = ()  # (role, text), user and assistant alternately; empty: no answer text
    system: str | None = None  # the system's text; None: Qwen2-VL's own
    answer_format: str = "think"  # or "box": without thinking
    target_image: int = 0  # index of the image that the box lies in
    unread: bool = False  # whether there is no gold box, and the first answer holds one in a form that is not read
    source: str = ""  # "file.json#12": record 12, counted from 0

    def __post_init__(self):
        texts = [text for _, text in self.turns] or [self.question]
        if MARK in "".join(texts[1::2]):
            raise Refused("mark_in_answer", f"an answer holds {MARK}; images stand in questions. Remove the mark.")
        whole = " ".join([self.system or "", *texts])
        for mark in OTHER_MARKS:
            if mark in whole:
                raise Refused("video", f"a text holds {mark}; only images are read. Give a video's frames.")
        marks, images = whole.count(MARK), len(self.images)
        if marks not in (0, images):
            rule = "one mark for each image is needed, or none: then all images stand first"
            raise Refused("image_marks", f"marks {MARK}: {marks}, images: {images}; {rule}. Correct the record.")

    @property
    def can_be_learned(self) -> bool:
        """Whether there is a text for SFT: a chat's answers, or the box in the format "box"."""
        return bool(self.turns) or (self.gold is not None and self.answer_format == "box")


@dataclass(frozen=True)
class Fault:
    """A rejected record: its source, the rule that it breaks, and a message with the value that breaks it."""

    source: str
    reason: str  # a short code to count by, such as "box_inverted"
    message: str


class Refused(ValueError):
    """A record breaks a rule. A scan turns it into a `Fault`; later it has a `source` and an image was removed."""

    def __init__(self, reason: str, message: str, source: str = ""):
        super().__init__(message)
        self.reason, self.source = reason, source

    def fault(self, source: str) -> Fault:
        return Fault(source, self.reason, f"{source}: {self}")


@dataclass(frozen=True)
class Source:
    """A file of records, where its images are, and its boxes' unit."""

    path: Path
    label: str  # the file's name in `Example.source`
    root: str  # folder of the images, absolute
    bounded: bool  # whether image paths must stay in it
    sized: bool = True  # whether an image is opened where its size is needed (see `UNSIZED`)
    schema: str = "auto"
    unit: str = "auto"  # of its gold boxes; "auto": not decided, the boxes are left as they are written
    objects_unit: str = "auto"  # of boxes without a type in the `objects` of chats (chats.py)
    table: bool = False  # whether its records are the rows of a table (tables.py)
    counts: Counter = field(default_factory=Counter, compare=False)  # of what the log shall tell about the file

    @classmethod
    def of(cls, path: Path, image_root: str | os.PathLike | None, label: str | None = None, **more) -> "Source":
        """Images are below `image_root`, which no path may leave; None: in the file's folder or anywhere else."""
        root = os.path.abspath((path if path.is_dir() else path.parent) if image_root is None else image_root)
        return cls(path, label or path.name, root, image_root is not None, table=is_table(path), **more)


def require_some(path: Path, good: Sequence, faults: Sequence[Fault], *, min_usable: int = 1, remedy: str = "") -> None:
    """Raises `ValueError`, with the faults counted by reason, if there are fewer good records than `min_usable`."""
    if len(good) < min_usable:
        counts = ", ".join(f"{reason} {n}" for reason, n in Counter(f.reason for f in faults).most_common())
        why = f" ({counts}). The first: {faults[0].message}" if faults else "."
        raise ValueError(f"{path}: {len(good)} of {len(good) + len(faults)} records can be used{why} {remedy}".rstrip())


def plain_text(text: str) -> str:
    """Text without marks of images."""
    return text.replace(MARK, "").strip()


def asked(question: str, *, prefix: str = "", suffix: str = "") -> str:
    """The question between prefix and suffix. Images that it begins with stand first, without white space."""
    start = _FIRST_MARKS.match(question).end()
    return MARK * question.count(MARK, 0, start) + prefix + question[start:].strip() + suffix


def number_images(question: str) -> str:
    """The question without the images that it begins with. Of the later ones the third is named `(image 3)`."""
    start = _FIRST_MARKS.match(question).end()
    numbers = itertools.count(question.count(MARK, 0, start) + 1)
    return re.sub(MARK, lambda _: f"(image {next(numbers)})", question[start:].strip())


def check_text(value: object, name: str, *, image_alone: bool = False, turn: int | None = None) -> str:
    """Return the value if it is a non-empty text, which a mark may be if `image_alone`; raise Refused otherwise.

    `turn`: its number in a chat, for the message.
    """
    if not isinstance(value, str) or not (value.strip() if image_alone else plain_text(value)):
        what = name if turn is None else f"turn {turn} ({name})"
        raise Refused(f"no_{name}", f"{what} is {value!r:.80}; text is needed. Add it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can encode half of a surrogate pair, which no tokenizer accepts
        raise Refused("bad_text", f"{name} holds half of a surrogate pair ({error}). Write the text again.") from error
    return value


def check_system(value: object) -> str:
    """Return the value if it is a text for the system's turn, which may be empty; raise Refused otherwise."""
    return value if value == "" else check_text(value, "system", image_alone=True)


def refuse_keys(record: dict, keys: frozenset[str]) -> None:
    """Raise Refused if the record has one of the keys with a value, of `label` with true or false."""
    for key in sorted(keys.intersection(record)):
        if record[key] not in EMPTY and (key != "label" or isinstance(record[key], bool)):
            rule = "it changes what is asked or learned, and is not used"
            raise Refused("unused_key", f"{key} is {record[key]!r:.40}; {rule}. Remove it or the record.")


def is_numbers(values: object) -> bool:
    """Whether the value is a non-empty list of numbers below 1e9 in magnitude."""
    numbers = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)
    return numbers and len(values) > 0


def checked_box(box: object, scales: tuple[float, float] = (1.0, 1.0), what: str = "answer") -> Box:
    """Check a box and return it in 0-1000, multiplied by `scales` (x, y).

    Raises:
        Refused: it breaks a rule of gold boxes.
    """
    if box is None or box == []:
        raise Refused("no_gold_box", f"{what} is {box!r}; a gold box [x1, y1, x2, y2] is needed. Add it.")
    if not isinstance(box, list) or len(box) != 4:
        raise Refused("box_length", f"{what} is {box!r:.80}; a box is a list of 4 numbers. Correct it.")
    if not is_numbers(box):
        raise Refused("box_not_numbers", f"{what} is {box!r:.80}; a box is made of numbers. Correct it.")
    x1, y1, x2, y2 = scaled = tuple(round(value * scales[i % 2], 3) for i, value in enumerate(box))
    if min(scaled) < 0 or max(scaled) > 1000:
        limits = " x ".join(f"{1000 / scale:g}" for scale in dict.fromkeys(scales))
        raise Refused("box_outside", f"box {box} leaves the image, 0 to {limits}. Correct it.")
    if x1 >= x2 or y1 >= y2:
        raise Refused("box_inverted", f"box {box} is inverted or empty; x1 < x2 and y1 < y2 must hold. Correct it.")
    return scaled


def parse(
    record: dict, read: Callable[[dict, Source], dict], file: Source, number: int, *, scanned: bool = False
) -> Example:
    """Parse record `number` of the file into an example.

    Args:
        read: the reader of the record's schema; returns fields of the example.
        scanned: only check the record; do not derive its target image from the question's wording.

    Raises:
        Refused: the record breaks a rule.
    """
    if not _CHANGING.isdisjoint(record):
        refuse_keys(record, _CHANGING)
    answer_format = record.get("answer_format", "think")
    if answer_format not in ("think", "box"):
        raise Refused("bad_answer_format", f'answer_format is {answer_format!r}; it is "think" or "box". Correct it.')
    task = record.get("task") or record.get("type") or "grounding"
    if not isinstance(task, str):
        raise Refused("bad_task", f"task is {task!r:.80}; it must be a name. Correct it.")
    fields = {"id": str(record.get("id", f"{file.path.stem}-{number}")), "task": task, **read(record, file)}
    if "answer_format" in record:
        fields["answer_format"] = answer_format
    if (system := record.get("system")) is not None:
        if fields.get("system") not in (None, system):
            turn = f"the system's turn is {fields['system']!r:.40}"
            raise Refused("two_systems", f"system is {system!r:.40} and {turn}; one text is used. Remove the other.")
        fields["system"] = check_system(system)
    if "target_image" not in fields and (not scanned or "target_image" in record):
        shown = ((fields.get("system") or "") + fields["question"]).count(MARK) or len(fields["images"])
        fields["target_image"] = target_image(record, fields["question"], shown)
    return Example(source=f"{file.label}#{number}", **fields)


def target_image(record: dict, question: str, images: int) -> int:
    """Index of the image that the box lies in: the record's `target_image`, else the one that the wording implies.

    A box is relative to its image, so only pictures and answers in pixels (`grade_texts`) need the index. The wording
    implies the last image in which something is to be found, else the last one mentioned, else the last image.
    """
    if "target_image" in record:
        target = record["target_image"]
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < images:
            raise Refused("bad_target_image", f"target_image is {target!r}; it must be 0 to {images - 1}. Correct it.")
        return target
    question = question[:2000]  # the patterns take quadratic time, and a question may be of any length
    stated = _STATED.findall(str(record.get("additional_info", "")))
    mentions = stated or _MENTIONED.findall(question)
    if not mentions:
        return images - 1
    mentions = stated or _SOUGHT.findall(question) or mentions  # the slow pattern only where it may match
    number, nth, word = mentions[-1]
    index = _ORDINALS[word.lower()] if word else int(number or nth) - 1
    return min(max(index, 0), images - 1)

"""MMIU: multiple-choice questions about several images, scored by accuracy (arXiv 2408.02718).

The same four names serve every benchmark of this kind, here and in odinw.py:

    questions, faults = read(path, image_root)  # no image is opened; a question is an Example, for Processor.prompt
    question.prompt                             # the text that asks
    answers = grade(questions, texts)           # one dictionary a question, to be kept or shown
    score(questions, texts)                     # {"mean": ..., "tasks": {task: ...}, ...}, in percent

The format is that of the data set FanqingM/MMIU-Benchmark on Hugging Face (README.md, "Data Fields"), which publishes
the annotations as all.parquet, and of OpenGVLab/MMIU on GitHub (VLMEvalKit/all.json): records of `task`,
`visual_input_component`, `source`, `options` ("A: ...", a line each, or several), `question`, `context`,
`input_image_path` (a list of "./Low-level-semantic/TASK/FILE.jpg") and `output`, the right option's letter. There are
11,698 records. The first folder of a path is the images' relationship, and the name of the archive that they are in.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boxgrpo.trainer.data.example import Example, Fault, Place, Refused, require_some, resolve_images, text_of

from .answer_text import chosen_letter

PUBLISHED = {"UniVG-R1": 53.03}  # accuracy in percent

RELATIONSHIPS = (
    "Low-level-semantic",
    "High-level-sub-semantic",
    "High-level-obj-semantic",
    "Discrete-temporal",
    "Continuous-temporal",
    "2D-spatial",
    "3D-spatial",
)

# OpenGVLab/MMIU asks these tasks' questions before their context, all others' behind it (VLMEvalKit/test_*.py).
QUESTION_FIRST = frozenset(
    "person_reid multiple_image_captioning spot_the_similarity face_retrieval sketch2image_retrieval "
    "handwritten_retrieval spot_the_diff image2image_retrieval vehicle_retrieval text2image_retrieval "
    "general_action_recognition video_captioning next_img_prediction temporal_ordering meme_vedio_understanding "
    "action_quality_assessment temporal_localization mevis ravens_progressive_matrices threed_indoor_recognition "
    "point_tracking threed_cad_recognition single_object_tracking".split()
)

ANSWER_FORMATS = {  # what a prompt ends with
    "think": "\nFirst output the thinking process in <think> </think> tags"
    " and then output the letter of the chosen option in <answer> </answer> tags.",
    "letter": "\nAnswer with the letter of the chosen option only.",
}


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """A multiple-choice question. Its `turns` hold the user's turn alone, so that a prompt adds nothing to the text."""

    options: dict[str, str] = field(hash=False)  # letter to text
    letter: str  # of the right option
    relationship: str  # one of RELATIONSHIPS; "" where the image paths do not say it

    @property
    def prompt(self) -> str:
        return self.question


def read(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None, *, answer_format: str = "think"
) -> tuple[list[Question], list[Fault]]:
    """Read all.parquet, or a JSON array of the same records. No image is opened.

    Args:
        path: the file.
        image_root: folder that the archives were unpacked in, each into a folder of its own name; image paths must not
            leave it. None: the file's own folder, and any path is allowed.
        answer_format: what is asked for: "think", reasoning and the letter in its tags, or "letter" alone.

    Returns:
        The questions in file order, and one `Fault` for each record refused.

    Raises:
        ValueError: unknown answer format, a broken file or one without a usable record, or pyarrow needed and missing.
        OSError: the file cannot be read.
    """
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format is {answer_format!r}; MMIU is asked in {', '.join(ANSWER_FORMATS)}.")
    path = Path(path)
    questions, faults = [], []
    for index, record in enumerate(_records(path)):
        source = f"{path.name}#{index}"
        try:
            questions.append(_question(record, source, path, image_root, answer_format))
        except Refused as refused:
            faults.append(refused.fault(source))
    require_some(path, questions, faults, remedy="Pass MMIU's all.parquet or all.json.")
    return questions, faults


def grade(questions: Sequence[Question], texts: Sequence[str]) -> list[dict]:
    """A dictionary each: source, id, task, relationship, question, answer, chosen and gold (letters), correct.

    `answer` is the text; `chosen` is None where `chosen_letter` finds no choice; that counts as wrong.

    Raises:
        ValueError: not one text a question.
    """
    if len(texts) != len(questions):
        raise ValueError(f"{len(texts)} answers for {len(questions)} questions; there must be one each, in order.")
    letters = [chosen_letter(text, q.options) for q, text in zip(questions, texts)]
    return [
        {
            "source": q.source,
            "id": q.id,
            "task": q.task,
            "relationship": q.relationship,
            "question": q.question,
            "answer": text,
            "chosen": letter,
            "gold": q.letter,
            "correct": letter == q.letter,
        }
        for q, text, letter in zip(questions, texts, letters)
    ]


def score(questions: Sequence[Question], texts: Sequence[str]) -> dict:
    """Accuracies in percent.

    `mean` is the mean over the tasks. So OpenGVLab/MMIU reports it (evaluate_correct.py), over the 60 values that
    `task` has in the data; the paper speaks of 52. `overall` counts every question alike. `relationships` are means
    over the tasks of each. Unlike there no language model reads the answers: `unread` of `count` chose no option.

    Raises:
        ValueError: no question, or not one text a question.
    """
    graded = grade(questions, texts)
    if not graded:
        raise ValueError("there are 0 questions; a score needs at least 1. Check --data and --limit.")
    by_task = defaultdict(list)
    tasks_of = defaultdict(set)
    for answer in graded:
        by_task[answer["task"]].append(answer["correct"])
        if answer["relationship"]:
            tasks_of[answer["relationship"]].add(answer["task"])
    tasks = {task: 100 * _mean(by_task[task]) for task in sorted(by_task)}
    return {
        "mean": _mean(tasks.values()),
        "overall": 100 * _mean(answer["correct"] for answer in graded),
        "tasks": tasks,
        "relationships": {r: _mean(tasks[t] for t in tasks_of[r]) for r in RELATIONSHIPS if r in tasks_of},
        "counts": {task: len(by_task[task]) for task in tasks},
        "count": len(graded),
        "unread": sum(answer["chosen"] is None for answer in graded),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _records(path: Path) -> list:
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(f"{path} needs pyarrow, which is not installed. Run `pip install pyarrow`.") from error
        try:
            return parquet.read_table(path).to_pylist()
        except ArrowException as error:
            raise ValueError(f"{path} is not a Parquet file ({error}). Fetch it again.") from error
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Fetch it again.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a JSON {type(records).__name__}; MMIU's annotations are an array of records.")
    return records


def _question(
    record: object, source: str, path: Path, image_root: str | os.PathLike | None, answer_format: str
) -> Question:
    if not isinstance(record, dict):
        raise Refused("not_a_record", f"{record!r:.80} is no JSON object. Drop it.")
    task = text_of(record.get("task"), "task")
    images = resolve_images(record.get("input_image_path"), Place.of(path, image_root), name="input_image_path")
    options = _options(record.get("options"))
    letter = str(record.get("output") or "").strip(" .:()").upper()
    if letter not in options:
        raise Refused("bad_output", f"output is {record.get('output')!r:.80}; one of {', '.join(options)} is needed.")
    text = _asked(record, task, options) + ANSWER_FORMATS[answer_format]
    folders = Path(record["input_image_path"][0]).parts
    return Question(
        id=f"{path.stem}-{source.rpartition('#')[2]}",
        task=task,
        images=images,
        question=text,
        gold=None,
        turns=(("user", text),),
        answer_format="think" if answer_format == "think" else "box",  # an Example's word for no thinking
        source=source,
        options=options,
        letter=letter,
        relationship=next((r for r in RELATIONSHIPS if r in folders), ""),
    )


def _options(value: object) -> dict[str, str]:
    """Letter to text. An option begins at a line with the next letter; some (homographies) go over several lines."""
    options: dict[str, str] = {}
    for line in text_of(value, "options").split("\n"):
        following = chr(ord("A") + len(options))
        begun = re.match(rf"\s*{following}\s?[:.)]\s*", line) if following <= "Z" else None
        if begun:
            options[following] = line[begun.end() :].strip()
        elif options and line.strip():
            options[chr(ord(following) - 1)] += "\n" + line.strip()
        elif line.strip():
            break
    if len(options) < 2:
        raise Refused("bad_options", f"options is {value!r:.80}; lines 'A: ...' and 'B: ...' at least are needed.")
    return options


def _asked(record: dict, task: str, options: dict[str, str]) -> str:
    """Question and context in the task's order, then the options unless the context lists them, as most do."""
    parts = [record.get("context"), record.get("question")]
    if task in QUESTION_FIRST:
        parts.reverse()
    texts = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
    asked = text_of("\n".join(texts), "question")

    def plain(text: str) -> str:  # "A. No", "A:No" and "A: No" are one
        return re.sub(r"\b([A-Z])\s?[:.)]\s*", r"\1: ", " ".join(text.split()))

    lines = [f"{letter}: {text}" for letter, text in options.items()]
    return asked if all(plain(line) in plain(asked) for line in lines) else "\n".join([asked, *lines])

"""MMIU: multiple-choice questions about several images, scored by accuracy (arXiv 2408.02718).

The format is that of the data set FanqingM/MMIU-Benchmark on Hugging Face (README.md, "Data Fields"), which publishes
the annotations as all.parquet, and of OpenGVLab/MMIU on GitHub (VLMEvalKit/all.json): 11,698 records of `task`,
`visual_input_component`, `source`, `options` ("A: ...", a line each, or several), `question`, `context`,
`input_image_path` (a list of "./Low-level-semantic/TASK/FILE.jpg") and `output`, the right option's letter. The first
folder of a path is the images' relationship, and the name of the archive that they are in.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase as LETTERS

from boxgrpo.trainer.arguments import optional_import
from boxgrpo.trainer.data.example import Example, Fault, Refused, Source, check_text, require_some
from boxgrpo.trainer.data.images import resolve_images
from boxgrpo.trainer.data.scan import scan

from .answer_text import chosen_letter
from .questions import FACTS, answer_row, read_each, user_turn

RELATIONSHIPS = FACTS["mmiu"]["relationships"]
# In OpenGVLab/MMIU the question precedes the context in these tasks, and follows it in all others (test_*.py).
QUESTION_FIRST = frozenset(FACTS["mmiu"]["question_first"])
ANSWER_SUFFIX = (
    "\nFirst output the thinking process in <think> </think> tags"
    " and then output the letter of the chosen option in <answer> </answer> tags."
)


@dataclass(frozen=True, kw_only=True)
class Question(Example):
    """A multiple-choice question."""

    options: dict[str, str] = field(hash=False)  # letter to text
    letter: str  # of the right option
    relationship: str  # one of RELATIONSHIPS; "" where the image paths name none


def read(path: str | os.PathLike, image_root: str | os.PathLike | None) -> tuple[list[Question], list[Fault]]:
    """Read all.parquet, or a JSON array of the same records.

    Args:
        image_root: folder that the archives were unpacked in, each into a folder of its own name.

    Raises:
        ValueError: the file is broken or has no usable record, or pyarrow is needed and missing.
        OSError: the file cannot be read.
    """
    path = Path(path)
    file = Source.of(path, image_root)
    questions, faults = read_each(_records(path), lambda record, source: _question(record, source, file), path.name)
    require_some(path, questions, faults, remedy="Pass MMIU's all.parquet or all.json.")
    return questions, faults


def grade(questions: Sequence[Question], texts: Sequence[str]) -> list[dict]:
    """A dictionary each: source, id, task, relationship, question, answer, chosen and gold (letters), correct.

    `answer` is the text; `chosen` is None where `chosen_letter` finds no choice; that counts as wrong.
    """
    answers = []
    for q, text in zip(questions, texts, strict=True):
        letter = chosen_letter(text, q.options)
        found = {"chosen": letter, "gold": q.letter, "correct": letter == q.letter}
        answers.append(answer_row(q, text, relationship=q.relationship, **found))
    return answers


def score(questions: Sequence[Question], answers: Sequence[dict]) -> dict:
    """Accuracies of `grade`'s answers in percent.

    `mean` is the mean over the tasks, as OpenGVLab/MMIU reports it (evaluate_correct.py), over the 60 values that
    `task` has in the data; the paper counts 52. `overall` is the mean over all questions, `relationships` are the means
    over the tasks of each. Unlike there, no language model parses the answers: `unread` of `count` chose no option.
    """
    by_task, tasks_of = defaultdict(list), defaultdict(set)
    for answer in answers:
        by_task[answer["task"]].append(answer["correct"])
        tasks_of[answer["relationship"]].add(answer["task"])
    tasks = {task: 100 * _mean(by_task[task]) for task in sorted(by_task)}
    return {
        "mean": _mean(tasks.values()),
        "overall": 100 * _mean([answer["correct"] for answer in answers]),
        "tasks": tasks,
        "relationships": {r: _mean([tasks[t] for t in sorted(tasks_of[r])]) for r in RELATIONSHIPS if r in tasks_of},
        "counts": {task: len(by_task[task]) for task in tasks},
        "count": len(answers),
        "unread": sum(answer["chosen"] is None for answer in answers),
    }


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)


def _records(path: Path) -> list:
    if path.suffix != ".parquet":
        return [row.value for row in scan(path)]
    with optional_import(f"data is {path}", "Run `pip install pyarrow`."):
        from pyarrow import ArrowException, parquet
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file ({error}). Fetch it again.") from error


def _question(record: dict, source: str, file: Source) -> Question:
    task = check_text(record.get("task"), "task")
    images = resolve_images(record.get("input_image_path"), file, name="input_image_path")
    options = _options(record.get("options"))
    letter = str(record.get("output") or "").strip(" .:()").upper()
    if letter not in options:
        raise Refused("bad_output", f"output is {record.get('output')!r:.80}; one of {', '.join(options)} is needed.")
    file, _, index = source.rpartition("#")
    folders = Path(record["input_image_path"][0]).parts
    return Question(
        **user_turn(_question_text(record, task, options) + ANSWER_SUFFIX),
        id=f"{Path(file).stem}-{index}",
        task=task,
        images=images,
        source=source,
        options=options,
        letter=letter,
        relationship=next((r for r in RELATIONSHIPS if r in folders), ""),
    )


def _options(value: object) -> dict[str, str]:
    """Letter to text. An option begins at a line with the next letter and may have several lines (homographies do)."""
    texts: list[str] = []
    for line in filter(str.strip, check_text(value, "options").split("\n")):
        letter = LETTERS[len(texts) :][:1] or "(?!)"  # after Z: no match
        if begun := re.match(rf"\s*{letter}\s?[:.)]\s*", line):
            texts.append(line[begun.end() :].strip())
        elif texts:
            texts[-1] += "\n" + line.strip()
        else:
            break
    if len(texts) < 2:
        raise Refused("bad_options", f"options is {value!r:.80}; lines 'A: ...' and 'B: ...' at least are needed.")
    return dict(zip(LETTERS, texts))


def _question_text(record: dict, task: str, options: dict[str, str]) -> str:
    """Question and context in the task's order, then the options unless the context lists them, as most do."""
    parts = [record.get("context"), record.get("question")]
    if task in QUESTION_FIRST:
        parts.reverse()
    texts = [part.strip() for part in parts if isinstance(part, str) and part.strip()]
    question = check_text("\n".join(texts), "question")

    def plain(text: str) -> str:  # "A. No", "A:No" and "A: No" become equal
        return re.sub(r"\b([A-Z])\s?[:.)]\s*", r"\1: ", " ".join(text.split()))

    lines = [f"{letter}: {text}" for letter, text in options.items()]
    return question if all(plain(line) in plain(question) for line in lines) else "\n".join([question, *lines])

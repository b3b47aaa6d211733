"""Scores of answers that hold a box: IoU with gold, accuracies per task, their mean over tasks, and intervals."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from boxgrpo.kernels import ANSWER_FORMATS, box_iou, grounding_rewards, pack_texts

from .example import Example, Refused, image_size
from .options import BOX_FORMATS

LEVEL = 0.95  # of the intervals
AT_ONCE = 4_000_000  # resampled values in memory


def grade_texts(examples: Sequence[Example], texts: Sequence[str], *, answer_format: str = "auto") -> list[dict]:
    """Read the box of each answer, one text an example, and compare it with gold.

    Args:
        answer_format: how boxes are written: one of ANSWER_FORMATS (see `grounding_rewards`), "pixels" for a "list" in
            pixels of the target image, whose file is then looked at, or "auto": as each example asks.

    Returns:
        A dictionary each: source, id, task, question, answer, box (0-1000) or None, gold, iou (0-1, fp64), format (0
        or 1).

    Raises:
        ValueError: not one text for each example, an unknown format, or in "pixels" an image that is not there.
    """
    if len(texts) != len(examples):
        raise ValueError(f"{len(texts)} answers for {len(examples)} usable records; there must be one each, in order.")
    if answer_format not in BOX_FORMATS:
        raise ValueError(
            f"answer_format is {answer_format!r}; it must be one of {', '.join(BOX_FORMATS)}. Change --answer_format."
        )
    text, offsets = pack_texts([text.encode(errors="replace") for text in texts])
    gold = torch.tensor([e.gold for e in examples], dtype=torch.float64).view(-1, 4)
    formats: str | torch.Tensor = "list" if answer_format == "pixels" else answer_format
    if answer_format == "auto":
        formats = torch.tensor([ANSWER_FORMATS[e.answer_format] for e in examples], dtype=torch.uint8)
    read = grounding_rewards(text, offsets, gold.float(), answer_format=formats)
    boxes = read.boxes.double()
    if answer_format == "pixels":
        boxes = 1000 * boxes / torch.tensor([_size(e) * 2 for e in examples], dtype=torch.float64).view(-1, 4)
    # Once more in fp64: rounded to fp32, an IoU a hair above a threshold would stand on it.
    columns = (c.tolist() for c in (box_iou(boxes, gold), read.format, boxes, read.found))
    return [
        {
            "source": e.source,
            "id": e.id,
            "task": e.task,
            "question": e.question,
            "answer": text,
            "box": box if found else None,
            "gold": list(e.gold),
            "iou": iou,
            "format": form,
        }
        for e, text, iou, form, box, found in zip(examples, texts, *columns, strict=True)
    ]


def _size(example: Example) -> tuple[int, int]:
    """Width and height of the target image in pixels."""
    try:
        return image_size(example.images[example.target_image])
    except Refused as refused:
        raise ValueError(f"{example.source}: {refused}") from refused


def measures(iou: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracies and mean along the last axis of IoUs in 0-1.

    `accuracy_at_0.5` counts IoU above 0.5, the paper's words; `accuracy_at_least_0.5` counts equality too, as its
    scorer does.
    """
    return {
        "accuracy_at_0.3": (iou > 0.3).mean(-1),
        "accuracy_at_0.5": (iou > 0.5).mean(-1),
        "accuracy_at_least_0.5": (iou >= 0.5).mean(-1),
        "accuracy_at_0.7": (iou > 0.7).mean(-1),
        "mean_iou": iou.mean(-1),
    }


def summarize(answers: Sequence[dict], *, resamples: int = 0, seed: int = 0) -> dict:
    """Scores of `grade_texts`' answers: per task, and the mean over tasks as the paper reports it.

    All are `measures`, in 0-1; `well_formed_iou` is the mean IoU of the answers in the right format.

    Args:
        resamples: for `interval`, [low, high] of each measure at a level of 0.95: a percentile bootstrap that draws the
            records of each task anew, with replacement, and takes the mean over tasks of those. 0: no `interval`.
        seed: of the draws; a task's do not depend on the other tasks.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("there are 0 answers; a summary needs at least 1. Check --data and --limit.")
    by_task = defaultdict(list)
    for a in answers:
        by_task[a["task"]].append(a["iou"])
    tasks = {}
    drawn = defaultdict(list)  # measure -> resampled values of each task, (resamples) each
    for task, ious in sorted(by_task.items()):
        ious = np.array(ious)
        tasks[task] = {"count": len(ious)} | {name: float(value) for name, value in measures(ious).items()}
        if resamples:
            redrawn = bootstrap(ious, resamples, np.random.default_rng([seed, *task.encode(errors="replace")]))
            tasks[task]["interval"] = {name: _interval(values) for name, values in redrawn.items()}
            for name, values in redrawn.items():
                drawn[name].append(values)
    names = list(measures(np.zeros(1)))
    well_formed = [a["iou"] for a in answers if a["format"]]
    summary = {
        "count": len(answers),
        **{name: sum(t[name] for t in tasks.values()) / len(tasks) for name in names},
        "format": len(well_formed) / len(answers),
        "well_formed_iou": sum(well_formed) / max(1, len(well_formed)),
    }
    if resamples:
        summary["interval"] = {name: _interval(np.mean(values, axis=0)) for name, values in drawn.items()}
    return summary | {"tasks": tasks}


def bootstrap(ious: np.ndarray, resamples: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """`measures` of `resamples` draws of as many IoUs, with replacement: (resamples) each."""
    rows = max(1, AT_ONCE // len(ious))
    parts = [
        measures(ious[generator.integers(len(ious), size=(min(rows, resamples - start), len(ious)))])
        for start in range(0, resamples, rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()

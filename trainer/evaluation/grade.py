"""Scores of answers that hold a box: IoU with gold, accuracies per task, their mean over tasks, and intervals."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from boxgrpo.kernels import ANSWER_FORMATS, box_iou, grounding_rewards, pack_texts
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.images import image_size
from boxgrpo.trainer.data.processor import resized

from .answer_text import ANY_BOX, LIST_BOX, TAGGED_BOX, answer_part, first_box
from .questions import answer_row

CONFIDENCE = 0.95  # of the intervals
MAX_RESAMPLED = 4_000_000  # resampled values in memory at once


def grade_texts(
    examples: Sequence[Example],
    texts: Sequence[str],
    *,
    answer_format: str = "auto",
    limits: tuple[int, ...] | None = None,
) -> list[dict]:
    """Read the box of each answer, one text an example, and compare it with gold.

    A box in the reasoning does not count: only the `answer_part` is read (for "think" by the kernel itself).

    Args:
        answer_format: how boxes are written: "think", "box" or "marked" (see `grounding_rewards`); "list",
            `[x1, y1, x2, y2]` in 0-1000; "fractions" of the image, "pixels" of the target image, whose file is then
            opened, "resized_pixels" of that image as it is given to a model (these three `[x1, y1, x2, y2]` or pairs);
            "tagged", `<box>x1 y1 x2 y2</box>` in 0-1000; or "auto": the example's own. From "list" on, JSON objects
            that name a box are read too, and numbers may be any of JSON's: see `first_box`.
        limits: min_pixels, max_pixels and `token_side` of the images given to the model, which "resized_pixels" needs.

    Returns:
        A dictionary for each text: source, id, task, question, answer, box (0-1000) or None, gold, iou (0-1, fp64),
        format (0 or 1).

    Raises:
        ValueError: in "pixels" and "resized_pixels", if an image is missing.
    """
    gold = torch.tensor([e.gold for e in examples], dtype=torch.float64).view(-1, 4)
    if answer_format in _OTHER_FORMATS:
        pattern, side = _OTHER_FORMATS[answer_format]
        read = [first_box(answer_part(text), pattern) for text in texts]
        sides = [2 * ((side, side) if side else _size(e, limits, answer_format)) for e in examples]
        sizes = torch.tensor(sides, dtype=torch.float64).view(-1, 4)
        boxes = 1000 * torch.tensor([box or (0.0,) * 4 for box in read], dtype=torch.float64).view(-1, 4) / sizes
        found = form = torch.tensor([box is not None for box in read])
    else:
        formats = [e.answer_format if answer_format == "auto" else answer_format for e in examples]
        parts = [t if f == "think" else answer_part(t) for t, f in zip(texts, formats, strict=True)]
        codes = torch.tensor([ANSWER_FORMATS[f] for f in formats], dtype=torch.uint8)
        text, offsets = pack_texts([t.encode(errors="replace") for t in parts])
        rewards = grounding_rewards(text, offsets, gold.float(), answer_format=codes)
        boxes, found, form = rewards.boxes.double(), rewards.found, rewards.format
    # In fp64: in fp32 an IoU slightly above a threshold would be rounded to it.
    columns = (c.tolist() for c in (box_iou(boxes, gold), form.float(), boxes, found))
    return [
        answer_row(e, text, box=box if found else None, gold=list(e.gold), iou=iou, format=form)
        for e, text, iou, form, box, found in zip(examples, texts, *columns, strict=True)
    ]


# Formats that the kernels do not read: the pattern of a box; the image's sides in its units, None: those of its file.
_OTHER_FORMATS = {
    "list": (LIST_BOX, 1000),
    "fractions": (ANY_BOX, 1),
    "pixels": (ANY_BOX, None),
    "resized_pixels": (ANY_BOX, None),
    "tagged": (TAGGED_BOX, 1000),
}


def _size(example: Example, limits: tuple[int, ...] | None, answer_format: str) -> tuple[int, int]:
    """Width and height of the target image in pixels."""
    try:
        size = image_size(example.images[example.target_image])
        return resized(size, *limits) if answer_format == "resized_pixels" else size
    except ValueError as error:
        raise ValueError(f"{example.source}: {error}") from error


def measures(iou: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracies and mean along the last axis of IoUs in 0-1.

    `accuracy_at_0.5` counts IoU above 0.5, as the paper states; `accuracy_at_least_0.5` counts equality too, as its
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

    All values are `measures`, in 0-1; `well_formed_iou` is the mean IoU of the answers in the right format.

    Args:
        resamples: bootstrap resamples for `interval`, the 95 % percentile interval [low, high] of each measure. Each
            draws the records of every task with replacement, and takes the mean over the tasks. 0: no `interval`.
        seed: seed of the draws; the draws of a task do not depend on the other tasks.
    """
    by_task = defaultdict(list)
    for a in answers:
        by_task[a["task"]].append(a["iou"])
    tasks, drawn = {}, []
    for task, ious in sorted(by_task.items()):
        ious = np.array(ious)
        tasks[task] = {"count": len(ious)} | {name: float(value) for name, value in measures(ious).items()}
        if resamples:
            drawn.append(bootstrap(ious, resamples, np.random.default_rng([seed, *task.encode(errors="replace")])))
            tasks[task]["interval"] = _intervals(drawn[-1])
    names = list(measures(np.zeros(1)))
    well_formed = [a["iou"] for a in answers if a["format"]]
    summary = {
        "count": len(answers),
        **{name: sum(t[name] for t in tasks.values()) / len(tasks) for name in names},
        "format": len(well_formed) / len(answers),
        "well_formed_iou": sum(well_formed) / max(1, len(well_formed)),
    }
    if resamples:
        summary["interval"] = _intervals({name: np.mean([d[name] for d in drawn], axis=0) for name in names})
    return summary | {"tasks": tasks}


def bootstrap(ious: np.ndarray, resamples: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """`measures` of bootstrap samples of the IoUs, drawn with replacement: (resamples) each."""
    rows = max(1, MAX_RESAMPLED // len(ious))
    parts = [
        measures(ious[generator.integers(len(ious), size=(min(rows, resamples - start), len(ious)))])
        for start in range(0, resamples, rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _intervals(drawn: dict[str, np.ndarray]) -> dict[str, list[float]]:
    edges = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return {name: np.quantile(values, edges).tolist() for name, values in drawn.items()}

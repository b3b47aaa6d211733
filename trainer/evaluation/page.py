"""An evaluation as one HTML page: tables, and cases with their pictures. It opens from any disk, without a network."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from boxgrpo.trainer.data.example import Example, box_text

from .benches import Bench
from .pictures import annotate_example, data_uri
from .tables import comparison, details, in_percent, notes

IMAGE_HEIGHT = 300  # pixels
JPEG_QUALITY = 82
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).resolve().parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

Case = tuple[dict, Example]  # an answer of `grade_texts` and its example


def choose(cases: Sequence[Case], count: int, seed: int) -> list[tuple[str, list[Case]]]:
    """The worst, the best and random cases, `count` each and none twice; worst and best take turns among the tasks."""
    left = list(cases)
    sections = []
    for name, sign in (("Worst", 1), ("Best", -1)):
        left = _in_turns(left, sign)
        sections.append((name, left[:count]))
        left = left[count:]
    return [*sections, ("Random", random.Random(seed).sample(left, min(count, len(left))))]


def _in_turns(cases: Sequence[Case], sign: int) -> list[Case]:
    """By sign x IoU: each task's first, then each task's second, and so on."""
    by_iou = sorted(cases, key=lambda case: sign * case[0]["iou"])
    seen: Counter[str] = Counter()
    places = []
    for answer, _ in by_iou:
        places.append(seen[answer["task"]])
        seen[answer["task"]] += 1
    return [by_iou[i] for i in sorted(range(len(by_iou)), key=places.__getitem__)]


def page(
    bench: Bench, summary: dict, cases: Sequence[Case], *, name: str, skipped: Sequence[str], count: int, seed: int
) -> str:
    """The page's HTML. Whatever comes from the model or the records is escaped.

    Args:
        skipped: why records have no answer.
        count: cases in each section.
    """
    sections = [(title, [_shown(*case) for case in chosen]) for title, chosen in choose(cases, count, seed) if chosen]
    return TEMPLATES.get_template("evaluation.html").render(
        title=bench.title,
        name=name,
        mean=in_percent(bench, summary)["mean"],
        comparison=comparison(bench, summary, name),
        details=details(bench, summary),
        notes=notes(bench, summary),
        sections=sections,
        skipped=skipped,
    )


def _shown(answer: dict, example: Example) -> dict:
    """What the template shows of a case. An image that cannot be loaded takes the picture's place as a message."""
    thought = _THOUGHT.search(answer["answer"])
    picture, missing = "", ""
    try:
        drawn = annotate_example(example, predicted=answer["box"], image_height=IMAGE_HEIGHT)
        picture = data_uri(drawn, "JPEG", quality=JPEG_QUALITY)
    except ValueError as error:
        missing = str(error)
    return answer | {
        "picture": picture,
        "missing": missing,
        "thought": thought[1].strip() if thought else "",
        "said": answer["answer"].replace(thought[0] if thought else "", "", 1).strip(),
        "verdict": "hit" if answer["iou"] > 0.5 else "miss",
        "gold_text": box_text(answer["gold"]),
        "box_text": box_text(answer["box"]) if answer["box"] else "no box found",
    }

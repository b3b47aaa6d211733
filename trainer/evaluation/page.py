"""An evaluation as one HTML page: tables, and cases with their pictures. It opens from any disk, without a network."""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from jinja2 import StrictUndefined, Template

from boxgrpo.trainer.data.example import Example, box_text

from .benches import Bench
from .pictures import annotate_example, data_uri
from .tables import comparison, details, in_percent, notes

IMAGE_HEIGHT = 300  # pixels
JPEG_QUALITY = 82
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
PAGE = Path(__file__).with_name("templates") / "evaluation.html"

Case = tuple[dict, Example]  # an answer of `grade_texts` and its example


def choose(cases: Sequence[Case], count: int, seed: int) -> list[tuple[str, list[Case]]]:
    """The worst, the best and random cases, `count` each and none twice; worst and best take turns among the tasks."""
    left = list(cases)
    sections = []
    for name, sign in (("Worst", 1), ("Best", -1)):
        turns = defaultdict(itertools.count)  # by task: each task's first case, then each task's second, and so on
        left.sort(key=lambda case: sign * case[0]["iou"])
        left.sort(key=lambda case: next(turns[case[0]["task"]]))
        sections.append((name, left[:count]))
        left = left[count:]
    return [*sections, ("Random", random.Random(seed).sample(left, min(count, len(left))))]


def page(
    bench: Bench, summary: dict, cases: Sequence[Case], *, name: str, skipped: Sequence[str], count: int, seed: int
) -> str:
    """The page's HTML. Whatever comes from the model or the records is escaped.

    Args:
        skipped: why records have no answer.
        count: cases in each section.
    """
    sections = [(title, [_shown(*case) for case in chosen]) for title, chosen in choose(cases, count, seed) if chosen]
    strict = {"autoescape": True, "undefined": StrictUndefined}
    template = Template(PAGE.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True, **strict)
    return template.render(
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
    before, thought, after = (_THOUGHT.split(answer["answer"], maxsplit=1) + ["", ""])[:3]
    picture, missing = "", ""
    try:
        drawn = annotate_example(example, predicted=answer["box"], image_height=IMAGE_HEIGHT)
        picture = data_uri(drawn, "JPEG", quality=JPEG_QUALITY)
    except ValueError as error:
        missing = str(error)
    return answer | {
        "picture": picture,
        "missing": missing,
        "thought": thought.strip(),
        "said": (before + after).strip(),
        "verdict": "hit" if answer["iou"] > 0.5 else "miss",
        "gold_text": box_text(answer["gold"]),
        "box_text": box_text(answer["box"]) if answer["box"] else "no box found",
    }

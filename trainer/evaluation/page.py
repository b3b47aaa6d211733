"""An evaluation as one HTML page: tables, and cases with their boxes. It loads nothing, so it opens from any disk."""

import base64
import io
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.data.readers import Example

from .benches import Bench
from .tables import comparison, details, notes

IMAGE_HEIGHT = 300  # pixels; of a very wide image three heights of width
JPEG_QUALITY = 82
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


Case = tuple[dict, Example]  # an answer of `grade_texts` and what was asked


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
    places: dict[str, int] = defaultdict(int)
    entries = []
    for case in sorted(cases, key=lambda case: sign * case[0]["iou"]):
        answer, _ = case
        entries.append((places[answer["task"]], sign * answer["iou"], case))
        places[answer["task"]] += 1
    return [case for *_, case in sorted(entries, key=lambda entry: entry[:2])]


def page(
    bench: Bench,
    summary: dict,
    answers: Sequence[dict],
    examples: Sequence[Example],
    *,
    name: str,
    skipped: Sequence[str] = (),
    count: int = 8,
    seed: int = 0,
) -> str:
    """The page's HTML. Whatever comes from the model or the records is escaped.

    Args:
        answers, examples: of `grade_texts`. An image that cannot be loaded is left out of its case, which says so.
        skipped: why records have no answer.
        count: cases in each section.
    """
    chosen = choose(list(zip(answers, examples, strict=True)), count, seed)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("evaluation.html").render(
        title=bench.title,
        name=name,
        mean=100 * summary["accuracy_at_0.5"],
        comparison=comparison(bench, summary, name),
        details=details(bench, summary),
        notes=notes(bench, summary),
        sections=[(title, [_shown(*case) for case in cases]) for title, cases in chosen if cases],
        skipped=skipped,
    )


def _shown(answer: dict, example: Example) -> dict:
    thought = _THOUGHT.search(answer["answer"])
    said = answer["answer"].replace(thought[0], "", 1) if thought else answer["answer"]
    images = []
    for number, path in enumerate(example.images):
        try:
            images.append(_thumbnail(path) | {"boxes": _boxes(answer) if number == example.target_image else []})
        except ValueError:
            images.append({"missing": Path(path).name})
    return answer | {
        "images": images,
        "target": example.target_image,
        "thought": thought[1].strip() if thought else "",
        "said": said.strip(),
        "verdict": "hit" if answer["iou"] > 0.5 else "miss",
        "gold_text": _written(answer["gold"]),
        "box_text": _written(answer["box"]) if answer["box"] else "no box found",
    }


def _boxes(answer: dict) -> list[dict]:
    """Left, top, width and height in % of the image, of what can be seen of the boxes; an inverted one is turned."""
    found = []
    for kind in ("gold", "box"):
        if answer[kind] is not None:
            x1, y1, x2, y2 = (min(max(v / 10, 0), 100) for v in answer[kind])
            left, top = min(x1, x2), min(y1, y2)
            found.append({"kind": kind, "left": left, "top": top, "width": abs(x2 - x1), "height": abs(y2 - y1)})
    return found


def _written(box: Sequence[float]) -> str:
    return "({:g}, {:g}), ({:g}, {:g})".format(*(round(v, 1) for v in box))


def _thumbnail(path: str) -> dict:
    """An image as a data URI, and its size in pixels."""
    image = load_image(path)
    image.thumbnail((3 * IMAGE_HEIGHT, IMAGE_HEIGHT))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=JPEG_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return {"uri": uri, "width": image.width, "height": image.height}

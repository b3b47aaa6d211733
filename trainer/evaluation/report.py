"""Scores as tables: for the terminal, in Markdown beside the published rows, and on an HTML page with cases.

The page is one self-contained file, which needs no network.
"""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from jinja2 import StrictUndefined, Template

from boxgrpo.trainer.data.example import Example, box_text

from .benches import BENCHES, Bench
from .pictures import annotate_example, data_uri

ABSENT = "–"
REPORTED = "accuracy_at_0.5"  # the measure that the paper reports
PAGE = Path(__file__).with_name("templates") / "evaluation.html"
IMAGE_HEIGHT = 300  # pixels
JPEG_QUALITY = 82
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)

Case = tuple[dict, Example]  # an answer of `grade_texts` and its example


def in_percent(bench: Bench, summary: dict) -> dict:
    """`mean` and `tasks`: Acc@0.5 where the answers are boxes, else the benchmark's own score."""
    if bench.module:
        return {"mean": summary["mean"], "tasks": summary["tasks"]}
    tasks = {task: 100 * summary["tasks"][task][REPORTED] for task in bench.ordered(summary["tasks"])}
    return {"mean": 100 * summary[REPORTED], "tasks": tasks}


def comparison(bench: Bench, summary: dict, name: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows in %: the published rows, then the row of `name` and its interval, if there is one.

    The average is given only if every published column has a score. Without published rows the columns are the tasks.
    """
    scores = in_percent(bench, summary)
    tasks = [] if bench.module else list(bench.columns) or list(scores["tasks"])
    columns = ["model", "from", *(bench.columns.get(task, task) for task in tasks), "mean" if bench.module else "AVG"]
    rows = [
        [model, table, *map(_percent, values)]
        for table, published in bench.published.items()
        for model, values in published.items()
    ]
    whole = bench.module or scores["tasks"].keys() == set(tasks)
    own = [*(scores["tasks"].get(task) for task in tasks), scores["mean"] if whole else None]
    rows.append([name, "this run", *map(_percent, own)])
    if "interval" in summary:
        scored = [*(summary["tasks"].get(task) for task in tasks), summary if whole else None]
        rows.append(["", "95 % interval", *map(_interval, scored)])
    return columns, rows


def details(bench: Bench, summary: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of every measure, task by task and their mean; accuracies in %."""
    scores = in_percent(bench, summary)
    if bench.module:
        named = [*scores["tasks"].items(), ("mean over tasks", scores["mean"])]
        return ["task", "score"], [[task, _percent(score)] for task, score in named]
    columns = ["task", "records", "Acc@0.3", "Acc@0.5", "95 % interval", "IoU ≥ 0.5", "Acc@0.7", "mean IoU"]
    named = [*((task, summary["tasks"][task]) for task in scores["tasks"]), ("mean over tasks", summary)]
    rows = []
    for task, s in named:
        low, middle, equal, high = (_percent(100 * s[f"accuracy_at_{t}"]) for t in ("0.3", "0.5", "least_0.5", "0.7"))
        rows.append([task, str(s["count"]), low, middle, _interval(s), equal, high, f"{s['mean_iou']:.3f}"])
    return columns, rows


def notes(bench: Bench, summary: dict) -> list[str]:
    """Sentences below the tables: the number of records, the source of the published rows, the kind of intervals."""
    found = [f"{summary['count']} records scored, {summary['skipped']} skipped."]
    if bench.columns:
        found.append(
            "Published rows are the paper's, on its own records. Acc@0.5 counts an IoU above 0.5, as the paper "
            f"states; its scorer also counts 0.5 itself, which gives {100 * summary['accuracy_at_least_0.5']:.2f} here."
        )
    if "interval" in summary:
        found.append(
            "Intervals are percentiles of a bootstrap over the records of each task; the tasks are not resampled."
        )
    return found


def markdown(bench: Bench, summary: dict, name: str) -> str:
    """`comparison`, `details` and `notes` as a Markdown page."""
    title = _cell(bench.title) + ("" if bench.module else ": Acc@0.5 in %")
    parts = [f"# {title}", _grid(*comparison(bench, summary, name)), _grid(*details(bench, summary))]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(bench, summary))]) + "\n"


def scores_table(summary: dict, bench: Bench = BENCHES[""]) -> str:
    """`details` for the terminal; of boxes task, records, Acc@0.5 and mean IoU."""
    columns, rows = details(bench, summary)
    shown = (0, 1) if bench.module else (0, 1, 3, 7)
    return align([[row[i] for i in shown] for row in [columns, *rows]])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Cells as text in columns, the first one flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _interval(scores: dict | None) -> str:
    if not scores or "interval" not in scores:
        return ABSENT
    low, high = scores["interval"][REPORTED]
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    left = min(2, len(columns) - 1)
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Escape text for a Markdown cell: a task or a folder may have any name."""
    escaped = "".join(f"\\{c}" if c in r"\`*[]<>|" else c for c in text)
    return " ".join(escaped.split())


def choose_cases(cases: Sequence[Case], count: int, seed: int) -> list[tuple[str, list[Case]]]:
    """The worst, the best and random cases, `count` each and none twice; worst and best alternate among the tasks."""
    left = list(cases)
    sections = []
    for name, sign in (("Worst", 1), ("Best", -1)):
        turns = defaultdict(itertools.count)  # by task: each task's first case, then each task's second, and so on
        left.sort(key=lambda case: sign * case[0]["iou"])
        left.sort(key=lambda case: next(turns[case[0]["task"]]))
        sections.append((name, left[:count]))
        left = left[count:]
    return [*sections, ("Random", random.Random(seed).sample(left, min(count, len(left))))]


def render_page(
    bench: Bench, summary: dict, cases: Sequence[Case], *, name: str, skipped: Sequence[str], count: int, seed: int
) -> str:
    """Render the page's HTML; all text from the model or the records is escaped.

    Args:
        skipped: the reasons why records have no answer.
        count: cases in each section.
    """
    sections = [(title, [_fields(*c) for c in chosen]) for title, chosen in choose_cases(cases, count, seed) if chosen]
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


def _fields(answer: dict, example: Example) -> dict:
    """The template's values of a case. If an image cannot be loaded, a message replaces the picture."""
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
        "final": (before + after).strip(),
        "verdict": "hit" if answer["iou"] > 0.5 else "miss",
        "gold_text": box_text(answer["gold"]),
        "box_text": box_text(answer["box"]) if answer["box"] else "no box found",
    }

"""Scores as tables: for the terminal, and in Markdown beside the published rows."""

from collections.abc import Mapping, Sequence

from .benches import Bench

ABSENT = "–"


def table(summary: dict) -> str:
    """Task, records, Acc@0.5 and mean IoU as text."""
    rows = [f"{'task':<18}{'records':>8}{'Acc@0.5':>9}{'mean IoU':>10}"]
    for task, t in summary["tasks"].items():
        rows.append(f"{task:<18}{t['count']:>8}{100 * t['accuracy_at_0.5']:>9.2f}{t['mean_iou']:>10.3f}")
    rows.append(
        f"{'mean':<18}{summary['count']:>8}{100 * summary['accuracy_at_0.5']:>9.2f}{summary['mean_iou']:>10.3f}"
    )
    return "\n".join(rows)


def comparison(bench: Bench, summary: dict, name: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows in % Acc@0.5: the published ones, then `name`'s with its interval, if there is one.

    The average is there where every published column is; a benchmark without published rows has its tasks as columns.
    """
    tasks = list(bench.columns) or bench.ordered(summary["tasks"])
    columns = ["model", "from", *(bench.columns.get(task, task) for task in tasks), "AVG"]
    rows = [
        [model, published.name, *(f"{value:.2f}" for value in values)]
        for published in bench.published
        for model, values in published.rows.items()
    ]
    whole = summary["tasks"].keys() == set(tasks)
    scored = [summary["tasks"].get(task) for task in tasks] + [summary if whole else None]
    rows.append([name, "this run", *(f"{100 * s['accuracy_at_0.5']:.2f}" if s else ABSENT for s in scored)])
    if "interval" in summary:
        ranges = [s and s["interval"]["accuracy_at_0.5"] for s in scored]
        rows.append(["", "95 % interval", *(f"{100 * r[0]:.1f}–{100 * r[1]:.1f}" if r else ABSENT for r in ranges)])
    return columns, rows


def details(bench: Bench, summary: dict) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of every measure, task by task and their mean; accuracies in %."""
    columns = ["task", "records", "Acc@0.3", "Acc@0.5", "95 % interval", "IoU ≥ 0.5", "Acc@0.7", "mean IoU"]
    rows = []
    named = [(t, summary["tasks"][t]) for t in bench.ordered(summary["tasks"])] + [("mean over tasks", summary)]
    for task, s in named:
        low, high = s.get("interval", {}).get("accuracy_at_0.5", (None, None))
        rows.append(
            [
                task,
                str(s["count"]),
                f"{100 * s['accuracy_at_0.3']:.2f}",
                f"{100 * s['accuracy_at_0.5']:.2f}",
                ABSENT if low is None else f"{100 * low:.1f}–{100 * high:.1f}",
                f"{100 * s['accuracy_at_least_0.5']:.2f}",
                f"{100 * s['accuracy_at_0.7']:.2f}",
                f"{s['mean_iou']:.3f}",
            ]
        )
    return columns, rows


def notes(bench: Bench, summary: dict) -> list[str]:
    """What a reader of the tables has to know."""
    said = [f"{summary['count']} records scored, {summary['skipped']} skipped."]
    if bench.published:
        said.append(
            "Published rows are the paper's, on its own records. Acc@0.5 counts an IoU above 0.5, the paper's words; "
            f"its scorer counts 0.5 too: the mean here is then {100 * summary['accuracy_at_least_0.5']:.2f}."
        )
    if "interval" in summary:
        said.append(
            "Intervals are percentiles of a bootstrap over the records of each task; the tasks stay as they are."
        )
    return said


def markdown(bench: Bench, summary: dict, name: str) -> str:
    """`comparison`, `details` and `notes` as a Markdown page."""
    parts = [f"# {_cell(bench.title)}: Acc@0.5 in %", _grid(*comparison(bench, summary, name))]
    parts += [_grid(*details(bench, summary)), "\n".join(f"- {note}" for note in notes(bench, summary))]
    return "\n\n".join(parts) + "\n"


def percentages(summary: dict) -> str:
    """Task and score in %, of a benchmark that is not one of boxes, as text."""
    rows = summary["tasks"] | {"mean": summary["mean"]}
    return "\n".join(f"{task:<40}{score:>8.2f}" for task, score in rows.items())


def one_number(title: str, name: str, summary: dict, published: Mapping[str, float]) -> str:
    """The mean beside the published ones, and the tasks, of a benchmark that is not one of boxes, in Markdown."""
    compared = [[model, "published", f"{value:.2f}"] for model, value in published.items()]
    compared.append([name, "this run", f"{summary['mean']:.2f}"])
    tasks = [[task, "this run", f"{score:.2f}"] for task, score in summary["tasks"].items()]
    parts = [f"# {_cell(title)}", _grid(["model", "from", "mean"], compared), _grid(["task", "from", "score"], tasks)]
    return "\n\n".join([*parts, f"- {summary['skipped']} records skipped."]) + "\n"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * 2 + ["---:"] * (len(columns) - 2), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup: a task or a folder may be called anything."""
    escaped = "".join(f"\\{c}" if c in r"\`*[]<>|" else c for c in text)
    return " ".join(escaped.split())

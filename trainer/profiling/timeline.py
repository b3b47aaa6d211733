"""A profile as ranges and the work launched inside them: where a step's time goes, range by range.

`chrome_trace.py` reads a `Timeline` from torch's file, the benchmark from nsys's. Work belongs to the ranges that were
open when the host launched it, by any thread (the backward pass has its own) and whenever the GPU ran it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

STEP = "step"  # name of the outermost range
SEPARATOR = " > "


class Range(NamedTuple):
    """A range of the host, in seconds. The title's first word is its name, the rest are sizes."""

    title: str
    start: float
    end: float


class Work(NamedTuple):
    """An operator or a kernel, in seconds: when the host launched it, when it ran, and its own time."""

    name: str
    launched: float
    start: float
    end: float
    busy: float


class Timeline(NamedTuple):
    """`on_gpu`: work is kernels and copies; otherwise operators, which are launched when they run."""

    ranges: list[Range]
    work: list[Work]
    on_gpu: bool


@dataclass
class Row:
    """A row of the table. Seconds and launches are means of a step and include the ranges inside."""

    name: str  # with the names of the ranges around it: step > rollout > decode
    titles: list[str]  # the range's different titles, with sizes
    seconds: float = 0.0  # of the host
    samples: list[float] = field(default_factory=list)  # the host's seconds of each step
    launches: float = 0.0
    gpu_seconds: float | None = None  # from the first kernel's begin to the last one's end
    gpu_samples: list[float] = field(default_factory=list)  # the same of each step
    idle_seconds: float | None = None  # of the host's seconds, those in which the GPU ran nothing
    top: list[tuple[str, float]] = field(default_factory=list)  # names of work and their shares of the range's work

    @property
    def depth(self) -> int:
        return self.name.count(SEPARATOR)


class _Visit(NamedTuple):
    """One occurrence of a range, and the work that was launched during it."""

    name: str  # as in `Row`
    range: Range
    work: list[Work]


def rows(timeline: Timeline, top: int = 3) -> list[Row]:
    """A row for each name of a range, in the order in which they first begin; means over the steps.

    Raises:
        ValueError: no range called `step` is there.
    """
    visits = _visits(timeline)
    steps = sum(visit.name == STEP for visit in visits)
    if not steps:
        raise ValueError("the profile holds no range called step. Record whole steps of a loop, with --profile_steps.")
    found: dict[str, Row] = {}
    spent: dict[str, Counter[str]] = {}
    step = -1
    for visit, busy in zip(visits, _busy_seconds(timeline.work, visits)):
        step += visit.name == STEP
        if visit.name not in found:
            found[visit.name], spent[visit.name] = Row(visit.name, [], samples=[0.0] * steps), Counter()
        row, seconds = found[visit.name], visit.range.end - visit.range.start
        if visit.range.title not in row.titles:
            row.titles.append(visit.range.title)
        row.samples[step] += seconds
        row.launches += len(visit.work) / steps
        for work in visit.work:
            spent[visit.name][work.name] += work.busy
        if timeline.on_gpu:
            row.gpu_samples = row.gpu_samples or [0.0] * steps
            if visit.work:
                row.gpu_samples[step] += max(w.end for w in visit.work) - min(w.start for w in visit.work)
            row.idle_seconds = (row.idle_seconds or 0.0) + (seconds - busy) / steps
    for name, row in found.items():
        row.seconds = sum(row.samples) / steps
        row.gpu_seconds = sum(row.gpu_samples) / steps if timeline.on_gpu else None
        total = sum(spent[name].values())
        row.top = [(work, seconds / total) for work, seconds in spent[name].most_common(top) if total]
    return list(found.values())


def _visits(timeline: Timeline) -> list[_Visit]:
    """The ranges of steps by their begin, each with the work that was launched in it."""
    visits, open_now = [], []
    events = [(r.start, 0, -r.end, r) for r in timeline.ranges] + [(w.launched, 1, 0.0, w) for w in timeline.work]
    for time, is_work, _, event in sorted(events, key=lambda event: event[:3]):
        while open_now and open_now[-1].range.end <= time:
            open_now.pop()
        if is_work:
            for visit in open_now:
                visit.work.append(event)
            continue
        name = event.title.split(" ")[0]
        if open_now or name == STEP:
            open_now.append(_Visit(SEPARATOR.join([*(v.name for v in open_now[-1:]), name]), event, []))
            visits.append(open_now[-1])
    return visits


def _busy_seconds(work: Sequence[Work], visits: Sequence[_Visit]) -> np.ndarray:
    """For each visit, the seconds of its range in which anything ran."""
    if not work:
        return np.zeros(len(visits))
    start, end = np.array(sorted((w.start, w.end) for w in work)).T
    end = np.maximum.accumulate(end)
    after_pause = np.append(True, start[1:] > end[:-1])
    start, end = start[after_pause], end[np.append(after_pause[1:], True)]  # of each period without a pause
    busy = np.cumsum(end - start)
    edges, before = np.stack([start, end], 1).ravel(), np.stack([busy - (end - start), busy], 1).ravel()
    first, last = np.interp(np.array([[v.range.start, v.range.end] for v in visits]), edges, before).T
    return last - first


def title(row: Row) -> str:
    """The range as the table shows it: with its sizes, or their count. A step's number is not a size."""
    name = row.titles[0].split(" ")[0]
    if name == STEP:
        return name
    return row.titles[0] if len(row.titles) == 1 else f"{name}, {len(row.titles)} sizes"


def table(found: Sequence[Row], floors: Mapping[str, Mapping] | None = None) -> str:
    """Markdown: a line for each range, those inside it below it and indented.

    Args:
        floors: by `Row.name`, the range's least traffic `gbytes` and least time `floor_s`. The table shows that time as
            a share of the time taken, the GPU's where there is one: 100 means as fast as the floor.
    """
    whole = next(row for row in found if row.name == STEP)
    on_gpu = whole.gpu_seconds is not None
    heads = ["range", "ms", "share", "kernels and copies" if on_gpu else "operator calls"]
    heads += ["GPU ms", "GPU idle, ms"] if on_gpu else ["GPU idle"]
    heads += ["MB at least", "% of floor"] * (floors is not None) + ["most time in"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found:
        share = row.gpu_seconds / whole.gpu_seconds if whole.gpu_seconds else row.seconds / whole.seconds
        cells = ["&emsp;" * row.depth + title(row), f"{1e3 * row.seconds:.1f}", f"{share:.0%}", f"{row.launches:.0f}"]
        cells += [f"{1e3 * row.gpu_seconds:.1f}", f"{1e3 * row.idle_seconds:.1f}"] if on_gpu else ["n/a"]
        if floors is not None:
            least = floors.get(row.name)
            taken = row.gpu_seconds or row.seconds
            percent = round(100 * least["floor_s"] / taken) if least and taken else 0
            cells += [f"{1e3 * least['gbytes']:.0f}", f"{percent}"] if least else ["", ""]
        cells.append(", ".join(f"{shorten(name)} {share:.0%}" for name, share in row.top))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shorten(name: str, most: int = 48) -> str:
    """A kernel's name without arguments and template parameters, at most `most` characters."""
    bare = (name.removeprefix("void ").split("<")[0].split("(")[0].strip() or name).replace("|", "/")
    return bare if len(bare) <= most else bare[: most - 3] + "..."

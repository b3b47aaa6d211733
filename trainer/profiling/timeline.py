"""A profile as ranges and the work launched inside them: where a step's time goes, range by range.

A reader makes a `Timeline` of a file (`chrome_trace.py`; the benchmark's for nsys). Work belongs to the innermost range
that was open when the host launched it, whichever of its threads did: the backward pass has one of its own. So it does
not matter when a GPU came to run it.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

STEP = "step"  # name of the outermost range
SEPARATOR = " > "


class Range(NamedTuple):
    """A named range of the host, in seconds. The title's first word is the name, the rest are sizes."""

    title: str
    start: float
    end: float


class Work(NamedTuple):
    """An operator or a kernel: when the host launched it, when it ran and for how long by itself, in seconds."""

    name: str
    launched: float
    start: float
    end: float
    busy: float


class Timeline(NamedTuple):
    """`on_gpu`: work is kernels and copies; else operators, run where they are called."""

    ranges: list[Range]
    work: list[Work]
    on_gpu: bool


@dataclass
class Row:
    """A range of the table; seconds and launches are those of a step, and include the ranges inside."""

    name: str  # with the names of the ranges around it: step > rollout > decode
    titles: list[str]  # names with sizes as seen, the first few
    seconds: float = 0.0  # of the host
    samples: list[float] = field(default_factory=list)  # the host's seconds of each step
    launches: float = 0.0
    gpu_seconds: float | None = None  # from the first kernel's begin to the last one's end
    gpu_samples: list[float] = field(default_factory=list)  # the same of each step
    idle_seconds: float | None = None  # of the host's, those in which the GPU ran nothing at all
    top: list[tuple[str, float]] = field(default_factory=list)  # work and its share of all the work in the range

    @property
    def depth(self) -> int:
        return self.name.count(SEPARATOR)


class _Visit(NamedTuple):
    """One time that a range was open, and what was open around it."""

    range: Range
    around: "_Visit | None"
    name: str


def rows(timeline: Timeline, top: int = 3) -> list[Row]:
    """A row for each range in the order of its first begin, sizes aside; means over the steps seen.

    Raises:
        ValueError: no range called `step` is there.
    """
    visits = _nested(timeline.ranges)
    steps = sum(visit.name == STEP for visit in visits)
    if not steps:
        raise ValueError("the profile holds no range called step. Record whole steps of a loop, with --profile_steps.")
    inside: dict[int, list[Work]] = defaultdict(list)  # by id of the visit
    for work, innermost in zip(timeline.work, _open_at(visits, [w.launched for w in timeline.work]), strict=True):
        while innermost is not None:
            inside[id(innermost)].append(work)
            innermost = innermost.around
    busy_before = _busy_before(timeline.work)
    found: dict[str, Row] = {}
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    step = -1
    for visit in visits:
        step += visit.name == STEP
        row = found.setdefault(visit.name, Row(visit.name, [], samples=[0.0] * steps))
        seconds = visit.range.end - visit.range.start
        if visit.range.title not in row.titles:
            row.titles.append(visit.range.title)
        row.samples[step] += seconds
        mine = inside[id(visit)]
        row.launches += len(mine) / steps
        for work in mine:
            spent[visit.name][work.name] += work.busy
        if timeline.on_gpu:
            reach = max(w.end for w in mine) - min(w.start for w in mine) if mine else 0.0
            idle = seconds - (busy_before(visit.range.end) - busy_before(visit.range.start))
            row.gpu_samples = row.gpu_samples or [0.0] * steps
            row.gpu_samples[step] += reach
            row.idle_seconds = (row.idle_seconds or 0.0) + idle / steps
    for name, row in found.items():
        row.seconds = sum(row.samples) / steps
        row.gpu_seconds = sum(row.gpu_samples) / steps if timeline.on_gpu else None
        total = sum(spent[name].values())
        row.top = [(work, seconds / total) for work, seconds in spent[name].most_common(top) if total]
    return list(found.values())


def _nested(ranges: Iterable[Range]) -> list[_Visit]:
    """The ranges with what each lies in, by their begin. Those outside of every step are left out."""
    visits: list[_Visit] = []
    around: _Visit | None = None
    for r in sorted(ranges, key=lambda r: (r.start, -r.end)):
        while around is not None and around.range.end <= r.start:
            around = around.around
        name = r.title.split(" ")[0]
        if around is None and name != STEP:
            continue
        around = _Visit(r, around, name if around is None else around.name + SEPARATOR + name)
        visits.append(around)
    return visits


def _open_at(visits: Sequence[_Visit], times: Sequence[float]) -> list[_Visit | None]:
    """The innermost range that is open at each of the times."""
    edges: list[tuple[float, _Visit | None]] = []  # from here on this one is the innermost
    around: _Visit | None = None
    for visit in visits:
        while around is not None and around is not visit.around:
            edges.append((around.range.end, around.around))
            around = around.around
        edges.append((visit.range.start, visit))
        around = visit
    while around is not None:
        edges.append((around.range.end, around.around))
        around = around.around
    starts = [at for at, _ in edges]
    return [edges[i - 1][1] if (i := bisect_right(starts, time)) else None for time in times]


def _busy_before(work: Sequence[Work]):
    """A function of time: the seconds before it in which anything ran."""
    merged: list[list[float]] = []
    for w in sorted(work, key=lambda w: w.start):
        if merged and w.start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], w.end)
        else:
            merged.append([w.start, w.end])
    starts, sums = [start for start, _ in merged], [0.0]
    for start, end in merged:
        sums.append(sums[-1] + end - start)

    def before(time: float) -> float:
        i = bisect_right(starts, time)
        return sums[i] - max(0.0, merged[i - 1][1] - time) if i else 0.0

    return before


def title(row: Row) -> str:
    """The range as the table shows it: with its sizes, or how many there were. A step's number is none."""
    name = row.titles[0].split(" ")[0]
    if name == STEP:
        return name
    return row.titles[0] if len(row.titles) == 1 else f"{name}, {len(row.titles)} sizes"


def table(found: Sequence[Row], on_gpu: bool, floors: Mapping[str, Mapping] | None = None) -> str:
    """Markdown: a line for each range, those inside it below it and set in.

    Args:
        floors: by `Row.name`, its `gbytes` and `floor_s`, the least that it moves and takes.
    """
    whole = next(row for row in found if row.name == STEP)
    heads = ["range", "ms", "share", "kernels and copies" if on_gpu else "operator calls"]
    heads += ["GPU ms", "GPU idle, ms"] if on_gpu else ["GPU idle"]
    heads += ["MB at least", "% of floor"] * (floors is not None) + ["most time in"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found:
        share = row.gpu_seconds / whole.gpu_seconds if on_gpu and whole.gpu_seconds else row.seconds / whole.seconds
        cells = ["&emsp;" * row.depth + title(row), f"{1e3 * row.seconds:.1f}", f"{share:.0%}"]
        cells.append(f"{row.launches:.0f}")
        cells += [f"{1e3 * row.gpu_seconds:.1f}", f"{1e3 * row.idle_seconds:.1f}"] if on_gpu else ["n/a"]
        if floors is not None:
            least = floors.get(row.name)
            cells += [f"{1e3 * least['gbytes']:.0f}", f"{percent_of_floor(row, least)}"] if least else ["", ""]
        cells.append(", ".join(f"{short(name)} {share:.0%}" for name, share in row.top))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent_of_floor(row: Row, least: Mapping) -> int:
    """The floor as a share of the time taken, on the GPU where there is one: 100 is as fast as the machine allows."""
    taken = row.gpu_seconds if row.gpu_seconds else row.seconds
    return round(100 * least["floor_s"] / taken) if taken else 0


def short(name: str, most: int = 48) -> str:
    """A kernel's name without its arguments and templates' insides, as far as a column reaches."""
    bare = name.removeprefix("void ").split("<")[0].split("(")[0].strip() or name
    bare = bare.replace("|", "/")
    return bare if len(bare) <= most else bare[: most - 3] + "..."

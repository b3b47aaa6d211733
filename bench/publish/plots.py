"""The plots of a device's record. A file holds the digest of its data, by which `stale` finds it without drawing."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from boxgrpo.bench.machine import describe
from boxgrpo.bench.peers import NAMES
from boxgrpo.bench.records import part
from boxgrpo.bench.step_bench.run import PHASES

from .tables import sizes

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "ytick.labelsize": 8,
}
COLOURS = {"boxgrpo": "#1f5fbf", "eager": "#8a8a8a", "compile": "#d9822b", "liger": "#2f8f4e", "trl": "#b03a68"}
COLOURS |= {"boxgrpo, overwriting": "#6fa8ff", "one read": "#3a3a3a", "ours": "#1f5fbf", "univg_r1": "#11808a"}
OTHER = "#7a5cc7"  # of a peer without a colour of its own
LEAST_MB = 16  # of a kernel whose memory is drawn


@dataclass(frozen=True)
class Plot:
    """`draw` makes a figure of the parts; it is called only where `shows` is true of them."""

    title: str
    parts: tuple[str, ...]
    draw: Callable[[dict], Figure]
    shows: Callable[[dict], bool] = lambda parts: True

    def data(self, record: dict) -> dict | None:
        """The parts that it shows, or None where the record has nothing to show."""
        found = {name: part(record, name) for name in self.parts if record.get(name, {}).get("rows")}
        return found if found and self.shows(found) else None


def shown(record: dict) -> dict[str, Plot]:
    """The plots that the record has values for, by file."""
    return {name: plot for name, plot in PLOTS.items() if plot.data(record) is not None}


def draw(record: dict, folder: Path) -> None:
    """Every plot that the record has values for."""
    for name, plot in shown(record).items():
        data = plot.data(record)
        with rc_context(STYLE):
            figure = plot.draw(data)
            figure.suptitle(plot.title)
            figure.supxlabel(caption(data), fontsize=7, color="#555555")
            figure.savefig(folder / name, metadata={"Description": _digest(data)})


def stale(record: dict, folder: Path) -> list[str]:
    """Names of plots that are missing or show other values."""
    found = []
    for name, plot in shown(record).items():
        if not (folder / name).exists():
            found.append(f"{name}, which is missing")
            continue
        with Image.open(folder / name) as image:
            if image.info.get("Description") != _digest(plot.data(record)):
                found.append(name)
    return found


def caption(data: dict) -> str:
    return "; ".join(dict.fromkeys(describe(measured["machine"]) for measured in data.values()))


def _digest(data: dict) -> str:
    return "data " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _case(row: dict) -> str:
    return f"{row['op']} {sizes(row['shape'])}"


def draw_roofline(data: dict) -> Figure:
    """FLOP a second of each side by case, in the order of FLOP a byte, and the most that the machine allows."""
    ceilings = data["kernels"]["ceilings"]
    rows = [row for row in data["kernels"]["rows"] if "calls" not in row["shape"]]  # those time the host alone
    peak, bandwidth = ceilings["flop_per_second"], ceilings["bytes_per_second"]
    intensities = {_case(row): row["flop"] / row["bytes"] for row in sorted(rows, key=lambda r: r["flop"] / r["bytes"])}
    places, roof = list(intensities), [min(peak, bandwidth * x) for x in intensities.values()]
    figure = Figure(figsize=(11, 1.8 + 0.45 * len(places)))
    axes = figure.subplots()
    label = f"roof of {bandwidth / 1e9:.3g} GB/s and {peak / 1e9:.4g} GFLOP/s, measured"
    axes.plot(roof, range(len(roof)), "|", color="black", markersize=20, markeredgewidth=2, label=label)
    for side in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == side]
        rates, at = [1e3 * r["flop"] / r["ms"] for r in mine], [places.index(_case(r)) for r in mine]
        axes.plot(rates, at, "o", color=COLOURS.get(side, OTHER), alpha=0.8, label=NAMES.get(side, side))
    axes.set_yticks(range(len(places)), [f"{case}\n{x:.3g} FLOP a byte" for case, x in intensities.items()])
    axes.set(xscale="log", xlabel="FLOP of the method a second, the same count for every side")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, markerscale=0.6)  # below stands the machine
    return figure


def draw_phases(data: dict) -> Figure:
    """Of each case our step's seconds by phase, and the floor in each."""
    rows = [row for row in data["step"]["rows"] if "phases" in row]
    columns = min(3, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for row, axes in zip(rows, grid):
        phases = {name.replace("_", " "): row["phases"][name] for name in PHASES if name in row["phases"]}
        seconds = [phase["seconds"] for phase in phases.values()]
        bars = axes.barh(list(phases), seconds, color=COLOURS["ours"], label="measured")
        axes.bar_label(bars, [f" {1e3 * value:.0f} ms" for value in seconds], fontsize=8)
        least = [phase.get("floor_s", 0.0) for phase in phases.values()]
        axes.barh(list(phases), least, color="#f2b134", height=0.35, label="least time")
        axes.set_title(f"{row['case']}: {sum(seconds):.2f} s", fontsize=7.5)
        axes.set(xlabel="seconds", xlim=(0, 1.18 * max(seconds)))
    for axes in grid:  # those left over
        axes.set_visible(False)
    figure.axes[0].invert_yaxis()  # which they share: the first phase on top
    figure.axes[0].legend(loc="lower right")
    return figure


def draw_growth(data: dict) -> Figure:
    """By size our step's seconds, every sample, and the line through the fastest."""
    grown = {size: g for size, g in data["step"]["growth"].items() if "values" in g}
    figure = Figure(figsize=(3.1 * len(grown), 3.6))
    grid = figure.subplots(1, len(grown), squeeze=False)[0]
    for axes, (size, g) in zip(grid, grown.items()):
        axes.axline((0, g["fixed_s"]), slope=g["each_s"], color="#999999", linewidth=1.2)
        for x, samples in zip(g["values"], g.get("samples_s", [])):
            axes.plot([x] * len(samples), samples, "o", color=COLOURS["ours"], alpha=0.3, markersize=4)
        axes.plot(g["values"], g["seconds"], "o", color=COLOURS["ours"])
        axes.set(title=f"{1e3 * g['each_s']:.1f} ms each, misfit {g['misfit_percent']:.0f} %", xlabel=size)
        axes.set(xlim=(0, None), ylim=(0, 1.15 * max(g["seconds"])))
    grid[0].set_ylabel("seconds")
    return figure


def _peaks(data: dict) -> dict[str, dict[str, dict[str, float]]]:
    """panel -> case -> side -> MB, of each step and of each kernel where any takes more than LEAST_MB."""
    steps, kernels = {}, {}
    for row in data.get("step", {}).get("rows", []):
        steps[row["case"]] = {k.removesuffix("_peak_mb"): v for k, v in row.items() if k.endswith("_peak_mb") and v}
    for row in data.get("kernels", {}).get("rows", []):
        if row["peak_mb"] is not None:
            kernels.setdefault(_case(row), {})[row["implementation"]] = row["peak_mb"]
    panels = {
        "a step: peak above the loaded model": {case: peaks for case, peaks in steps.items() if peaks},
        "a kernel: peak beyond its inputs": {c: p for c, p in kernels.items() if max(p.values()) > LEAST_MB},
    }
    return {title: cases for title, cases in panels.items() if cases}


def draw_memory(data: dict) -> Figure:
    """A bar for each side of each case, MB; cases one above the other."""
    panels = _peaks(data)
    heights = [sum(len(peaks) + 1 for peaks in cases.values()) for cases in panels.values()]
    figure = Figure(figsize=(10, 0.17 * sum(heights) + 1.6))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, cases) in zip(grid, panels.items()):
        y, ticks = 0, {}
        for case, peaks in cases.items():
            bars = axes.barh(range(y, y + len(peaks)), peaks.values(), color=[COLOURS.get(s, OTHER) for s in peaks])
            axes.bar_label(bars, [f" {NAMES.get(s, s)} {mb:.0f}" for s, mb in peaks.items()], fontsize=6.5)
            ticks[case.replace(", ", ",\n", 1)] = y + (len(peaks) - 1) / 2
            y += len(peaks) + 1
        axes.set_yticks(list(ticks.values()), list(ticks), fontsize=7)
        axes.margins(x=0.2, y=0)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="MB")
    return figure


def _has_phases(parts: dict) -> bool:
    return any("phases" in row for row in parts["step"]["rows"])


GROWTH = "How our step grows with each size, the others as in the first row"
PLOTS = {
    "roofline.png": Plot("Kernels under the machine's roof", ("kernels",), draw_roofline),
    "phases.png": Plot("Where our step's time goes, and the least it must take", ("step",), draw_phases, _has_phases),
    "growth.png": Plot(GROWTH, ("step",), draw_growth, lambda parts: "growth" in parts["step"]),
    "memory.png": Plot("Memory", ("step", "kernels"), draw_memory, lambda parts: bool(_peaks(parts))),
}

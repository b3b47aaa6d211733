"""The plots of a device's record: what each shows, as plain values, and how it is drawn.

A plot holds the digest of its values, so that a record which has moved on is noticed without drawing.
"""

import hashlib
import json
import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from boxgrpo.bench.machine import describe
from boxgrpo.bench.peers import NAMES
from boxgrpo.bench.records import part
from boxgrpo.bench.step_bench.run import PHASES

from .tables import sizes

COLOURS = {"boxgrpo": "#1f5fbf", "eager": "#8a8a8a", "compile": "#d9822b", "liger": "#2f8f4e", "trl": "#b03a68"}
COLOURS |= {"boxgrpo, overwriting": "#6fa8ff", "one read": "#3a3a3a", "ours": "#1f5fbf"}
OTHER = ("#7a5cc7", "#11808a", "#a0522d")  # peers without a colour of their own


@dataclass(frozen=True)
class Plot:
    """`data` gives None where the record has nothing to show."""

    title: str
    part: str  # empty: of several
    data: Callable[[dict], dict | None]
    draw: Callable[[dict], Figure]


def draw(record: dict, folder: Path) -> None:
    """Every plot that the record has values for."""
    for name, plot in PLOTS.items():
        if (data := plot.data(record)) is not None:
            figure = plot.draw(data)
            figure.suptitle(plot.title)
            figure.supxlabel(data["caption"], fontsize=7, color="#555555")
            figure.savefig(folder / name, dpi=120, metadata={"Description": _digest(data)})


def stale(record: dict, folder: Path) -> list[str]:
    """Names of plots that are missing or show other values."""
    found = []
    for name, plot in PLOTS.items():
        if (data := plot.data(record)) is None:
            continue
        if not (folder / name).exists():
            found.append(f"{name}, which is missing")
            continue
        with Image.open(folder / name) as image:
            if image.info.get("Description") != _digest(data):
                found.append(name)
    return found


def _digest(data: dict) -> str:
    return "data " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _measured(record: dict, name: str) -> tuple[dict, dict]:
    """A part, and what each plot of it begins with."""
    measured = part(record, name)
    return measured, {"caption": describe(measured["machine"])}


def _colour(side: str) -> str:
    return COLOURS.get(side) or OTHER[sum(side.encode()) % len(OTHER)]


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


# -- roofline ---------------------------------------------------------------------------------------------------------


def roofline(record: dict) -> dict | None:
    """By floor (bytes, FLOP) the cases: FLOP a byte, and FLOP a second of each implementation."""
    if not record.get("kernels", {}).get("rows"):
        return None
    measured, data = _measured(record, "kernels")
    cases: dict[str, dict] = {}
    for r in measured["rows"]:
        values = {"floor": r["floor_is"], "intensity": round(r["flop"] / r["bytes"], 4), "achieved": {}}
        case = cases.setdefault(f"{r['op']} {sizes(r['shape'])}", values)
        case["achieved"][r["implementation"]] = round(1e3 * r["flop"] / r["ms"])
    return data | {"ceilings": measured["ceilings"], "cases": cases}


def _draw_roofline(data: dict) -> Figure:
    floors = [floor for floor in ("bytes", "flop") if any(c["floor"] == floor for c in data["cases"].values())]
    letters = dict(zip(data["cases"], string.ascii_letters[26:] + string.ascii_letters[:26]))  # A-Z, then a-z
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    grid = figure.subplots(1, len(floors), sharey=True, squeeze=False)[0]
    sides = list(dict.fromkeys(side for case in data["cases"].values() for side in case["achieved"]))
    peak, bandwidth = (data["ceilings"][key] for key in ("flop_per_second", "bytes_per_second"))
    for axes, floor in zip(grid, floors):
        cases = {name: case for name, case in data["cases"].items() if case["floor"] == floor}
        low, high = (f(c["intensity"] for c in cases.values()) for f in (min, max))
        ends = [low / 1.5, high * 1.5]
        if ends[0] < (ridge := peak / bandwidth) < ends[1]:
            ends.insert(1, ridge)
        axes.plot(ends, [min(peak, bandwidth * x) for x in ends], color="black", linewidth=1.5)
        axes.plot(ends, [peak] * len(ends), color="black", linewidth=0.8, linestyle="--")
        neighbours: list[float] = []
        for name, case in cases.items():
            beside = sum(abs(math.log(case["intensity"] / x)) < 0.01 for x in neighbours)  # not on top of each other
            neighbours.append(case["intensity"])
            for side, rate in case["achieved"].items():
                x = case["intensity"] * 1.07**beside * 1.012 ** sides.index(side)
                axes.plot(x, rate, linestyle="", marker=f"${letters[name]}$", markersize=8, color=_colour(side))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks := _apart(sorted({c["intensity"] for c in cases.values()})), [f"{x:.3g}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel("FLOP a byte; letters of one value stand side by side")
        axes.set_title(f"least time set by {'bytes' if floor == 'bytes' else 'FLOP'}", fontsize=10)
        _plain(axes)
    grid[0].set_ylabel("FLOP a second (counted, whoever computes)")
    grid[0].plot([], [], color="black", label=f"{bandwidth / 1e9:.3g} GB/s, {peak / 1e9:.4g} GFLOP/s, measured")
    for side in sides:
        grid[0].plot([], [], linestyle="", marker="s", color=_colour(side), label=NAMES.get(side, side))
    for name, letter in letters.items():
        grid[0].plot([], [], linestyle="", marker=f"${letter}$", color="black", label=name)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    return figure


def _apart(values: list[float]) -> list[float]:
    """Those that leave a tick's room to the one before."""
    kept: list[float] = []
    for value in values:
        if not kept or value > 1.15 * kept[-1]:
            kept.append(value)
    return kept


# -- a step -----------------------------------------------------------------------------------------------------------


def phases(record: dict) -> dict | None:
    """By row the seconds of its phases and their floors."""
    if "step" not in record:
        return None
    measured, data = _measured(record, "step")
    rows = {r["case"]: r["phases"] for r in measured["rows"] if "phases" in r}
    found = {case: {name: [p["seconds"], p.get("floor_s")] for name, p in of.items()} for case, of in rows.items()}
    return data | {"rows": found} if found else None


def _draw_phases(data: dict) -> Figure:
    columns = min(2, len(data["rows"]))
    lines = math.ceil(len(data["rows"]) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.6 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, (case, of) in zip(grid, data["rows"].items()):
        names = [name for name in PHASES if name in of]
        seconds = [of[name][0] for name in names]
        axes.barh(names, seconds, color=COLOURS["ours"], label="measured")
        known = [(name, of[name][1]) for name in names if of[name][1] is not None]
        axes.barh([n for n, _ in known], [s for _, s in known], color="#f2b134", height=0.35, label="least time")
        for y, value in enumerate(seconds):
            axes.text(value, y, f" {1e3 * value:.0f} ms", va="center", fontsize=8)
        axes.set_title(f"{case}: {sum(seconds):.2f} s", fontsize=8)
        axes.set_xlim(0, 1.18 * max(seconds))
        axes.set_xlabel("seconds", fontsize=8)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        _plain(axes)
    for axes in grid:
        axes.set_visible(False)
    axes = figure.axes[0]
    for each in figure.axes:
        each.set_ylim(len(PHASES) - 0.4, -0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def growth(record: dict) -> dict | None:
    """By size its values, seconds, samples where they were kept, and the line through them."""
    if not {"rows", "growth"} <= record.get("step", {}).keys():
        return None
    measured, data = _measured(record, "step")
    kept = ("values", "seconds", "samples_s", "fixed_s", "each_s", "misfit_percent")
    lines = {size: {key: g[key] for key in kept if key in g} for size, g in measured["growth"].items() if "values" in g}
    return {"caption": f"other sizes as in {measured['rows'][0]['case']}; {data['caption']}", "sizes": lines}


def _draw_growth(data: dict) -> Figure:
    figure = Figure(figsize=(3.1 * len(data["sizes"]), 3.6), layout="constrained")
    grid = figure.subplots(1, len(data["sizes"]), squeeze=False)[0]
    for axes, (size, g) in zip(grid, data["sizes"].items()):
        ends = [0, max(g["values"])]
        line = [g["fixed_s"] + g["each_s"] * x for x in ends]
        axes.plot(ends, line, color="#999999", linewidth=1.2)
        for x, samples in zip(g["values"], g.get("samples_s", [])):
            axes.plot([x] * len(samples), samples, "o", color=COLOURS["ours"], alpha=0.3, markersize=4)
        axes.plot(g["values"], g["seconds"], "o", color=COLOURS["ours"], markersize=6)
        axes.set_ylim(0, 1.15 * max(*g["seconds"], line[1]))
        axes.set_xlabel(size)
        axes.set_title(f"{1e3 * g['each_s']:.1f} ms each, misfit {g['misfit_percent']:.0f} %", fontsize=9)
        _plain(axes)
    grid[0].set_ylabel("seconds")
    return figure


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(record: dict) -> dict | None:
    """MB by side of each step, and by implementation of each kernel where any takes more than 16 MB."""
    machines = [describe(part(record, name)["machine"]) for name in ("step", "kernels") if name in record]
    data = {"caption": "; ".join(dict.fromkeys(machines)), "steps": {}, "kernels": {}}
    for r in record.get("step", {}).get("rows", []):
        peaks = {key.removesuffix("_peak_mb"): r[key] for key in r if key.endswith("_peak_mb") and r[key]}
        if peaks:
            data["steps"][r["case"]] = peaks
    for r in record.get("kernels", {}).get("rows", []):
        if r["peak_mb"] is not None:
            data["kernels"].setdefault(f"{r['op']} {sizes(r['shape'])}", {})[r["implementation"]] = r["peak_mb"]
    data["kernels"] = {case: peaks for case, peaks in data["kernels"].items() if max(peaks.values()) > 16}
    return data if data["steps"] or data["kernels"] else None


def _draw_memory(data: dict) -> Figure:
    panels = [(data[key], title) for key, title in PANELS.items() if data[key]]
    heights = [sum(len(peaks) + 1 for peaks in cases.values()) for cases, _ in panels]
    figure = Figure(figsize=(10, 0.17 * sum(heights) + 1.6), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (cases, title) in zip(grid, panels):
        y, ticks = 0, []
        for peaks in cases.values():
            ticks.append(y + (len(peaks) - 1) / 2)
            for side, mb in peaks.items():
                axes.barh(y, mb, color=_colour(side), height=0.9)
                axes.text(mb, y, f" {NAMES.get(side, side)} {mb:.0f}", va="center", fontsize=6.5)
                y += 1
            y += 1
        axes.set_ylim(y - 0.5, -1)
        axes.set_yticks(ticks, [case.replace(", ", ",\n", 1) for case in cases], fontsize=7)
        axes.set_xlim(0, 1.2 * max(mb for peaks in cases.values() for mb in peaks.values()))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("MB", fontsize=8)
        _plain(axes)
    return figure


PANELS = {"steps": "a step: peak above the loaded model", "kernels": "a kernel: peak beyond its inputs"}
PLOTS = {
    "roofline.png": Plot("Kernels under the machine's roof", "kernels", roofline, _draw_roofline),
    "phases.png": Plot("Where our step's time goes, and the least it must take", "step", phases, _draw_phases),
    "growth.png": Plot("How our step grows with each size", "step", growth, _draw_growth),
    "memory.png": Plot("Memory", "", memory, _draw_memory),
}

"""Judges runs of bench/soaks/soak.py that have ended: whether two are the same, what was lost, what grew."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from boxgrpo.trainer.runtime.files import read_lines

UNTIMED = ("timing_s/", "perf/", "step_time")  # what no two runs have in common
# Left out: what holds paths, the clock, or random states.
SKIPPED = ("manifest.json", "options.yaml", "metrics.jsonl", "rng-", "step_log.")


def metrics_of(path: Path) -> list[dict]:
    return list(read_lines([path / "metrics.jsonl"]))


def differences(one: Path, other: Path) -> list[str]:
    """Where the ends of two runs are not the same to the bit; empty when they are.

    Weights, samples and checkpoints byte by byte, without a checkpoint's options, bytes of metrics and random states;
    metrics without times.
    """
    a, b = _compared(one), _compared(other)
    found = sorted(name for name in a.keys() & b.keys() if a[name] != b[name])
    return found + [f"{name} is missing in one" for name in sorted(a.keys() ^ b.keys())]


def _compared(path: Path) -> dict[str, object]:
    """By name, what two runs must have in common."""
    found = {}
    for n, line in enumerate(metrics_of(path), start=1):
        found |= {f"metrics line {n}: {key}": value for key, value in line.items() if not key.startswith(UNTIMED)}
    for file in path.rglob("*"):
        if file.is_file() and not file.name.startswith(SKIPPED) and "tensorboard" not in file.parts:
            content = file.read_bytes()
            if file.name == "progress.json":
                content = json.loads(content)["progress"] | {"metrics_bytes": None}
            found[file.relative_to(path).as_posix()] = content
    return found


def lost_steps(metrics: list[dict], steps: int) -> list[int]:
    """Steps that are not exactly once in the metrics, or out of place."""
    got = [line["step"] for line in metrics]
    return [] if got == list(range(1, steps + 1)) else sorted({*range(1, steps + 1)} ^ {*got}) or got


def skipped_steps(metrics: list[dict]) -> list[int]:
    """Steps at which `skipped_steps` rises."""
    before = [0, *(line["skipped_steps"] for line in metrics)]
    return [line["step"] for line, was in zip(metrics, before) if line["skipped_steps"] != was]


def injected(path: Path) -> list[int]:
    """Steps at which a rank's loss was made NaN."""
    return sorted({line["step"] for line in read_lines(path.glob("step_log.rank*")) if "nan" in line})


def growth(sizes: Sequence[float]) -> dict:
    """Means of the fifths of a run, its peak, and the last fifth against the second: of 500 steps, the last 100
    against steps 100 to 200. Sizes in bytes, figures in MB."""
    fifths = [1e-6 * part.mean() for part in np.array_split(sizes, 5)]
    change = round(fifths[4] / fifths[1] - 1, 5)
    return {"fifths_mb": [round(x, 1) for x in fifths], "peak_mb": round(1e-6 * max(sizes), 1), "growth": change}


def memory(path: Path) -> dict[str, dict]:
    """Of each rank, of its anonymous part, and of its loader.

    The kernel may drop pages of libraries at any time, so that resident memory may shrink for reasons of its own.
    """
    found = {}
    for step_log in sorted(path.glob("step_log.rank*")):
        lines, rank = [line for line in read_lines([step_log]) if "resident" in line], step_log.name.split(".")[1]
        kinds = {rank: "resident", f"{rank} anonymous": "anonymous", f"{rank} loader": "loader"}
        found |= {name: growth([line[key] for line in lines]) for name, key in kinds.items()}
    return found


def demand(what: str, found: str, met: bool) -> dict:
    return {"demand": what, "found": found, "met": bool(met)}


def none_lost(metrics: list[dict], steps: int) -> dict:
    lost = lost_steps(metrics, steps)
    return demand("no step lost", f"{len(lost)} of {steps}", not lost)


def faulty_demands(path: Path, steps: int) -> list[dict]:
    """Those of a run with NaN losses and corrupt images."""
    metrics = metrics_of(path)
    skipped, nan, records = skipped_steps(metrics), injected(path), metrics[-1]["data/skipped"]
    return [
        none_lost(metrics, steps),
        demand("NaN steps skipped, no others", f"{len(skipped)} of {len(nan)}", skipped == nan and len(nan) > 0),
        demand("corrupt images passed over", f"{records:.0f} records", records > 0),
    ]

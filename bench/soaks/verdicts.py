"""Judges runs of bench/soaks/soak.py that have ended: whether two are the same, what was lost, what grew."""

import json
import statistics
from pathlib import Path

from boxgrpo.trainer.runtime.files import read_lines

UNTIMED = ("timing_s/", "perf/", "step_time")  # what no two runs have in common


def metrics_of(path: Path) -> list[dict]:
    return list(read_lines([path / "metrics.jsonl"]))


def _untimed(path: Path) -> list[dict]:
    """A run's metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if not k.startswith(UNTIMED)} for line in metrics_of(path)]


def differences(one: Path, other: Path) -> list[str]:
    """Where the ends of two runs are not the same to the bit; empty when they are.

    Weights, samples and checkpoints byte by byte, without a checkpoint's options, bytes of metrics and random states;
    metrics without times.
    """
    found, metrics = [], [_untimed(path) for path in (one, other)]
    for line, (a, b) in enumerate(zip(*metrics), start=1):
        found += [
            f"metrics line {line}: {k}" for k in sorted(a.keys() | b.keys()) if (k in a, a.get(k)) != (k in b, b.get(k))
        ]
    if len(metrics[0]) != len(metrics[1]):
        found.append("number of metrics lines")
    kept = [{f.relative_to(path).as_posix() for f in _compared(path)} for path in (one, other)]
    found += [f"{name} is missing in one" for name in sorted(kept[0] ^ kept[1])]
    return found + [name for name in sorted(kept[0] & kept[1]) if _content(one / name) != _content(other / name)]


def _compared(path: Path) -> list[Path]:
    skipped = ("manifest.json", "options.yaml", "metrics.jsonl")
    files = [f for f in path.rglob("*") if f.is_file() and f.name not in skipped]
    return [f for f in files if "tensorboard" not in f.parts and not f.name.startswith(("rng-", "diary."))]


def _content(path: Path):
    if path.name != "progress.json":
        return path.read_bytes()
    progress = json.loads(path.read_text())["progress"]
    return {k: v for k, v in progress.items() if k != "metrics_bytes"}


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
    return sorted({line["step"] for line in read_lines(path.glob("diary.rank*")) if "nan" in line})


def growth(sizes: list[float]) -> float:
    """Mean of the last fifth against that of the second: of 500 steps, the last 100 against steps 100 to 200."""
    part = max(1, len(sizes) // 5)
    return statistics.fmean(sizes[-part:]) / statistics.fmean(sizes[part : 2 * part]) - 1


def memory(path: Path) -> dict[str, dict]:
    """Of each rank, of its anonymous part, and of its loader: the mean of each fifth of the run in MB, peak and growth.

    The kernel may drop pages of libraries at any time, so that resident memory may shrink for reasons of its own.
    """
    found = {}
    for diary in sorted(path.glob("diary.rank*")):
        lines = [line for line in read_lines([diary]) if "resident" in line]
        rank = diary.name.split(".")[1]
        kinds = {rank: "resident", f"{rank} anonymous": "anonymous", f"{rank} loader": "loader"}
        for name, key in kinds.items():
            sizes = [line[key] / 1e6 for line in lines]
            part = max(1, len(sizes) // 5)
            fifths = [round(statistics.fmean(sizes[i : i + part]), 1) for i in range(0, 5 * part, part)]
            found[name] = {"fifths_mb": fifths, "peak_mb": round(max(sizes), 1), "growth": round(growth(sizes), 5)}
    return found

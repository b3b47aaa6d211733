"""What bench/soaks/soak.py says of runs that have ended: whether two are the same, what was lost, what grew."""

import json
import statistics
from pathlib import Path

UNTIMED = ("timing_s/", "perf/", "step_time")  # what no two runs have in common


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(path: Path) -> list[dict]:
    """A run's metrics without what depends on the clock."""
    kept = read_lines(path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(UNTIMED)} for line in kept]


def differences(one: Path, other: Path) -> list[str]:
    """Where the ends of two runs are not the same to the bit; empty when they are.

    Weights, samples and checkpoints byte by byte, but for what a checkpoint says of options, bytes of metrics and
    random states; metrics without times.
    """
    found = []
    for line, (a, b) in enumerate(zip(told(one), told(other)), start=1):
        found += [
            f"metrics line {line}: {k}" for k in sorted(a.keys() | b.keys()) if (k in a, a.get(k)) != (k in b, b.get(k))
        ]
    if len(told(one)) != len(told(other)):
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
    """Steps that stand in the metrics not exactly once, or out of place."""
    got = [line["step"] for line in metrics]
    return [] if got == list(range(1, steps + 1)) else sorted({*range(1, steps + 1)} ^ {*got}) or got


def skips(metrics: list[dict]) -> list[int]:
    """Steps at which `skipped_steps` rises."""
    before = [0, *(line["skipped_steps"] for line in metrics)]
    return [line["step"] for line, was in zip(metrics, before) if line["skipped_steps"] != was]


def injected(path: Path) -> list[int]:
    """Steps at which a rank's loss was made NaN."""
    return sorted({line["step"] for diary in path.glob("diary.rank*") for line in read_lines(diary) if line["nan"]})


def growth(sizes: list[float]) -> float:
    """Mean of the last fifth against that of the second: of 500 steps, the last 100 against steps 100 to 200."""
    part = max(1, len(sizes) // 5)
    return statistics.fmean(sizes[-part:]) / statistics.fmean(sizes[part : 2 * part]) - 1


def memory(path: Path) -> dict[str, dict]:
    """Of each rank, what no file holds of it, and its loader: MB after a fifth, two fifths, ..., and growth.

    Pages of libraries come and go as the kernel likes: resident memory may shrink for reasons of its own.
    """
    found = {}
    for diary in sorted(path.glob("diary.rank*")):
        lines = read_lines(diary)
        rank = diary.name.split(".")[1]
        kinds = {rank: "rss_kb", f"{rank} anonymous": "anonymous_kb", f"{rank} loader": "loader_kb"}
        for name, key in kinds.items():
            sizes = [line[key] / 1e3 for line in lines]
            part = max(1, len(sizes) // 5)
            fifths = [round(statistics.fmean(sizes[i : i + part]), 1) for i in range(0, 5 * part, part)]
            found[name] = {"fifths_mb": fifths, "peak_mb": round(max(sizes), 1), "growth": round(growth(sizes), 5)}
    return found

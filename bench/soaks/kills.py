"""When bench/soaks/soak.py kills a run, and what a kill leaves in its folder."""

import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boxgrpo.bench.processes import kill

from .verdicts import metrics_of

LONGEST_START = 15.0  # seconds; the first launch under DeepSpeed also compiles


@dataclass
class Kill:
    """One SIGKILL for a launcher and all below it."""

    aim: str  # any | saving | starting | end
    step: int  # that it waits for
    delay: float  # seconds after that
    struck: bool = False
    left: str = ""  # newest checkpoint, and what is half written or half removed


def strike(run: subprocess.Popen, path: Path, planned: Kill) -> bool:
    """Kill the run at the planned moment; False when it ends before."""
    launched = time.time_ns()

    def claimed() -> bool:  # from then on the metrics hold this launch's steps, and those it keeps
        return touched(path / "options.yaml") > launched

    def saving() -> bool:
        parts = path.glob(".checkpoint-*.part")
        return any(touched(part) > launched and number(part) >= planned.step for part in parts)

    waits: dict[str, list[Callable[[], bool]]] = {
        "starting": [],
        "any": [claimed, lambda: logged(path) >= planned.step],
        "saving": [claimed, lambda: logged(path) >= planned.step - 1, saving],
        "end": [claimed, (path / "model.safetensors").exists],
    }
    for condition in waits[planned.aim]:
        while not condition():
            if run.poll() is not None:
                return False
            time.sleep(0.001 if condition is saving else 0.01)
    time.sleep(planned.delay)
    if run.poll() is not None:
        return False
    kill(run)
    planned.struck, planned.left = True, left(path, launched)
    return True


def plan(draw: random.Random, count: int, steps: int, every: int, timing: dict[str, float]) -> list[Kill]:
    """Kills in the order of their steps: a third while saving, a tenth while starting, the last at the run's end.

    Args:
        every: steps between checkpoints.
        timing: seconds that an undisturbed run spends on its `start`, on a `step` and on a `save`.
    """
    last = steps - every  # later ones might come too late
    saves = list(range(every, last + 1, every))
    save = timing["save"]  # finding all the processes takes time too: some of these kills are sent at once
    found = [Kill("saving", at, max(0.0, draw.uniform(-save / 2, save))) for at in draw.sample(saves, count // 3)]
    found += [Kill("starting", draw.randint(0, last), draw.uniform(0, timing["start"])) for _ in range(count // 10)]
    ends = 1 if count > 1 else 0
    for _ in range(count - len(found) - ends):
        found.append(Kill("any", draw.randint(1, last), draw.uniform(0, timing["step"])))
    found.sort(key=lambda planned: planned.step)
    return found + [Kill("end", steps, draw.uniform(0, 0.1))] * ends


def timing(path: Path, seconds: float) -> dict[str, float]:
    """What an undisturbed run of so many seconds spent: on its start and its saving together, on a step, on a save."""
    took = [line["step_time"] for line in metrics_of(path)]
    newest = max(path.glob("checkpoint-*"), key=number)
    written = [file.stat().st_mtime for file in newest.rglob("*") if file.is_file()]
    start = min(LONGEST_START, seconds - sum(took))
    return {"start": start, "step": statistics.median(took), "save": max(written) - min(written)}


def touched(path: Path) -> int:
    """Time of the last change, ns; 0 of what is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def number(path: Path) -> int:
    """Of a checkpoint folder, whole or in the making."""
    return int(path.name.removesuffix(".part").rsplit("-", 1)[1])


def logged(path: Path) -> int:
    metrics = path / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def left(path: Path, launched: int) -> str:
    """The newest whole checkpoint, and those that this launch (ns of the clock) left unfinished."""
    whole = [number(f) for f in path.glob("checkpoint-*") if (f / "manifest.json").exists()]
    torn = [f"{f.name} torn" for f in path.glob("checkpoint-*") if not (f / "manifest.json").exists()]
    parts = [f.name for f in path.glob(".checkpoint-*.part") if touched(f) > launched]
    return ", ".join([f"checkpoint-{max(whole)}" if whole else "no checkpoint", *parts, *torn])

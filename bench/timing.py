"""Seconds of calls that take turns, and how a record holds them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Run = Callable[[], object]


def seconds(run: Run) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def take_turns(
    runs: Mapping[str, Run], turns: int, rounds: int = 1, *, warmup: int = 0
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by run and turn: the runs alternate, so that a slow moment of the machine is shared.

    Args:
        rounds: timed calls of a run in its turn.
        warmup: calls before those that are not timed.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            for _ in range(warmup):
                run()
            taken[name].append([seconds(run) for _ in range(rounds)])
    return taken


def milliseconds(samples: Sequence[float]) -> dict:
    """The part of a record's row about samples in seconds: median, ends and every sample, in ms."""
    ms = [round(1e3 * x, 4) for x in samples]
    return {"ms": round(1e3 * statistics.median(samples), 4), "spread_ms": [min(ms), max(ms)], "samples_ms": ms}

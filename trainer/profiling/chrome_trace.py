"""The Chrome trace that torch.profiler writes, as a `Timeline`."""

import gzip
import json
from pathlib import Path

from .timeline import Range, Timeline, Work

LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def read_chrome_trace(path: str | Path) -> Timeline:
    """Ranges are `record_function`s; work is what the GPU ran, or without one the operators, each without its callees.

    A kernel points at its launch by a correlation number; those of a replayed CUDA graph at the graph's launch.
    """
    path = Path(path)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    by_kind: dict[str, list[dict]] = {}
    for event in events:
        by_kind.setdefault(event.get("cat", ""), []).append(event)
    # Torch names some of its own: Optimizer.step#AdamW.step
    ranges = [Range(e["name"], *_span(e)) for e in by_kind.get("user_annotation", []) if "#" not in e["name"]]
    device = [e for kind in ON_GPU for e in by_kind.get(kind, [])]
    if not device:
        return Timeline(ranges, _operators(by_kind.get("cpu_op", [])), on_gpu=False)
    launched = {_correlation(e): _span(e)[0] for kind in LAUNCHES for e in by_kind.get(kind, [])}
    work = []
    for event in device:
        start, end = _span(event)
        at = launched.get(_correlation(event))
        if at is not None:  # else launched before the profile began
            work.append(Work(event["name"], at, start, end, end - start))
    return Timeline(ranges, work, on_gpu=True)


def _operators(events: list[dict]) -> list[Work]:
    """Operators of every thread; what one calls is not its own time."""
    found: list[Work] = []
    threads: dict[object, list[dict]] = {}
    for event in events:
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for of_thread in threads.values():
        callers: list[tuple[int, float]] = []  # index in `found` and end, outermost first
        for event in sorted(of_thread, key=lambda e: (e["ts"], -e["dur"])):
            start, end = _span(event)
            while callers and callers[-1][1] <= start:
                callers.pop()
            if callers:
                caller = found[callers[-1][0]]
                found[callers[-1][0]] = caller._replace(busy=caller.busy - (end - start))
            callers.append((len(found), end))
            found.append(Work(event["name"], start, start, end, end - start))
    return found


def _span(event: dict) -> tuple[float, float]:
    """Begin and end in seconds; the file has microseconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def _correlation(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")

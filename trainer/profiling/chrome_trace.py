"""The Chrome trace that torch.profiler writes, as a `Timeline`."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

from .timeline import Range, Timeline, Work

LAUNCHES = ("cuda_runtime", "cuda_driver")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def read_chrome_trace(path: str | Path) -> Timeline:
    """Ranges are `record_function`s. Work is the GPU's kernels and copies; without a GPU the operators.

    A kernel has the correlation number of its launch, or of the launch of the CUDA graph that it is in.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            events = json.load(file)["traceEvents"]
    except (ValueError, LookupError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole trace of torch.profiler ({error!r}). Profile the steps again.") from error
    by_kind: dict[str, list[tuple[str, float, float, dict]]] = defaultdict(list)  # name, begin and end in seconds
    for e in events:
        if e.get("ph") == "X":  # a span, in microseconds
            by_kind[e.get("cat", "")].append((e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, e))
    # Torch has annotations of its own, such as Optimizer.step#AdamW.step.
    ranges = [Range(name, start, end) for name, start, end, _ in by_kind["user_annotation"] if "#" not in name]
    device = [event for kind in ON_GPU for event in by_kind[kind]]
    if not device:
        return Timeline(ranges, _operators(by_kind["cpu_op"]), on_gpu=False)
    launched = {_correlation(e): start for kind in LAUNCHES for _, start, _, e in by_kind[kind]}
    work = [
        Work(name, launched[number], start, end, end - start)
        for name, start, end, e in device
        if (number := _correlation(e)) in launched  # else launched before the profile began
    ]
    return Timeline(ranges, work, on_gpu=True)


def _operators(events: list[tuple[str, float, float, dict]]) -> list[Work]:
    """The operators of all threads; an operator's busy time excludes the operators that it calls."""
    found: list[Work] = []
    callers: dict[tuple, list[int]] = defaultdict(list)  # by thread: indices in `found`, outermost first
    for name, start, end, e in sorted(events, key=lambda event: (event[1], -event[2])):
        calling = callers[e["pid"], e["tid"]]
        while calling and found[calling[-1]].end <= start:
            calling.pop()
        if calling:
            caller = found[calling[-1]]
            found[calling[-1]] = caller._replace(busy=caller.busy - (end - start))
        calling.append(len(found))
        found.append(Work(name, start, start, end, end - start))
    return found


def _correlation(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")

"""Named spans of a step: wall-clock seconds for the metrics, and ranges in the timeline of an active profiler.

NVTX ranges are made by the `nvtx` package: it needs no CUDA, puts them into a domain of their own, and reports whether
a tool is attached. Where it is missing, torch.cuda.nvtx makes them under nsys.
"""

import contextlib
import functools
import os
import time
from collections import defaultdict
from contextlib import contextmanager

import torch

DOMAIN = "boxgrpo"  # of our NVTX ranges
UNDER_NSYS = "NSYS_PROFILING_SESSION_ID"  # environment variable of processes that nsys starts
seconds: dict[str, float] = defaultdict(float)
listeners: list = []  # objects with enter(name) and leave(name), which every `span` calls
_NOTHING = contextlib.nullcontext()


@contextmanager
def span(name: str, *size: int):
    """Time a stage, and mark it in the timeline. Without a profiler this is two clock reads.

    A GPU works asynchronously: a stage's seconds are those of the CPU, and the timeline has the GPU's.
    """
    start = time.perf_counter()
    for listener in listeners:
        listener.enter(name)
    try:
        with named_range(name, *size):
            yield
    finally:
        for listener in listeners:
            listener.leave(name)
        seconds[name] += time.perf_counter() - start


def named_range(name: str, *size: int):
    """A range for profilers only, with the title `decode 8x64` for ("decode", 8, 64).

    NVTX records it if a tool such as nsys is attached, torch.profiler while it is active. Otherwise the call does
    nothing and does not format the title.
    """
    nvtx, recorded = _nvtx(), torch.autograd._profiler_enabled()
    if nvtx is None and not recorded:
        return _NOTHING
    return _open(f"{name} {'x'.join(map(str, size))}" if size else name, nvtx, recorded)


@contextmanager
def _open(title: str, nvtx, recorded: bool):
    with torch.profiler.record_function(title) if recorded else _NOTHING, nvtx(title) if nvtx else _NOTHING:
        yield


@functools.cache
def _nvtx():
    """A function from title to context manager; None if no tool was attached when the process started."""
    try:
        import nvtx
    except ImportError:
        return torch.cuda.nvtx.range if UNDER_NSYS in os.environ and torch.cuda.is_available() else None
    attached = nvtx.get_domain(DOMAIN).get_event_attributes(message="") is not None
    return functools.partial(nvtx.annotate, domain=DOMAIN) if attached else None


def pop_timings(steps: int) -> dict[str, float]:
    """Mean seconds per step of each span since the last call, `steps` steps ago, as `timing_s/...`; resets them."""
    taken = {f"timing_s/{name}": value / steps for name, value in seconds.items()}
    seconds.clear()
    return taken

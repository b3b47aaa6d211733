"""Named spans of a step: wall-clock seconds for the metrics, and ranges on the timeline of a profiler that records.

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
UNDER_NSYS = "NSYS_PROFILING_SESSION_ID"  # set by nsys for what it starts
seconds: dict[str, float] = defaultdict(float)
listeners: list = []  # objects with enter(name) and leave(name), which every `span` calls
_NOTHING = contextlib.nullcontext()


@contextmanager
def span(name: str, *size: int):
    """Time a stage, and name it on the timeline. Without a profiler this is two clock reads.

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
    """A range that only profilers see: `decode 8x64` for ("decode", 8, 64).

    NVTX has it where a tool such as nsys is attached, torch.profiler while it records. Otherwise nothing happens: the
    title is not even formatted.
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
    """A context manager of a range by its title; None where no tool was attached when the process started."""
    try:
        import nvtx
    except ImportError:
        return torch.cuda.nvtx.range if UNDER_NSYS in os.environ and torch.cuda.is_available() else None
    attached = nvtx.get_domain(DOMAIN).get_event_attributes(message="") is not None
    return functools.partial(nvtx.annotate, domain=DOMAIN) if attached else None


def pop_timings(steps: int) -> dict[str, float]:
    """`timing_s/...` of every span since the last call, which was `steps` steps ago: the mean of a step."""
    taken = {f"timing_s/{name}": value / steps for name, value in seconds.items()}
    seconds.clear()
    return taken

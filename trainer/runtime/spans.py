"""Named spans of a step: wall-clock seconds for the metrics, and ranges on a profiler's timeline where one listens.

NVTX comes from the `nvtx` package: it needs no CUDA, has a domain for our ranges alone, and knows whether a tool
listens. Where it is missing, torch.cuda.nvtx serves under nsys.
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

    A GPU works asynchronously, so a stage's seconds are those of the CPU; the timeline has the rest.
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

    It is NVTX's where a tool such as nsys is attached, torch.profiler's while that records; else it is nothing, and the
    sizes are not even written down.
    """
    nvtx, recorded = _nvtx(), torch.autograd._profiler_enabled()
    if nvtx is None and not recorded:
        return _NOTHING
    return _open(f"{name} {'x'.join(map(str, size))}" if size else name, nvtx, recorded)


@contextmanager
def _open(title: str, nvtx, recorded: bool):
    with torch.profiler.record_function(title) if recorded else _NOTHING:
        if nvtx is not None:
            push, pop = nvtx
            push(title)
        try:
            yield
        finally:
            if nvtx is not None:
                pop()


@functools.cache
def _nvtx():
    """What opens a range and what closes it, or None where no tool was attached as the process started."""
    try:
        import nvtx
    except ImportError:
        if UNDER_NSYS not in os.environ or not torch.cuda.is_available():
            return None
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    domain = nvtx.get_domain(DOMAIN)
    if domain.get_event_attributes(message="") is None:
        return None
    return lambda title: domain.push_range(domain.get_event_attributes(message=title)), domain.pop_range


@contextmanager
def untimed():
    """What happens in the block is not part of a step: its spans add no seconds."""
    before = dict(seconds)
    try:
        yield
    finally:
        seconds.clear()
        seconds.update(before)


def pop_timings(steps: int) -> dict[str, float]:
    """`timing_s/...` of every span since the last call, which was `steps` steps ago: the mean of a step."""
    taken = {f"timing_s/{name}": value / steps for name, value in seconds.items()}
    seconds.clear()
    return taken

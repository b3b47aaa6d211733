"""Named spans of a step: wall-clock seconds for the metrics, and ranges on a profiler's timeline where one listens.

NVTX comes from the `nvtx` package, not torch.cuda.nvtx: it needs no CUDA, has a domain for our ranges alone, and knows
whether a tool listens.
"""

import contextlib
import functools
import time
from collections import defaultdict
from contextlib import contextmanager

import torch

DOMAIN = "boxgrpo"  # of our NVTX ranges
seconds: dict[str, float] = defaultdict(float)
_NOTHING = contextlib.nullcontext()


@contextmanager
def span(name: str, *size: int):
    """Time a stage, and name it on the timeline. Without a profiler this is two clock reads.

    A GPU works behind the CPU's back, so a stage's seconds are the CPU's own; the timeline has the rest.
    """
    start = time.perf_counter()
    try:
        with named_range(name, *size):
            yield
    finally:
        seconds[name] += time.perf_counter() - start


def named_range(name: str, *size: int):
    """A range that only profilers see: `decode 8x64` for ("decode", 8, 64).

    It is NVTX's where a tool such as nsys is attached, torch.profiler's while that records; else it is nothing, and the
    sizes are not even written down.
    """
    domain, recorded = _nvtx_domain(), torch.autograd._profiler_enabled()
    if domain is None and not recorded:
        return _NOTHING
    return _open(f"{name} {'x'.join(map(str, size))}" if size else name, domain, recorded)


@contextmanager
def _open(title: str, domain, recorded: bool):
    with torch.profiler.record_function(title) if recorded else _NOTHING:
        if domain is not None:
            domain.push_range(domain.get_event_attributes(message=title))
        try:
            yield
        finally:
            if domain is not None:
                domain.pop_range()


@functools.cache
def _nvtx_domain():
    """Ours, or None where no tool was attached as the process started, or the package is missing."""
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    return None if domain.get_event_attributes(message="") is None else domain


@contextmanager
def unclocked():
    """What happens in the block is no part of a step: its spans leave no seconds."""
    before = dict(seconds)
    try:
        yield
    finally:
        seconds.clear()
        seconds.update(before)


def take_seconds(steps: int) -> dict[str, float]:
    """`timing_s/...` of every span since the last call, which was `steps` steps ago: the mean of a step."""
    taken = {f"timing_s/{name}": value / steps for name, value in seconds.items()}
    seconds.clear()
    return taken

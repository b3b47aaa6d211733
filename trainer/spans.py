"""Named spans of a step: NVTX ranges where there is a GPU, wall-clock seconds everywhere."""

import time
from collections import defaultdict
from contextlib import contextmanager

import torch

seconds: dict[str, float] = defaultdict(float)


@contextmanager
def span(name: str):
    """Time a stage. Without a GPU this is two clock reads; with one, an NVTX range around them.

    A GPU works behind the CPU's back, so a stage's seconds are the CPU's own; the timeline has the rest.
    """
    push = torch.cuda.is_initialized()
    if push:
        torch.cuda.nvtx.range_push(name)
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - start
        if push:
            torch.cuda.nvtx.range_pop()


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

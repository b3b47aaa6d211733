"""Seconds of spans add up by name until they are popped; profilers see ranges with sizes."""

import os
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.trainer.runtime import spans
from runs import ROOT


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every reading of the clock is a second later, and no seconds are left from another test."""
    monkeypatch.setattr(spans, "time", SimpleNamespace(perf_counter=count().__next__))
    spans.pop_timings(1)


def test_nested_and_repeated_spans_add_up():
    with spans.span("step"):  # 0 to 5
        with spans.span("data"):  # 1 to 2
            pass
        with spans.span("data"):  # 3 to 4
            pass
    with pytest.raises(KeyError), spans.span("rollout"):  # 6 to 7
        raise KeyError
    assert spans.pop_timings(2) == {"timing_s/step": 2.5, "timing_s/data": 1, "timing_s/rollout": 0.5}  # of each step
    assert spans.pop_timings(2) == {}


class Unreadable(int):
    def __str__(self):
        raise AssertionError("a size was formatted")


def test_sizes_are_in_the_range_and_not_in_the_metric():
    with torch.profiler.profile() as seen:
        with spans.span("decode", 8, 64), spans.named_range("head", 512):
            torch.ones(3).add_(1)
    assert {"decode 8x64", "head 512"} <= {event.key for event in seen.key_averages()}
    assert spans.pop_timings(1).keys() == {"timing_s/decode"}


def test_without_a_profiler_no_name_is_made():
    with spans.span("decode", Unreadable(8)), spans.named_range("head", Unreadable(512)):
        pass
    with torch.profiler.profile(), pytest.raises(AssertionError, match="formatted"):
        spans.named_range("head", Unreadable(512))


def test_a_tool_that_is_attached_to_nvtx_sees_the_ranges(tmp_path):
    """As nsys is: the ranges nest, close where a stage fails, and have a domain."""
    listener = tmp_path / "listener.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", listener, ROOT / "tests/shared/nvtx_listener.c"], check=True)
    stages = """
from boxgrpo.trainer.runtime.spans import named_range, span
try:
    with span("decode", 8, 64):
        with named_range("head"):
            raise KeyError
except KeyError:
    pass
"""
    seen = subprocess.run(
        [sys.executable, "-P", "-c", stages],
        env=os.environ | {"NVTX_INJECTION64_PATH": str(listener)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.splitlines() == ["domain boxgrpo", "push decode 8x64", "push head", "pop", "pop"]


def test_without_the_package_torch_makes_the_ranges_under_nsys(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setenv(spans.UNDER_NSYS, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    spans._nvtx.cache_clear()
    try:
        with spans.named_range("decode", 8, 64):
            calls.append("inside")
    finally:
        monkeypatch.undo()
        spans._nvtx.cache_clear()
    assert calls == ["decode 8x64", "inside", "pop"]

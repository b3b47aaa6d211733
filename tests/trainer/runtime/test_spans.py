"""Spans add up by name, the outer with the inner inside it, until they are taken; profilers see them with sizes."""

import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from boxgrpo.trainer.runtime import spans


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every look at the clock finds it a second later, and nothing is left from another test."""
    monkeypatch.setattr(spans, "time", SimpleNamespace(perf_counter=count().__next__))
    spans.pop_timings(1)


def test_nested_and_repeated_spans_add_up():
    with spans.span("step"):  # 0 to 5
        with spans.span("data"):  # 1 to 2
            pass
        with spans.span("data"):  # 3 to 4
            pass
    assert spans.pop_timings(1) == {"timing_s/step": 5, "timing_s/data": 2}


def test_taken_seconds_are_a_steps_share_and_are_gone():
    for _ in range(4):
        with spans.span("policy"):
            pass
    assert spans.pop_timings(2) == {"timing_s/policy": 2}
    assert spans.pop_timings(2) == {}


def test_a_stage_that_fails_is_timed_and_its_error_passes():
    with pytest.raises(KeyError):
        with spans.span("rollout"):
            raise KeyError
    assert spans.pop_timings(1) == {"timing_s/rollout": 1}


class Unreadable(int):
    def __str__(self):
        raise AssertionError("a size was written down though nobody listens")


def test_sizes_are_in_the_range_and_not_in_the_metric():
    with torch.profiler.profile() as seen:
        with spans.span("decode", 8, 64), spans.named_range("head", 512):
            torch.ones(3).add_(1)
    assert {"decode 8x64", "head 512"} <= {event.key for event in seen.key_averages()}
    assert spans.pop_timings(1).keys() == {"timing_s/decode"}


def test_without_a_profiler_no_name_is_made():
    with spans.span("decode", Unreadable(8)), spans.named_range("head", Unreadable(512)):
        pass
    with torch.profiler.profile():
        with pytest.raises(AssertionError, match="written down"):
            spans.named_range("head", Unreadable(512))


def test_a_tool_that_listens_to_nvtx_sees_the_ranges(tmp_path):
    """Attached as nsys is, by NVTX's own means: the ranges nest, close where a stage fails, and have a domain."""
    listener = tmp_path / "listener.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", listener, Path(__file__).resolve().parents[2] / "shared/nvtx_listener.c"],
        check=True,
    )
    stages = """
from boxgrpo.trainer.runtime.spans import named_range, span
try:
    with span("decode", 8, 64):
        with named_range("head"):
            raise KeyError
except KeyError:
    pass
"""
    heard = subprocess.run(
        [sys.executable, "-P", "-c", stages],
        env=os.environ | {"NVTX_INJECTION64_PATH": str(listener)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert heard.stdout.splitlines() == ["domain boxgrpo", "push decode 8x64", "push head", "pop", "pop"]


def test_without_the_package_torch_s_nvtx_serves_under_nsys(monkeypatch):
    said = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setenv(spans.UNDER_NSYS, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    spans._nvtx.cache_clear()
    try:
        with spans.named_range("decode", 8, 64):
            said.append("inside")
    finally:
        monkeypatch.undo()
        spans._nvtx.cache_clear()
    assert said == ["decode 8x64", "inside", "pop"]

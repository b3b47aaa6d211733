"""Spans add up by name, the outer with the inner inside it, until they are taken."""

from itertools import count
from types import SimpleNamespace

import pytest

from boxgrpo.trainer import spans


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every look at the clock finds it a second later, and nothing is left from another test."""
    monkeypatch.setattr(spans, "time", SimpleNamespace(perf_counter=count().__next__))
    spans.take_seconds(1)


def test_nested_and_repeated_spans_add_up():
    with spans.span("step"):  # 0 to 5
        with spans.span("data"):  # 1 to 2
            pass
        with spans.span("data"):  # 3 to 4
            pass
    assert spans.take_seconds(1) == {"timing_s/step": 5, "timing_s/data": 2}


def test_taken_seconds_are_a_steps_share_and_are_gone():
    for _ in range(4):
        with spans.span("policy"):
            pass
    assert spans.take_seconds(2) == {"timing_s/policy": 2}
    assert spans.take_seconds(2) == {}


def test_a_stage_that_fails_is_timed_and_its_error_passes():
    with pytest.raises(KeyError):
        with spans.span("rollout"):
            raise KeyError
    assert spans.take_seconds(1) == {"timing_s/rollout": 1}

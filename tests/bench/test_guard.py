"""CI's guard: a kernel made twice as slow is out of its bound, the same one measured again is not."""

from dataclasses import replace

import pytest

from boxgrpo.bench.kernel_bench import guard
from boxgrpo.bench.kernel_bench.guard import guarded_cases, measure, out_of_bounds


class Processor:
    """A clock of processor seconds, which calls spend; a third of the time the machine is three times as slow."""

    def __init__(self):
        self.seconds = 0.0

    def process_time(self):
        return self.seconds

    def call(self, seconds):
        def spend():
            self.seconds += seconds * (3 if self.seconds % 3 < 1 else 1)

        return spend


def test_twice_as_slow_is_out_of_bounds_and_as_before_is_not(monkeypatch):
    """By processor seconds alone: the guard has no other clock here, as another process's work costs nothing."""
    monkeypatch.setattr(guard, "time", processor := Processor())
    (case,) = guarded_cases("group_advantages B=16")

    def slower(times):
        runs = {"boxgrpo": processor.call(0.002 * times), "eager": processor.call(0.01)}
        return measure(replace(case, make=lambda *args: runs))

    before = {"rows": [slower(1)]}
    assert before["rows"][0]["ratio"] == pytest.approx(0.2, rel=0.1)
    assert out_of_bounds([slower(1.2)], before) == []
    assert out_of_bounds([slower(2)], before) == [case.name]


def test_a_case_without_a_record_is_refused():
    recorded = {"rows": [{"case": "a", "ratio": 0.8}]}
    with pytest.raises(ValueError, match="the newest record has no ratio of c; `make bench`"):
        out_of_bounds([{"case": "c", "ratio": 1.0}], recorded)


def test_what_is_out_of_bounds_is_measured_once_more(monkeypatch, capsys):
    """One alarm may be the machine's; two are the kernel's."""
    ratios = iter([9.0, 0.1, 9.0, 9.0])
    (small,) = guarded_cases("group_advantages B=16")
    monkeypatch.setattr(guard, "guarded_cases", lambda only=None: [small])
    monkeypatch.setattr(guard, "measure", lambda case: {"case": case.name, "ratio": next(ratios)})
    monkeypatch.setattr(guard, "newest", lambda: {"guard": {"rows": [{"case": small.name, "ratio": 1.0}]}})
    guard.main([])
    assert "once more" in capsys.readouterr().out
    with pytest.raises(ValueError, match="more than 1.5 times the recorded ratio to eager, twice"):
        guard.main([])

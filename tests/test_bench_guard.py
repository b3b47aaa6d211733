"""CI's guard: a kernel made twice as slow is out of its bound, the same one measured again is not."""

import time
from dataclasses import replace

import pytest
import torch

from boxgrpo.bench import bench_guard
from boxgrpo.bench.bench_guard import guarded, measured, out_of_bounds
from boxgrpo.bench.result_files import newest


@pytest.fixture
def case():
    """Sampling from 16 rows of logits: milliseconds of work on both sides, whose ratio hardly moves.

    With one thread, as the guard has: a second one spins while the first sleeps, and is charged for it.
    """
    (found,) = guarded("sample_tokens")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


def test_twice_as_slow_is_out_of_bounds_and_as_before_is_not(case, monkeypatch):
    """Of ours and eager's processor seconds in turns; a sleep, as another process's work, costs nothing."""
    monkeypatch.setattr(bench_guard, "LEAST_SECONDS", 0.02)
    before = {"rows": [measured(case)]}

    def slowed(times):
        def make(*args):
            runs = case.make(*args)

            def ours():
                time.sleep(0.002)
                return [runs["boxgrpo"]() for _ in range(times)]

            return runs | {"boxgrpo": ours}

        return replace(case, make=make)

    assert out_of_bounds([measured(slowed(1))], before) == []
    assert out_of_bounds([measured(slowed(2))], before) == [case.name]


def test_a_bound_is_half_more_than_the_recorded_ratio():
    recorded = {"rows": [{"case": "a", "ratio": 0.8}, {"case": "b", "ratio": 2.0}]}
    rows = [{"case": "a", "ratio": 1.21}, {"case": "b", "ratio": 2.99}]
    assert out_of_bounds(rows, recorded) == ["a"]
    with pytest.raises(ValueError, match="the newest record has no ratio of c; `make bench`"):
        out_of_bounds([{"case": "c", "ratio": 1.0}], recorded)


def test_what_is_out_of_bounds_is_measured_once_more(monkeypatch, capsys):
    """One alarm may be the machine's; two are the kernel's."""
    ratios = iter([9.0, 0.1, 9.0, 9.0])
    (small,) = guarded("group_advantages B=16")
    monkeypatch.setattr(bench_guard, "guarded", lambda only=None: [small])
    monkeypatch.setattr(bench_guard, "measured", lambda case: {"case": case.name, "ratio": next(ratios)})
    monkeypatch.setattr(bench_guard, "newest", lambda: {"guard": {"rows": [{"case": small.name, "ratio": 1.0}]}})
    bench_guard.main([])
    assert "once more" in capsys.readouterr().out
    with pytest.raises(ValueError, match="slower beside eager than recorded, by more than 1.5 times, twice"):
        bench_guard.main([])


def test_every_case_has_a_recorded_ratio():
    rows = newest()["guard"]["rows"]
    assert [row["case"] for row in rows] == [case.name for case in guarded()]
    for row in rows:
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1] and len(row["samples_ratio"]) == 9

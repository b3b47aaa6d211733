"""What got slower between two files: named beyond the noise, silent within it; cases of one file alone are named."""

import pytest

from boxgrpo.bench.publish import compare
from boxgrpo.bench.publish.compare import interval, left_out, slower
from boxgrpo.bench.records import newest, write

MACHINE = {"device": "a machine", "threads": 2, "torch": "2.13.0"}


def kernel(implementation, ms, noise=0.02, op="loss"):
    samples = [ms * (1 + noise * k) for k in (-1, -0.6, -0.3, -0.1, 0, 0.1, 0.3, 0.6, 1)]
    spread = [min(samples), max(samples)]
    told = {"op": op, "shape": {"N": 8}, "dtype": "float32", "implementation": implementation, "ms": ms}
    return told | {"spread_ms": spread, "samples_ms": samples}


def record(*rows, **machine):
    return {"machine": MACHINE | machine, "kernels": {"rows": list(rows)}}


def sides(ours, eager=2.0, trl=3.0, **more):
    return kernel("boxgrpo", ours, **more), kernel("eager", eager, **more), kernel("trl", trl, **more)


OLD = record(*sides(1.0))


def test_a_case_that_lost_to_its_peers_is_named_with_both_ratios():
    (line,) = slower(OLD, record(*sides(1.5)))
    assert line == "kernels: loss N=8 float32: 0.500 -> 0.750 of eager's time, 0.333 -> 0.500 of trl's time"


def test_a_slower_machine_and_a_faster_case_are_none():
    assert slower(OLD, record(*sides(1.7, 3.4, 5.1), device="another")) == []
    assert slower(OLD, record(*sides(0.5))) == []


def test_noise_and_a_single_faster_peer_are_none():
    noisy = record(*sides(1.0, noise=0.3)), record(*sides(1.2, noise=0.3))
    assert slower(*noisy) == [] != slower(OLD, record(*sides(1.2)))
    assert slower(OLD, record(*sides(1.0, eager=1.2))) == []
    assert slower(OLD, record(*sides(1.0), kernel("one read", 0.1))) == []


def test_a_case_that_ours_no_longer_has_is_named():
    assert slower(OLD, record(kernel("eager", 2.0), kernel("trl", 3.0))) == [
        "kernels: loss N=8 float32: no longer measured"
    ]


def test_what_has_no_peer_is_compared_on_the_same_machine_alone():
    old, new = record(kernel("boxgrpo", 1.0)), record(kernel("boxgrpo", 1.5))
    assert slower(old, new) == ["kernels: loss N=8 float32: 1 -> 1.5"]
    assert slower(old, new | {"machine": MACHINE | {"threads": 4}}) == []


def test_a_time_lies_between_quartiles_or_ends_or_within_a_tenth():
    assert interval(4, [1, 2, 3, 4, 5, 6, 7, 50]) == (2.25, 4, 6.75)
    assert interval(2, [1, 2, 9]) == (1, 2, 9)
    assert interval(2, [2]) == pytest.approx((1.8, 2, 2.2))


def test_the_rows_of_every_part_are_compared():
    """In the newest record, all of ours made ten times as slow: every case of every part is named."""
    old, new = newest(), newest()
    for r in new["kernels"]["rows"] + new["rewards"]["rows"]:
        if r.get("implementation", "boxgrpo").startswith("boxgrpo") and r.get("run") != "decode, re, IoU":
            r["ms"] *= 10
            for key in r.keys() & {"spread_ms", "samples_ms"}:
                r[key] = [10 * x for x in r[key]]
    for r in new["step"]["rows"]:
        r["ours_s"] *= 10
        for key in r.keys() & {"ours_spread_s", "ours_samples_s"}:
            r[key] = [10 * x for x in r[key]]
    assert slower(old, old) == []
    named = {line.split(": ")[0] for line in slower(old, new)}
    cases = sum(r["implementation"].startswith("boxgrpo") for r in old["kernels"]["rows"])
    assert named == {"kernels", "rewards", "step"}
    assert len(slower(old, new)) == cases + len(old["rewards"]["rows"]) - 1 + len(old["step"]["rows"])


def test_cases_of_both_files_are_compared_and_the_others_named(tmp_path, capsys):
    old, new = record(*sides(1.0), *sides(1.0, op="gone")), record(*sides(1.5), *sides(1.0, op="came"))
    assert slower(old, new) == slower(OLD, record(*sides(1.5)))
    assert left_out(old, new) == [
        "only the old file has kernels: gone N=8 float32",
        "only the new file has kernels: came N=8 float32",
    ]
    write(old, tmp_path / "a.json")
    write(record(*sides(1.0)), tmp_path / "b.json")
    compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    told = "only the old file has kernels: gone N=8 float32\nnothing is slower in b.json than in a.json\n"
    assert capsys.readouterr().out == told


def test_files_without_a_case_in_common_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="no case of kernels in common; measure both alike"):
        slower(OLD, record(*sides(1.0, op="other")), ["kernels"])
    with pytest.raises(ValueError, match="no case of step in common"):
        slower(OLD, OLD, ["step"])
    with pytest.raises(ValueError, match="1 files of results; two are compared"):
        compare.main([str(tmp_path / "a.json")])
    with pytest.raises(ValueError, match="there is no file of results .*a.json; those kept"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    with pytest.raises(ValueError, match="parts are kernel; kernel is none of kernels, rewards, step"):
        compare.main(["a", "b", "--parts", "kernel"])
    write(OLD, tmp_path / "a.json")
    write(record(*sides(1.5)), tmp_path / "b.json")
    with pytest.raises(SystemExit) as ended:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert ended.value.code == 1 and "of eager's time" in capsys.readouterr().out
    compare.main([str(tmp_path / "b.json"), str(tmp_path / "a.json")])
    assert capsys.readouterr().out == "nothing is slower in a.json than in b.json\n"

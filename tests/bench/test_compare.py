"""What got slower between two files: named beyond the noise, silent within it; cases of one file alone are named."""

import pytest

from boxgrpo.bench.publish import compare
from boxgrpo.bench.publish.compare import interval, left_out, slower
from boxgrpo.bench.records import newest, write

MACHINE = {"device": "a machine", "threads": 2, "torch": "2.13.0"}


def kernel(implementation, ms, noise=0.02, op="loss"):
    samples = [ms * (1 + noise * k) for k in (-1, -0.6, -0.3, -0.1, 0, 0.1, 0.3, 0.6, 1)]
    row = {"op": op, "shape": {"N": 8}, "dtype": "float32", "implementation": implementation, "ms": ms}
    return row | {"spread_ms": [samples[0], samples[-1]], "samples_ms": samples}


def record(*rows, **machine):
    return {"machine": MACHINE | machine, "kernels": {"rows": list(rows)}}


def sides(ours, eager=2.0, trl=3.0, **more):
    return kernel("boxgrpo", ours, **more), kernel("eager", eager, **more), kernel("trl", trl, **more)


OLD, SLOW = record(*sides(1.0)), record(*sides(1.5))
RATIOS = "0.500 -> 0.750 of eager's time, 0.333 -> 0.500 of trl's time"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (OLD, SLOW, RATIOS),
        (OLD, record(*sides(1.7, 3.4, 5.1), device="another"), None),  # a slower machine
        (OLD, record(*sides(0.5)), None),
        (record(*sides(1.0, noise=0.3)), record(*sides(1.2, noise=0.3)), None),
        (OLD, record(*sides(1.0, eager=1.2)), None),  # a single peer is faster
        (OLD, record(*sides(1.0), kernel("one read", 0.1)), None),
        (OLD, record(kernel("eager", 2.0), kernel("trl", 3.0)), "no longer measured"),
        (record(kernel("boxgrpo", 1.0)), record(kernel("boxgrpo", 1.5)), "1 -> 1.5"),  # without a peer
        (record(kernel("boxgrpo", 1.0)), record(kernel("boxgrpo", 1.5), threads=4), None),
    ],
)
def test_a_case_is_slower_by_its_ratios_or_without_peers_by_its_time_on_one_machine(old, new, found):
    assert slower(old, new) == ([f"kernels: loss N=8 float32: {found}"] if found else [])


def test_a_time_lies_between_quartiles_or_ends_or_within_a_tenth():
    assert interval(4, [1, 2, 3, 4, 5, 6, 7, 50]) == (2.25, 4, 6.75)
    assert interval(2, [1, 2, 9]) == (1, 2, 9)
    assert interval(2, [2]) == pytest.approx((1.8, 2, 2.2))


def test_the_rows_of_every_part_are_compared():
    """In the newest record, all of ours made ten times as slow: every case of every part is named."""
    old, new = newest(), newest()
    for r in new["kernels"]["rows"] + new["rewards"]["rows"] + new["step"]["rows"]:
        if r.get("implementation", "boxgrpo").startswith("boxgrpo") and r.get("run") != "decode, re, IoU":
            for key in r.keys() & {"ms", "ours_s"}:
                r[key] *= 10
            for key in r.keys() & {"spread_ms", "samples_ms", "ours_spread_s", "ours_samples_s"}:
                r[key] = [10 * x for x in r[key]]
    assert slower(old, old) == []
    cases = sum(r["implementation"].startswith("boxgrpo") for r in old["kernels"]["rows"])
    assert {line.split(": ")[0] for line in slower(old, new)} == {"kernels", "rewards", "step"}
    assert len(slower(old, new)) == cases + len(old["rewards"]["rows"]) - 1 + len(old["step"]["rows"])


def test_two_files_are_compared_and_what_one_has_alone_is_named(tmp_path, capsys):
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    for path, rows in ((a, (*sides(1.0), *sides(1.0, op="gone"))), (b, sides(1.0)), (c, sides(1.5))):
        write(record(*rows), path)
    compare.main([str(a), str(b)])
    named = "only the old file has kernels: gone N=8 float32\n"
    assert capsys.readouterr().out == named + "nothing is slower in b.json than in a.json\n"
    assert left_out(OLD, record(*sides(1.0), *sides(1.0, op="came"))) == [
        "only the new file has kernels: came N=8 float32"
    ]
    with pytest.raises(SystemExit) as ended:
        compare.main([str(b), str(c)])
    assert ended.value.code == 1 and capsys.readouterr().out == f"kernels: loss N=8 float32: {RATIOS}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.json"], "1 files of results; two are compared"),
        (["a.json", "b.json"], "there is no file of results a.json; those kept"),
        (["a", "b", "--parts", "kernel"], "parts are kernel; kernel is none of kernels, rewards, step"),
    ],
)
def test_files_that_are_not_there_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        compare.main(args)
    with pytest.raises(ValueError, match="no case of step in common; measure both alike"):
        slower(OLD, OLD, ["step"])

"""The command that runs every part: it stops what takes too long, and keeps what was measured."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest

from boxgrpo.bench import bench, parts
from boxgrpo.bench.bench import Conductor, Part, parsed
from boxgrpo.bench.outcomes import failures, read_test_log

MACHINE = {"device": "a machine", "revision": "abc"}
ROW = {"op": "grpo_loss", "implementation": "boxgrpo", "ms": 1.0}
LEAVES_A_ROW = """
import json, sys, time
open(sys.argv[1], "w").write(json.dumps({{"measured": {{"rows": [{row}]}}}}))
{then}
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "OUT", tmp_path)
    return tmp_path


def script(out, name, text, into="kernels", **more):
    (out / f"{name}.py").write_text(text)
    return Part(name, (sys.executable, str(out / f"{name}.py"), str(out / f"{name}.json")), into, adds=True, **more)


def leaves_a_row(out, name, then, **more):
    return script(out, name, LEAVES_A_ROW.format(row=ROW | {"op": name}, then=then), **more)


def conductor(seconds):
    return Conductor(time.monotonic() + seconds, 1.0, {}, {"machine": MACHINE})


def test_a_part_that_takes_too_long_is_stopped_and_its_rows_are_kept(out):
    """So are those of one that fails; the next ones run, and a part beside them is waited for."""
    c = conductor(300)
    c.run(leaves_a_row(out, "beside", "time.sleep(1)", beside=True))
    leave = "import tempfile; open(sys.argv[1] + '.at', 'w').write(tempfile.mkdtemp()); time.sleep(600)"
    c.run(leaves_a_row(out, "slow", leave, limit=3))
    c.run(leaves_a_row(out, "broken", "sys.exit('no such kernel')"))
    c.run(leaves_a_row(out, "last", "pass", after="beside"))
    c.run(script(out, "early", f"open({str(out / 'early.json')!r}, 'w').write('{{}}')", "rewards"))
    outcomes = {name: found["outcome"] for name, found in c.record["parts"].items()}
    assert outcomes["slow"].startswith("stopped after ") and outcomes["broken"] == "failed with 1: no such kernel"
    assert outcomes["beside"] == outcomes["last"] == "done"
    assert failures(c.record, outcomes) == ["broken"]  # a stopped one is none
    c.record["kernels"]["errors"] = [{"case": "a", "implementation": "trl"}, {"case": "b", "implementation": "boxgrpo"}]
    c.record["tests"] = {"failed": ["tests/test_a.py::test_b"]}
    assert failures(c.record, outcomes) == ["broken", "tests/test_a.py::test_b", "b"]
    assert "rewards" not in c.record  # it left no row
    left = Path((out / "slow.json.at").read_text())
    assert left.parent.name.startswith("boxgrpo-") and not left.parent.exists()
    assert {r["op"] for r in c.record["kernels"]["rows"]} == {"beside", "slow", "broken", "last"}


@pytest.mark.parametrize("adds", [True, False])
def test_rows_join_those_of_this_machine_where_a_part_adds(out, adds):
    """Of a case that both have the new row counts; another machine's are replaced."""
    c, rest = conductor(10), Part("rest", (), "step", adds=adds)
    for machine in ({"device": "another"}, MACHINE):
        c.record["step"] = {"machine": machine, "rows": [{"case": "4"}, {"case": "1", "ms": 1}], "took_s": 2}
        new = {"case": "1", "ms": 2}
        (out / "rest.json").write_text(json.dumps({"measured": {"rows": [new]}, "ceilings": {"flop_per_second": 3}}))
        c.gather(rest, 5.0)
        joined = adds and machine == MACHINE
        assert c.record["step"]["rows"] == ([{"case": "4"}, new] if joined else [new])
        assert c.record["step"]["took_s"] == (7 if joined else 5)
    assert c.record["ceilings"] == {"flop_per_second": 3}


def test_without_time_or_its_packages_a_part_is_named(out, monkeypatch):
    c = conductor(2)
    c.run(leaves_a_row(out, "late", "pass"))
    assert c.record["parts"]["late"]["outcome"].startswith("not begun: ")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    c = conductor(100)
    c.run(Part("tests", (sys.executable, "-m", "pytest")))
    assert c.record["parts"]["tests"]["outcome"] == "skipped: pytest is not installed"


def test_an_interrupt_leaves_the_rows_and_no_process(out, monkeypatch):
    wait = bench.subprocess.Popen.wait

    def interrupted(self, timeout=None):
        monkeypatch.setattr(bench.subprocess.Popen, "wait", wait)
        while not (out / "slow.json").exists() or not (out / "slow.json").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    c = conductor(100)
    monkeypatch.setattr(bench.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        c.run(leaves_a_row(out, "slow", "time.sleep(600)"))
    assert c.record["kernels"]["rows"] == [ROW | {"op": "slow"}] and not c.running
    assert c.record["parts"]["slow"]["outcome"] == "interrupted"


def test_failures_are_read_off_a_log_that_was_cut(tmp_path):
    """Of pytest -v, with and without workers."""
    log = tmp_path / "tests.log"
    log.write_text(
        "tests/test_a.py::test_one[x-1] PASSED     [ 10%]\n[gw3] [ 20%] FAILED tests/test_a.py::test_two[(6, 7) - 1] \n"
        "[gw1] [ 20%] PASSED tests/test_a.py::test_two[(6, 8) - 1]\ntests/test_a.py::test_two[(6, 9)] PASSED [ 9%]\n"
        "tests/test_b.py::test_three SKIPPED (no GPU)\nFAILED tests/test_b.py::test_four[a b] - AssertionErr"
    )
    found = read_test_log(log)
    assert found["counts"] == {"PASSED": 3, "FAILED": 2, "SKIPPED": 1}
    assert found["failed"] == ["tests/test_a.py::test_two[(6, 7) - 1]", "tests/test_b.py::test_four[a b]"]
    assert read_test_log(tmp_path / "none.log") == {"counts": {}, "failed": []}


def test_every_part_is_one_that_a_worker_has():
    for flags in ([], ["--gpu"]):
        _, chosen = parsed(flags)
        called = {p.command[2] for p in chosen if p.command[1] == "bench/parts.py"}
        assert called <= parts.PARTS.keys()
    files = set(next(p.command for p in chosen if p.name == "tests"))
    triton, cuda = "tests/kernel_tests/test_logps_triton.py", "tests/csrc/test_box_parser_cuda.py"
    assert files >= {triton, cuda, "tests/model/test_attention.py"}
    o, _ = parsed(["--quick"])
    assert parts.kernel_cases(o)[0].shape["N"] < 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "kernels,x"], "parts are kernels,x; x is none of kernels, guard, rewards, step, profile"),
        (["--gpu", "--parts", "build", "x"], "x is none of build, kernels, rewards, steps, tests, profile, "),
        (["--only", "fused"], "only is 'fused'; name the parts it is meant for .* kernels, guard, step"),
        (["--gpu", "--device", "cpu"], "`make bench` measures a CPU. Add --quick"),
    ],
)
def test_what_cannot_be_run_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(flags)


@pytest.mark.parametrize("name", ["bench_all", "bench_gpu", "bench_kernels", "bench_step", "bench_rewards"])
def test_the_earlier_names_are_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(bench.__file__).with_name(f"{name}.py")), run_name="__main__")
    assert not ended.value.code and "--json" in capsys.readouterr().out


@pytest.mark.slow
def test_a_case_is_measured_whole(tmp_path):
    """Times, memory, floors and processor seconds of one op, by the command."""
    path = tmp_path / "one.json"
    bench.main(["--parts", "kernels,guard", "--only", "group_advantages B=16", "--json", str(path)])
    record = json.loads(path.read_text())
    assert {row["implementation"] for row in record["kernels"]["rows"]} == {"boxgrpo", "eager", "compile"}
    assert all(len(row["samples_ms"]) == 48 and row["peak_mb"] >= 0 for row in record["kernels"]["rows"])
    assert len(record["guard"]["rows"]) == 1
    assert record["ceilings"].keys() == {"bytes_per_second", "sum_bytes_per_second", "flop_per_second"}

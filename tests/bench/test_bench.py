"""The command that runs every part: it stops what takes too long, and keeps what was measured."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boxgrpo.bench import bench, checks
from boxgrpo.bench.all_parts import arguments, parsed
from boxgrpo.bench.runner import Part, Runner, failures, read_test_log

MACHINE = {"device": "a machine", "revision": "abc"}
# A script of bench/: leaves a row of the case that its first argument names, and then behaves as that says.
SCRIPT = """
import json, pathlib, sys, tempfile, time
name, path = sys.argv[1], pathlib.Path(sys.argv[-1])
if name != "early":
    rows = [{"op": name, "arguments": sys.argv[2:-2]}]
    path.write_text(json.dumps({"machine": {"device": "a machine", "revision": "abc"}, path.stem[:4]: {"rows": rows}}))
if name == "slow":
    path.with_name("scratch").write_text(tempfile.mkdtemp())
    time.sleep(600)
if name == "beside":
    time.sleep(1)
if name == "broken":
    sys.exit("no such kernel")
"""


@pytest.fixture
def run(tmp_path):
    """run(*parts, seconds=300): the record of a run of parts that add to the part that their name begins with."""
    (tmp_path / "script.py").write_text(SCRIPT)
    kept = {"machine": MACHINE}

    def run(*named, seconds=300):
        script = str(tmp_path / "script.py")
        chosen = [Part(command=(script, p["name"][5:]), into=p["name"][:4], **{"adds": True} | p) for p in named]
        Runner(tmp_path, time.monotonic() + seconds, kept, options={"only": ["--only", "x"]}).run(chosen)
        return kept

    run.out, run.record = tmp_path, kept
    return run


def test_a_part_that_takes_too_long_is_stopped_and_its_rows_are_kept(run):
    """So are those of one that fails; the next ones run, and a part beside them is waited for."""
    record = run(
        {"name": "step beside", "beside": "step slow"},
        {"name": "step slow", "limit": 3, "takes": ("only", "full")},
        {"name": "step broken"},
        {"name": "rest early"},
    )
    outcomes = {name.split()[1]: found["outcome"] for name, found in record["parts"].items()}
    assert list(outcomes) == ["slow", "beside", "broken", "early"] and outcomes["beside"] == outcomes["early"] == "done"
    assert outcomes["slow"].startswith("stopped after ") and outcomes["broken"] == "failed with 1: no such kernel"
    assert failures(record, record["parts"]) == ["step broken"]  # a stopped one is none
    record["kernels"] = {"errors": [{"case": name, "implementation": name} for name in ("trl", "boxgrpo")]}
    record["step"]["rows"].append({"case": "a", "ours_error": "no room"})
    record["tests"] = {"failed": ["tests/test_a.py::test_b"]}
    assert failures(record, record["parts"]) == ["step broken", "tests/test_a.py::test_b", "boxgrpo", "a"]
    assert "rest" not in record  # it left no row
    scratch = Path((run.out / "scratch").read_text())
    assert scratch.parent.name.startswith("boxgrpo-") and not scratch.parent.exists()
    given = {row["op"]: row["arguments"] for row in record["step"]["rows"][:3]}
    assert given == {"beside": [], "slow": ["--only", "x"], "broken": []}


@pytest.mark.parametrize("adds", [True, False])
def test_rows_join_those_of_this_machine_where_a_part_adds(run, adds):
    """Of a case that both have the new row counts; another machine's are replaced."""
    for machine in ({"device": "another"}, MACHINE):
        rows = [{"case": "4"}, {"op": "rest", "ms": 1}]
        run.record["step"] = {"machine": machine, "rows": rows, "took_s": 2000}
        step = run({"name": "step rest", "adds": adds})["step"]
        joined = adds and machine == MACHINE
        assert step["rows"] == [{"case": "4"}] * joined + [{"op": "rest", "arguments": []}]
        assert (step["took_s"] >= 2000) == joined and step["machine"] == MACHINE


def test_without_time_or_its_packages_a_part_is_named(run):
    late, tests = {"name": "step late"}, {"name": "step tests", "needs": "no_such_package"}
    assert run(late, seconds=2)["parts"]["step late"]["outcome"].startswith("not begun: ")
    assert run(tests)["parts"]["step tests"]["outcome"] == "skipped: no_such_package is not installed"


def test_an_interrupt_leaves_the_rows_and_no_process(run, monkeypatch):
    started, wait = [], subprocess.Popen.wait

    def interrupted(self, timeout=None):
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        started.append(self)
        while not (run.out / "scratch").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run({"name": "step slow"})
    assert [row["op"] for row in run.record["step"]["rows"]] == ["slow"] and started[0].poll() is not None
    assert run.record["parts"]["step slow"]["outcome"] == "interrupted"


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


@pytest.mark.parametrize("flags", [[], ["--gpu", "--merges", "m.txt"]])
def test_every_parts_script_takes_its_arguments(flags, capsys, monkeypatch):
    o, chosen = parsed([*flags, "--quick", "--full"])
    for part in chosen:
        if part.into:
            words = [word for name in part.takes for word in arguments(o).get(name, ())]
            monkeypatch.setattr(sys, "argv", [*part.command, *words, "--help"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(bench.ROOT / part.command[0]), run_name="__main__")
            assert not ended.value.code and "--json" in capsys.readouterr().out


def test_a_gpus_tests_are_those_of_the_files_that_have_some(monkeypatch):
    def pytest_fails(command, cwd):
        ran.extend(command)
        return subprocess.CompletedProcess(command, 3)

    ran = []
    monkeypatch.setattr(subprocess, "run", pytest_fails)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit) as ended:
        checks.tests()
    triton, cuda = "tests/kernel_tests/test_logps.py", "tests/csrc/test_box_parser_cuda.py"
    assert ended.value.code == 3 and set(ran) >= {triton, cuda, "tests/model/test_attention.py"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "kernels,x"], "parts are kernels,x; x is none of kernels, guard, rewards, loader, step, profile"),
        (["--gpu", "--parts", "build", "x"], "x is none of build, kernels, rewards, steps, loader, tests, profile, "),
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
    flags = ["--parts", "kernels,guard", "--only", "group_advantages B=16", "--json", str(path)]
    subprocess.run([sys.executable, bench.__file__, *flags], check=True)
    record = json.loads(path.read_text())
    assert {row["implementation"] for row in record["kernels"]["rows"]} == {"boxgrpo", "eager", "compile"}
    assert all(len(row["samples_ms"]) == 48 and row["peak_mb"] >= 0 for row in record["kernels"]["rows"])
    assert len(record["guard"]["rows"]) == 1
    rates = {"bytes_per_second", "sum_bytes_per_second", "flop_per_second"}
    assert record["kernels"]["ceilings"].keys() == rates

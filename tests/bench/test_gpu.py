"""The GPU machine's script: it stops what takes too long and keeps what was measured; and the demands it judges by."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from boxgrpo.bench import bench_gpu
from boxgrpo.bench.bench_gpu import Conductor, Part, failures, outcomes
from boxgrpo.bench.gpu_parts import PARTS, kernel_cases
from boxgrpo.bench.publish.demands import QWEN_2B, QWEN_7B, verdict_table, verdicts
from boxgrpo.bench.publish.result_files import newest

ROW = {"op": "grpo_loss", "implementation": "boxgrpo", "ms": 1.0}
LEAVES_A_ROW = """
import json, sys, time
open(sys.argv[1], "w").write(json.dumps({{"machine": {{}}, "kernels": {{"rows": [{row}]}}}}))
{then}
"""


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "OUT", tmp_path)
    return tmp_path


def part(out, name, then, limit=60.0, **more):
    script = out / f"{name}.py"
    script.write_text(LEAVES_A_ROW.format(row=ROW | {"op": name}, then=then))
    command = (sys.executable, str(script), str(out / f"{name}.json"))
    return Part(name, command, limit, "kernels", **more)


def conductor(seconds):
    return Conductor(time.monotonic() + seconds, 1.0, {})


def test_a_part_that_takes_too_long_is_stopped_and_its_rows_are_kept(out):
    """So are those of one that fails; the next ones run, and a part beside them is waited for."""
    c = conductor(300)
    c.run(part(out, "beside", "time.sleep(1)", beside=True))
    leave = "import tempfile; open(sys.argv[1] + '.at', 'w').write(tempfile.mkdtemp()); time.sleep(600)"
    c.run(part(out, "slow", leave, limit=6))
    c.run(part(out, "broken", "sys.exit('no such kernel')"))
    c.run(part(out, "last", "pass", after="beside"))
    script = out / "early.py"
    script.write_text(f"open({str(out / 'early.json')!r}, 'w').write('{{\"machine\": {{}}, \"ceilings\": {{}}}}')")
    c.run(Part("early", (sys.executable, str(script)), 60, "rewards"))
    told = {name: found["outcome"] for name, found in c.record["parts"].items()}
    assert told["slow"].startswith("stopped after ") and told["broken"] == "failed with 1: no such kernel"
    assert told["beside"] == told["last"] == "done"
    chosen = [Part(name, (), 1.0) for name in told]
    assert failures(c.record, chosen) == ["broken"]  # a stopped one is none
    c.record["kernels"]["errors"] = [{"case": "a", "implementation": "trl"}, {"case": "b", "implementation": "boxgrpo"}]
    c.record["tests"] = {"failed": ["tests/test_a.py::test_b"]}
    assert failures(c.record, chosen) == ["broken", "tests/test_a.py::test_b", "b"]
    assert "rewards" not in c.record  # it left no row
    left = Path((out / "slow.json.at").read_text())
    assert left.parent.name.startswith("boxgrpo-") and not left.parent.exists()
    assert {r["op"] for r in c.record["kernels"]["rows"]} == {"beside", "slow", "broken", "last"}


def test_another_call_of_the_day_adds_to_what_the_first_left(out, monkeypatch):
    """What it measures itself it measures anew; another revision's or day's is not mixed in."""
    monkeypatch.setattr(bench_gpu, "ROOT", out)
    machine = {"device": "NVIDIA H200", "date": "2026-01-02", "revision": "abc"}
    args = argparse.Namespace(quick=False, output=None, device="cuda")
    first = {"machine": machine, "kernels": {"rows": [ROW]}, "step": {"rows": [{"case": "2B, 4"}]}}
    kept = bench_gpu.keep(first | {"tests": {"counts": {"PASSED": 1}, "failed": []}}, args)
    assert kept == out / "bench/results/nvidia-h200/2026-01-02.json"
    rest, anew = Part("steps_rest", (), 1.0, "step"), Part("steps", (), 1.0, "step")
    assert bench_gpu.kept_before(machine, [rest]).keys() >= {"kernels", "step", "tests"}
    assert "step" not in bench_gpu.kept_before(machine, [anew])
    assert bench_gpu.kept_before(machine | {"revision": "def"}, [rest]) == {}
    c = conductor(10)
    c.record |= bench_gpu.kept_before(machine, [rest])
    for ms in (1, 2):
        (out / "steps_rest.json").write_text(json.dumps({"step": {"rows": [{"case": "2B, 1", "ms": ms}]}}))
        c.gather(rest)
    assert c.record["step"]["rows"] == [{"case": "2B, 4"}, {"case": "2B, 1", "ms": 2}]


@pytest.mark.parametrize(("counts", "outcome"), [({"PASSED": 1}, "stopped after 60 s"), ({"SKIPPED": 9}, "done")])
def test_tests_that_did_not_run_to_their_end_are_no_success(counts, outcome):
    record = {"machine": {"cuda": "13.0"}, "tests": {"counts": counts}, "parts": {"tests": {"outcome": outcome}}}
    (found,) = (v for v in verdicts(record) if v["part"] == "tests")
    assert found["verdict"] == "not measured"


def test_without_time_or_its_script_a_part_is_named(out):
    c = conductor(2)
    c.run(part(out, "late", "pass"))
    assert c.record["parts"]["late"]["outcome"].startswith("not begun: ")
    c = conductor(100)
    c.run(Part("profile", (sys.executable, "bench/no_such_script.py"), 60))
    assert c.record["parts"]["profile"]["outcome"] == "skipped: there is no bench/no_such_script.py"


def test_failures_are_read_off_a_log_that_was_cut(tmp_path):
    """Of pytest -v, with and without workers."""
    log = tmp_path / "tests.log"
    log.write_text(
        "tests/test_a.py::test_one[x-1] PASSED     [ 10%]\n[gw3] [ 20%] FAILED tests/test_a.py::test_two[(6, 7) - 1] \n"
        "[gw1] [ 20%] PASSED tests/test_a.py::test_two[(6, 8) - 1]\ntests/test_a.py::test_two[(6, 9)] PASSED [ 9%]\n"
        "tests/test_b.py::test_three SKIPPED (no GPU)\nFAILED tests/test_b.py::test_four[a b] - AssertionErr"
    )
    found = outcomes(log)
    assert found["counts"] == {"PASSED": 3, "FAILED": 2, "SKIPPED": 1}
    assert found["failed"] == ["tests/test_a.py::test_two[(6, 7) - 1]", "tests/test_b.py::test_four[a b]"]
    assert outcomes(tmp_path / "none.log") == {"counts": {}, "failed": []}


def test_every_part_is_one_that_the_worker_has():
    args = argparse.Namespace(quick=False, merges=None, device="cuda", peers=["univg_r1"])
    parts = bench_gpu.plan(args)
    called = {p.command[2] for p in parts if p.command[1].endswith("gpu_parts.py")}
    assert called <= PARTS.keys()
    files = next(p.command for p in parts if p.name == "tests")
    assert {
        "tests/kernel_tests/test_loss_triton.py",
        "tests/csrc/test_box_parser_cuda.py",
        "tests/model/test_attention.py",
    } <= set(files)
    assert kernel_cases(quick=True)[0].shape["N"] < 100


def kernel_row(op, by, ms, shape, **more):
    told = {"op": op, "implementation": by, "ms": ms, "shape": shape, "percent_of_floor": 90.0, "floor_is": "bytes"}
    return told | {"peak_mb": None} | more


def test_each_demand_of_the_gpu_is_judged():
    """Met, short by how much, or not measured."""
    phase = {"gflop": 4e5, "seconds": 1.0, "floor_s": 1.0}
    phases = {"prefill": phase, "policy_forward": phase, "backward": phase, "decode": phase | {"seconds": 1.4}}
    head = "fused_grpo_loss"
    # 2B: gradients of hidden states and weight in bf16, one of the weight in fp32, and 900 MB.
    given_back = (2 * (8192 + QWEN_2B["V"]) + 4 * QWEN_2B["V"]) * QWEN_2B["H"] / 1e6
    record = {
        "machine": {"cuda": "13.0", "device": "NVIDIA H200"},
        "ceilings": {"flop_per_second": 8e14, "bytes_per_second": 4e12},
        "tests": {"counts": {"PASSED": 5, "FAILED": 2}},
        "parts": {"tests": {"outcome": "failed with 1: 2 failed"}},
        "kernels": {
            "rows": [
                kernel_row(head, "boxgrpo", 18.7, {"N": 8192} | QWEN_2B, peak_mb=given_back + 900),
                kernel_row(head, "boxgrpo", 39.0, {"N": 8192} | QWEN_7B),
                kernel_row(head, "liger", 37.4, {"N": 8192} | QWEN_2B),
                kernel_row("sample_tokens", "boxgrpo", 0.026, {"n": 128}),
                kernel_row("sample_tokens", "one read", 0.013, {"n": 128}),
                kernel_row("group_advantages", "boxgrpo", 0.012, {"B": 16, "G": 8}),
                kernel_row("group_advantages", "boxgrpo", 0.018, {"B": 1024, "G": 8}, host_ms=0.017),
            ]
        },
        "rewards": {"rows": [{"run": "ids", "ms": 0.06}]},
        "step": {
            "rows": [
                {"model": "2B", "images": 4, "prompts": 1, "univg_r1_ratio": 5.0, "ratio": 3.0} | {"phases": phases}
            ]
        },
    }
    found = {v["what"]: v for v in verdicts(record)}
    told = {what: v["verdict"] for what, v in found.items()}
    assert told["tests marked gpu that fail"] == "short by 2"
    head = told["fused head, 2B, N = 8192"]
    assert head.startswith("short by 10.0%; at 90% of what bytes allow; to try: ")
    assert told["fused head, 7B, N = 8192"] == "met"
    assert found["fused head, 2B: memory of its own"]["measured"] == 900
    assert found["fused head, 2B: liger's time over ours"]["measured"] == 2
    assert told["sample_tokens, 128 rows: over one read"].startswith("short by 53.8%; ")
    assert "allow, 17 of 18 µs on the host; to try: " in told["group_advantages, 1024 groups"]
    assert found["group_advantages, 16 groups"]["measured"] == 12 and told["group_advantages, 16 groups"] == "met"
    assert told["1,024 completions of 256 tokens"].startswith("short by 20.0%; ")
    assert found["2B: training, of the matrix rate"]["measured"] == 50
    assert told["2B: decoding, over its floor"] == "met"
    assert told["2B, 4 images: the paper's trainer's step over ours"] == "met"
    trl = told["2B, 4 images: TRL's step over ours"]
    assert trl.startswith("short by 25.0%; above their floors: decode 400 ms, prefill 0 ms; to try: ")
    assert told["7B: prefill, of the matrix rate"] == "not measured"
    assert len(verdict_table(list(found.values())).splitlines()) == 2 + len(found)
    assert json.dumps(list(found.values()))


def test_the_cpu_has_demands_of_its_own():
    found = verdicts({"machine": {"device": "two cores"}, "step": {"growth": {"doubled_group": {"ratio": 1.4}}}})
    told = {v["what"]: v["verdict"] for v in found}
    assert told["twice the completions, where prompts dominate"].startswith("short by 7.7%; to try: ")
    assert told["fused loss: its memory over eager's"] == "not measured"


def test_the_cpus_newest_record_has_a_figure_for_every_demand():
    """Whether they are met is the page's to say: a record that falls short is one all the same."""
    assert [v["what"] for v in verdicts(newest()) if v["measured"] is None] == []

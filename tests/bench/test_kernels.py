"""The kernel benchmark: what it covers and computes, and its tables."""

import json
from dataclasses import replace

import pytest
import torch

from boxgrpo.bench.kernel_bench import test_ops
from boxgrpo.bench.kernel_bench.cases import Case, cases, choose
from boxgrpo.bench.kernel_bench.host import host_calls
from boxgrpo.bench.kernel_bench.run import IMPLEMENTATIONS, row, run
from boxgrpo.kernels import group_advantages


def test_each_case_computes_what_eager_does():
    """At a small size every implementation that runs here returns eager's loss and gradients."""
    on_cpu, on_gpu = (list(cases(torch.device(kind))) for kind in ("cpu", "cuda"))
    others = [replace(case, dtype=torch.float32) for case in on_gpu if case.op not in {c.op for c in on_cpu}]
    for case in (*on_cpu, *others):
        if case.op == "sample_tokens" or "calls" in case.shape:
            continue  # draws differ; a call of the host has no result
        runs = case.make(case.tiny(), torch.device("cpu"), 0)
        assert runs.keys() <= set(IMPLEMENTATIONS), "it would not be timed"
        runs.pop("compile")
        want = runs["eager"]()
        assert len(runs) > 1
        for name, call in runs.items():
            for a, b in zip(call(), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_hosts_calls_are_timed_up_to_the_launch():
    """The kernel's launch is left out, and comes back; a GPU's backend is chosen without a GPU."""
    runs = [Case(*fields) for fields in host_calls()]
    found = run(runs, {"bytes_per_second": 1.0, "flop_per_second": 1.0}, quick=True)
    assert found["errors"] == [] and [(r["op"], r["implementation"]) for r in found["rows"]] == [
        ("group_advantages, host", "boxgrpo"),
        ("group_advantages, host", "eager"),
        ("pick_backend, host", "boxgrpo"),
        ("pick_backend, host", "eager"),
    ]
    with pytest.raises(ValueError, match="group_advantages got a CPU tensor"):
        group_advantages(torch.zeros(2, 2), torch.zeros(2, 2), backend="triton")


def test_a_row_holds_every_sample_its_median_and_its_share_of_the_floor():
    """At 8 GB/s and 2 GFLOP/s an op of 4 MB and 2 MFLOP needs 1 ms, for its FLOP."""
    case = Case("grpo_loss", {"N": 64}, torch.float32, 4e6, 2e6, None)
    limits = {"bytes_per_second": 8e9, "flop_per_second": 2e9}
    found = row(case, "boxgrpo", limits, seconds=[0.004, 0.002, 0.005], peak=5_000_000)
    assert found["samples_ms"] == [4.0, 2.0, 5.0] and found["ms"] == 4.0 and found["spread_ms"] == [2.0, 5.0]
    assert (found["floor_ms"], found["floor_is"], found["percent_of_floor"]) == (1.0, "flop", 25.0)
    assert (found["bytes"], found["flop"], found["gb_per_second"], found["peak_mb"]) == (4e6, 2e6, 1.0, 5.0)


def test_a_case_that_fails_is_noted_and_the_others_go_on():
    """By name of the case and the implementation; what is measured by then is kept after each row."""

    def fails():
        raise RuntimeError("no such kernel\nat all")

    runs = {"boxgrpo": fails, "eager": lambda: None, "liger": lambda: None}
    case = Case("grpo_loss", {"N": 64}, torch.float32, 4e6, 2e6, lambda *_: runs)
    kept, limits = [], {"bytes_per_second": 8e9, "flop_per_second": 2e9}
    found = run([case], limits, lambda found: kept.append(len(found["rows"])), names=("boxgrpo", "eager"), quick=True)
    assert [r["implementation"] for r in found["rows"]] == ["eager"] and len(found["rows"][0]["samples_ms"]) == 3
    assert found["errors"] == [
        {"case": case.name, "implementation": "boxgrpo", "error": "RuntimeError: no such kernel"}
    ]
    assert kept == [0, 1]


def test_a_case_is_chosen_by_a_part_of_its_name():
    every = list(cases(torch.device("cpu")))
    assert {case.op for case in choose(every, "group_advantages B=16")} == {"group_advantages"}
    with pytest.raises(ValueError, match="only is 'softmax', which no case's name holds; there are "):
        choose(every, "softmax")


def test_pytest_benchmark_times_an_op_beside_eager(tmp_path):
    path = tmp_path / "ops.json"
    flags = ["--benchmark-only", "--benchmark-max-time=0.05", f"--benchmark-json={path}", "-p", "no:cacheprovider"]
    assert pytest.main([*flags, "-q", "-k", "group_advantages", test_ops.__file__]) == 0
    found = json.loads(path.read_text())["benchmarks"]
    groups = {case.name for case in cases(torch.device("cpu")) if "group_advantages" in case.op}
    assert {b["group"] for b in found} == groups and len(found) == 2 * len(groups)
    assert all(b["extra_info"].keys() == {"bytes", "flop"} and b["stats"]["rounds"] >= 5 for b in found)

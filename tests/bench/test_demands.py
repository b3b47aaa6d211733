"""The figures that are wanted of each machine: met, short by how much, or not measured."""

import pytest

from boxgrpo.bench.publish.demands import verdicts
from boxgrpo.bench.publish.tables import table

QWEN_2B = {"N": 8192, "V": 151_936, "H": 1536}


@pytest.mark.parametrize(("counts", "outcome"), [({"PASSED": 1}, "stopped after 60 s"), ({"SKIPPED": 9}, "done")])
def test_tests_that_did_not_run_to_their_end_are_no_success(counts, outcome):
    record = {"machine": {"cuda": "13.0"}, "tests": {"counts": counts}, "parts": {"tests": {"outcome": outcome}}}
    (found,) = (v for v in verdicts(record) if v["part"] == "tests")
    assert found["verdict"] == "not measured"


def kernel_row(op, by, ms, shape, **more):
    row = {"op": op, "implementation": by, "ms": ms, "shape": shape, "percent_of_floor": 90.0, "floor_is": "bytes"}
    return row | {"peak_mb": None} | more


def test_each_demand_of_the_gpu_is_judged():
    phase = {"gflop": 4e5, "seconds": 1.0, "floor_s": 1.0}
    phases = {"prefill": phase, "policy_forward": phase, "backward": phase, "decode": phase | {"seconds": 1.4}}
    # 2B: gradients of hidden states and weight in bf16, one of the weight in fp32, and 900 MB.
    given_back = (2 * (QWEN_2B["N"] + QWEN_2B["V"]) + 4 * QWEN_2B["V"]) * QWEN_2B["H"] / 1e6
    kernels = [
        kernel_row("fused_grpo_loss", "boxgrpo", 18.7, QWEN_2B, peak_mb=given_back + 900),
        kernel_row("fused_grpo_loss", "liger", 37.4, QWEN_2B),
        kernel_row("sample_tokens", "boxgrpo", 0.026, {"n": 128}),
        kernel_row("sample_tokens", "one read", 0.013, {"n": 128}),
        kernel_row("group_advantages", "boxgrpo", 0.012, {"B": 16, "G": 8}),
        kernel_row("group_advantages", "boxgrpo", 0.018, {"B": 1024, "G": 8}, host_ms=0.017),
    ]
    step = {"model": "2B", "images": 4, "prompts": 1, "univg_r1_ratio": 5.0, "ratio": 3.0, "phases": phases}
    record = {
        "machine": {"cuda": "13.0", "device": "NVIDIA H200"},
        "ceilings": {"flop_per_second": 8e14, "bytes_per_second": 4e12},
        "tests": {"counts": {"PASSED": 5, "FAILED": 2}},
        "parts": {"tests": {"outcome": "failed with 1: 2 failed"}},
        "kernels": {"rows": kernels},
        "rewards": {"rows": [{"run": "ids", "ms": 0.06}]},
        "step": {"rows": [step]},
    }
    rows = verdicts(record)
    assert len(table("verdicts", rows).splitlines()) == 2 + len(rows)
    found = {v["what"]: (v["measured"], v["verdict"]) for v in rows}
    slowest = "above their floors: decode 400 ms, prefill 0 ms"
    assert {what: found[what] for what in found if found[what][0] is not None} == {
        "tests marked gpu that fail": (2, "short by 2"),
        "fused head, 2B, N = 8192": (18.7, "short by 10.0%; at 90% of what bytes allow"),
        "fused head, 2B: memory of its own": (900, "met"),
        "fused head, 2B: liger's time over ours": (2, "met"),
        "sample_tokens, 128 rows: over one read": (2, "short by 53.8%; at 90% of what bytes allow"),
        "group_advantages, 16 groups": (12, "met"),
        "group_advantages, 1024 groups": (18, "short by 20.0%; at 90% of what bytes allow, 17 of 18 µs on the host"),
        "1,024 completions of 256 tokens": (60, "short by 20.0%"),
        "2B: prefill, of the matrix rate": (50, "met"),
        "2B: training, of the matrix rate": (50, "met"),
        "2B: decoding, over its floor": (1.4, "met"),
        "2B, 4 images: the paper's trainer's step over ours": (5, "met"),
        "2B, 4 images: TRL's step over ours": (3, f"short by 25.0%; {slowest}"),
    }


def test_the_cpu_has_demands_of_its_own():
    found = verdicts({"machine": {"device": "two cores"}, "step": {"growth": {"doubled_group": {"ratio": 1.4}}}})
    words = {v["what"]: v["verdict"] for v in found}
    assert words["twice the completions, where prompts dominate"] == "short by 7.7%"
    assert words["fused loss: its memory over eager's"] == "not measured"

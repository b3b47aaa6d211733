"""The kernel benchmark: its figures on a CPU, and the README's copy of them."""

import json

import torch

from boxgrpo.bench.bench_kernels import table
from boxgrpo.bench.cases import Case, cases
from boxgrpo.bench.machine import RESULTS

PEERS = ("boxgrpo", "eager", "compile", "liger", "trl")


def head_rows():
    rows = json.loads((RESULTS / "cpu/kernels.json").read_text())["rows"]
    return {row["implementation"]: row for row in rows if row["op"] == "fused_grpo_loss"}


def test_the_fused_loss_is_no_slower_than_eager_in_a_quarter_of_its_memory():
    """At N = 512, V = 151936, H = 256, as recorded."""
    ours, eager = (head_rows()[name] for name in ("boxgrpo", "eager"))
    assert ours["shape"] == {"N": 512, "V": 151_936, "H": 256}
    assert ours["ms"] <= eager["ms"] and ours["peak_mb"] <= eager["peak_mb"] / 4


def test_every_case_was_measured():
    """And on a tree that git knows."""
    result = json.loads((RESULTS / "cpu/kernels.json").read_text())
    measured = {(row["op"], *row["shape"].values()) for row in result["rows"] if row["implementation"] == "boxgrpo"}
    assert measured == {(case.op, *case.shape.values()) for case in cases(torch.device("cpu"))}
    assert not result["machine"]["revision"].endswith("dirty")


def test_the_readme_shows_the_recorded_figures():
    readme = (RESULTS.parent.parent / "README.md").read_text()
    for label, key in (("ms", "ms"), ("MB beyond inputs", "peak_mb")):
        cells = [label, *(f"{head_rows()[name][key]:.0f}" for name in PEERS)]
        assert f"| {' | '.join(cells)} |" in readme


def test_each_case_computes_what_eager_does():
    """At a small size every implementation that runs here returns eager's loss and gradients."""
    for case in cases(torch.device("cpu")):
        small = {"N": 16, "V": 160, "H": 8, "n": 4, "B": 3, "G": 4}
        shape = {key: small[key] for key in case.shape}
        if case.op == "sample_tokens":
            continue  # draws differ
        small_case = Case(case.op, shape, case.dtype, 1.0, 0.0, case.make)
        runs = case.make(small_case, torch.device("cpu"), 0)
        runs.pop("compile")
        want = runs["eager"]()
        assert len(runs) > 1
        for name, run in runs.items():
            for a, b in zip(run(), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_table_has_a_line_for_each_row():
    result = json.loads((RESULTS / "cpu/kernels.json").read_text())
    assert len(table(result).splitlines()) == 2 + len(result["rows"])

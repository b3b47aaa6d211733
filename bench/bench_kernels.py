"""Each kernel beside eager torch, torch.compile, Liger and TRL, and against the floor that the machine sets.

    python bench/bench_kernels.py [--only NAME] [--json FILE|-]

`make bench` keeps the results. On a GPU the times are triton.testing.do_bench's, each run with a cold L2; on a CPU
pytest-benchmark takes them. The floor of an op is
the larger of its least bytes over a copy's bandwidth and its least FLOP over a matrix product's rate, both measured in
the same run. Peak memory is what a run needs beyond its inputs.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from boxgrpo.bench.cases import Case, cases
from boxgrpo.bench.launches import resident_kb
from boxgrpo.bench.peers import skipped
from boxgrpo.bench.result_files import begin, dump, write

SEED = 0
PEER_MODULES = ("trl.trainer.utils", "liger_kernel.chunked_loss")
TITLES = {"boxgrpo": "boxgrpo", "eager": "eager", "compile": "torch.compile", "liger": "Liger", "trl": "TRL"}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(only: str | None) -> list[Case]:
    return [case for case in cases(device()) if only is None or only in case.name]


# -- times ----------------------------------------------------------------------------------------------------------


def times_on_cpu(only: str | None) -> dict[tuple[str, str], list[float]]:
    """(case, implementation) -> seconds of each round, by pytest-benchmark, which collects kernel_rounds.py."""
    import pytest

    with tempfile.TemporaryDirectory() as path:
        report = Path(path) / "report.json"
        rounds = Path(__file__).with_name("kernel_rounds.py")
        arguments = [
            str(rounds),
            "-q",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={report}",
        ]
        with contextlib.redirect_stdout(sys.stderr):
            failed = pytest.main([*arguments, *(["-k", re.sub(r"\W+", " and ", only)] if only else [])])
        if failed:
            raise SystemExit(f"pytest-benchmark ended with {failed}; see above.")
        found = json.loads(report.read_text())["benchmarks"]
    return {(b["extra_info"]["case"], b["extra_info"]["implementation"]): b["stats"]["data"] for b in found}


def times_on_gpu(case: Case) -> dict[tuple[str, str], list[float]]:
    """(case, implementation) -> seconds by do_bench, which writes over the whole L2 before each run."""
    from triton.testing import do_bench

    implementations = case.make(case, device(), SEED)
    return {
        (case.name, name): [ms / 1000 for ms in do_bench(run, return_mode="all")]
        for name, run in implementations.items()
    }


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(case: Case, implementation: str) -> int | None:
    """The most that a run holds beyond its inputs, gradients included. On a CPU resident memory, in a fresh process."""
    if device().type == "cpu":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["boxgrpo.bench.bench_kernels", *PEER_MODULES])  # those that are there
        with context.Pool(1) as pool:
            return pool.apply(_peak_resident, (case.name, implementation))
    run = case.make(case, device(), SEED)[implementation]
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_seconds(case: Case, implementation: str) -> float | None:
    """What a call costs the host of a GPU, which does not wait for it."""
    if device().type == "cpu":
        return None
    run, calls = case.make(case, device(), SEED)[implementation], 3  # more could fill the launch queue and wait
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _peak_resident(name: str, implementation: str) -> int | None:
    refs = Path("/proc/self/clear_refs")
    if not refs.exists():
        return None
    case = next(case for case in cases(torch.device("cpu")) if case.name == name)
    run = case.make(case, torch.device("cpu"), SEED)[implementation]
    if implementation == "compile":
        run()  # the compiler's own memory is not the op's
        gc.collect()
    before = resident_kb(os.getpid())
    refs.write_text("5")  # the high-water mark starts anew
    run()
    return 1024 * (resident_kb(os.getpid(), "VmHWM") - before)


# -- floors ---------------------------------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a product, in the benchmark's dtype."""
    gpu = device().type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = 2**30 if gpu else 2**26
    a, b = torch.randn(2, size // dtype.itemsize, device=device(), dtype=dtype)
    side = 8192 if gpu else 2048
    x, y = torch.randn(2, side, side, device=device(), dtype=dtype)
    copy, product = (median_seconds(f) for f in (lambda: b.copy_(a), lambda: x @ y))
    return {"bytes_per_second": 2 * size / copy, "flop_per_second": 2 * side**3 / product}


def median_seconds(run) -> float:
    if device().type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1000
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


# -- report ---------------------------------------------------------------------------------------------------------


def row(
    case: Case, implementation: str, seconds: list[float], limits: dict[str, float], *, with_memory: bool = True
) -> dict:
    """One line of results/: times in ms, rates, and the share of the floor."""
    median = statistics.median(seconds)
    by_bytes = case.bytes_floor / limits["bytes_per_second"]
    by_flop = case.flops_floor / limits["flop_per_second"]
    peak = peak_bytes(case, implementation) if with_memory else None
    host = host_seconds(case, implementation)
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "implementation": implementation,
        "ms": round(1e3 * median, 4),
        "spread_ms": [round(1e3 * x, 4) for x in (min(seconds), max(seconds))],
        "samples_ms": [round(1e3 * x, 4) for x in seconds],
        "bytes": case.bytes_floor,
        "flop": case.flops_floor,
        "gb_per_second": round(case.bytes_floor / median / 1e9, 1),
        "tflop_per_second": round(case.flops_floor / median / 1e12, 3),
        "floor_ms": round(1e3 * max(by_bytes, by_flop), 4),
        "floor_is": "bytes" if by_bytes > by_flop else "flop",
        "percent_of_floor": round(100 * max(by_bytes, by_flop) / median, 1),
        "peak_mb": None if peak is None else round(peak / 1e6, 1),
        "host_ms": None if host is None else round(1e3 * host, 4),
    }


def run(only: str | None, limits: dict[str, float], keep: Callable[[dict], None]) -> dict:
    """All rows; `keep` is given what there is after each case: what a run that is stopped has measured is not lost."""
    result = {"skipped": skipped(["compile", "liger", "trl"]), "rows": (rows := [])}
    on_cpu = times_on_cpu(only) if device().type == "cpu" else None
    for case in chosen(only):
        times = on_cpu if on_cpu is not None else times_on_gpu(case)
        mine = {key: seconds for key, seconds in times.items() if key[0] == case.name}
        rows += [row(case, name, seconds, limits) for (_, name), seconds in mine.items()]
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        keep(result)
    return result


def table(result: dict) -> str:
    """Markdown: a line for each op, shape and implementation, with the ratio to ours."""
    lines = ["| op | shape | by | ms | × ours | % of floor | peak MB |", "|---|---|---|---|---|---|---|"]
    ours = {(r["op"], str(r["shape"])): r["ms"] for r in result["rows"] if r["implementation"] == "boxgrpo"}
    for r in result["rows"]:
        shape = " ".join(f"{key}={value}" for key, value in r["shape"].items())
        base = ours.get((r["op"], str(r["shape"])))
        peak = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        cells = (r["op"], shape, r["implementation"], f"{r['ms']:.4g}", f"{r['ms'] / base:.2f}" if base else "")
        lines.append(f"| {' | '.join(cells)} | {r['percent_of_floor']:.0f} | {peak} |")
    return "\n".join(lines)


def head_table(result: dict) -> str:
    """Markdown: the fused loss from hidden states at its first shape, by all who have it."""
    rows = [r for r in result["rows"] if r["op"] == "fused_grpo_loss"]
    rows = {r["implementation"]: r for r in rows if r["shape"] == rows[0]["shape"]}
    names = [name for name in TITLES if name in rows]
    lines = ["| | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (1 + len(names)) + "|"]
    for label, key in (("ms", "ms"), ("MB beyond inputs", "peak_mb")):
        cells = [label, *(f"{rows[name][key]:.0f}" for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name holds this, as fused_grpo_loss")
    parser.add_argument("--json", help="write the results there, - for standard output")
    args = parser.parse_args()
    record = begin() | {"ceilings": (limits := ceilings())}
    record["kernels"] = run(args.only, limits, lambda rows: None)
    if args.json == "-":
        print(dump(record))
        return
    if args.json:
        write(record, Path(args.json))
    print(table(record["kernels"]))


if __name__ == "__main__":
    main()

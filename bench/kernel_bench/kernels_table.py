"""Each kernel beside eager torch, torch.compile, Liger and TRL, and against the floor that the machine sets.

    python bench/kernel_bench/kernels_table.py [--only NAME] [--json FILE|-]

`make bench` keeps the results. On a GPU the times are triton.testing.do_bench's, each run with a cold L2; on a CPU
pytest-benchmark takes them. The floor of an op is
the larger of its least bytes over a copy's bandwidth and its least FLOP over a matrix product's rate, both measured in
the same run. Peak memory is what a run needs beyond its inputs. Liger's chunks go through torch.compile on a GPU, not
on a CPU.
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench.cases import Case, cases, holding, sizes
from boxgrpo.bench.launches import resident_kb
from boxgrpo.bench.peers import NAMES, skipped
from boxgrpo.bench.publish.result_files import begin, dump, write

SEED = 0
PEERS = ("compile", "liger", "trl")
PEER_MODULES = ("trl.trainer.utils", "liger_kernel.chunked_loss", "torch._inductor.compile_fx")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(only: str | None) -> list[Case]:
    return holding(list(cases(device())), only)


# -- times ----------------------------------------------------------------------------------------------------------


def times_on_cpu(only: str | None) -> dict[tuple[str, str], list[float]]:
    """(case, implementation) -> seconds of each round, by pytest-benchmark, which collects kernel_rounds.py."""
    import pytest

    with tempfile.TemporaryDirectory() as path:
        report = Path(path) / "report.json"
        rounds = Path(__file__).with_name("rounds.py")
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
            raise ValueError(f"pytest-benchmark ended with {failed}; see above.")
        found = defaultdict(list)
        for taken in json.loads(report.read_text())["benchmarks"]:
            told = taken["extra_info"]
            found[told["case"], told["implementation"]] += taken["stats"]["data"]
    return found


def seconds_on_gpu(run: Callable[[], object]) -> list[float]:
    """By do_bench, which writes over the whole L2 before each run; it measures for a fifth of a second."""
    from triton.testing import do_bench

    return [ms / 1000 for ms in do_bench(run, rep=200, return_mode="all")]


# -- memory ---------------------------------------------------------------------------------------------------------


def peaks_on_cpu(wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
    """(case, implementation) -> the most resident memory that a run holds beyond its inputs, gradients included.

    Each in a process of its own, forked off one that has imported the peers; the caller's stays without them. Two run
    at a time, each with memory of its own.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peaks_resident, list(wanted)).result()


def _peaks_resident(wanted: list[tuple[str, str]]) -> dict[tuple[str, str], int | None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["boxgrpo.bench.kernel_bench.kernels_table", *PEER_MODULES])  # those that are there

    def peak(key: tuple[str, str]) -> int | None:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                return pool.submit(_peak_resident, *key).result()
            except BrokenProcessPool:
                print(f"{' by '.join(key)}: its process died, its memory is not known", file=sys.stderr)
                return None

    with ThreadPoolExecutor(2) as two:
        return dict(zip(wanted, two.map(peak, wanted), strict=True))


def peak_on_gpu(case: Case, implementation: str) -> int:
    """The most that a run holds beyond its inputs, gradients included."""
    run = case.make(case, device(), SEED)[implementation]
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_seconds(case: Case, implementation: str) -> float:
    """What a call costs the host of a GPU, which does not wait for it."""
    run, calls = case.make(case, device(), SEED)[implementation], 3  # more could fill the launch queue and wait
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def peak_and_host(case: Case, implementation: str) -> dict[str, float]:
    """What a GPU's row has beside its times."""
    return {"peak": peak_on_gpu(case, implementation), "host": host_seconds(case, implementation)}


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
    case: Case,
    implementation: str,
    seconds: list[float],
    limits: dict[str, float],
    *,
    peak: int | None = None,
    host: float | None = None,
) -> dict:
    """One line of results/: times in ms, rates, and the share of the floor. `peak`: bytes; `host`: seconds."""
    median = statistics.median(seconds)
    by_bytes = case.bytes_floor / limits["bytes_per_second"]
    by_flop = case.flops_floor / limits["flop_per_second"]
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
    """All rows. On a GPU `keep` is given what there is after each, so that a run that is stopped has lost nothing."""
    wanted = chosen(only)
    if device().type == "cuda":
        return one_by_one(wanted, limits, keep, more=peak_and_host)
    result = {"skipped": skipped(PEERS), "rows": []}
    times = times_on_cpu(only)
    peaks = peaks_on_cpu(times)
    for case in wanted:
        mine = (key for key in times if key[0] == case.name)
        result["rows"] += [row(case, key[1], times[key], limits, peak=peaks[key]) for key in mine]
    return result


def one_by_one(
    cases: Iterable[Case],
    limits: dict[str, float],
    keep: Callable[[dict], None],
    *,
    names: Sequence[str] = (),
    seconds: Callable[[Callable[[], object]], list[float]] = seconds_on_gpu,
    more: Callable[[Case, str], dict] = lambda case, name: {},
) -> dict:
    """All rows, by those of `names` (none: by all) that run a case here, each on inputs of its own.

    A row that fails, by a lack of memory or otherwise, is noted, and the others go on.
    """
    result = {"skipped": skipped(PEERS), "rows": [], "errors": []}
    for case in cases:
        try:
            present = list(case.make(case, device(), SEED))  # a view of the dict would keep its inputs
        except Exception as error:
            result["errors"].append({"case": case.name, "error": told(error)})
            continue
        for name in (n for n in names or present if n in present and n not in result["skipped"]):
            try:
                taken = seconds(case.make(case, device(), SEED)[name])  # whose inputs are gone when memory is measured
                result["rows"].append(row(case, name, taken, limits, **more(case, name)))
            except Exception as error:
                result["errors"].append({"case": case.name, "implementation": name, "error": told(error)})
            gc.collect()
            torch.cuda.empty_cache()
            keep(result)
        torch._dynamo.reset()
    return result


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def table(result: dict) -> str:
    """Markdown: a line for each op, shape and implementation, with the ratio to ours."""
    lines = ["| op | shape | by | ms | × ours | % of floor | peak MB |", "|---|---|---|---|---|---|---|"]
    ours = {(r["op"], str(r["shape"])): r["ms"] for r in result["rows"] if r["implementation"] == "boxgrpo"}
    for r in result["rows"]:
        base = ours.get((r["op"], str(r["shape"])))
        peak = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        times = f"{r['ms']:.4g}", f"{r['ms'] / base:.2f}" if base else ""
        cells = (r["op"], sizes(r["shape"]), r["implementation"], *times)
        lines.append(f"| {' | '.join(cells)} | {r['percent_of_floor']:.0f} | {peak} |")
    return "\n".join(lines)


def head_table(result: dict) -> str:
    """Markdown: the fused loss from hidden states at its first shape, by all who have it."""
    rows = [r for r in result["rows"] if r["op"] == "fused_grpo_loss"]
    rows = {r["implementation"]: r for r in rows if r["shape"] == rows[0]["shape"]}
    names = [name for name in NAMES if name in rows]
    lines = ["| | " + " | ".join(NAMES[name] for name in names) + " |", "|---" * (1 + len(names)) + "|"]
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
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_kernels.py: {error}")

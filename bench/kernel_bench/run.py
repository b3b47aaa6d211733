"""Each kernel beside eager torch, torch.compile, Liger and TRL, and against the floor that the machine sets.

    python bench/kernel_bench/run.py [--only NAME] [--json FILE|-]
    python -P -m boxgrpo.bench.kernel_bench.run --once CASE IMPLEMENTATION     profiles/nsight.sh starts it under ncu

`make bench` keeps the results. On a GPU the times are triton.testing.do_bench's, each run with a cold L2; on a CPU the
implementations of a case take turns. The floor of an op is the larger of its least bytes over a copy's bandwidth and
its least FLOP over a matrix product's rate, both measured in the same run. Peak memory is what a run needs beyond its
inputs. Liger's chunks go through torch.compile on a GPU, not on a CPU.
"""

import gc
import statistics
import sys
import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from boxgrpo.bench.kernel_bench.cases import Case, cases, choose
from boxgrpo.bench.peers import skipped
from boxgrpo.bench.processes import PeakMemory, run_isolated
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import begin, flags, keeper, output
from boxgrpo.bench.timing import milliseconds, take_turns
from boxgrpo.trainer.runtime.ranks import run_as_script

SEED = 0
PEERS = ("compile", "liger", "trl")
# Ours and what needs no compiling first, for a run that may be stopped.
IMPLEMENTATIONS = ("boxgrpo", "one read", "boxgrpo, overwriting", "liger", "trl", "eager", "compile")
PRELOADED = ("boxgrpo.bench.kernel_bench.cases", "trl.trainer.utils", "liger_kernel.chunked_loss")
PRELOADED += ("torch._inductor.compile_fx",)  # those that are installed
TURNS, SMALL_ROUNDS, SMALL_WARMUP = 4, 12, 5  # a turn of what takes microseconds has several rounds; else it has one
LARGE = 10_000  # entries of a vocabulary
DEMANDED = ("fused_grpo_loss_from_logits", "fused_grpo_loss", "sample_tokens", "group_advantages")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- floors ---------------------------------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and of a sum in place, and FLOP a second of a product.

    All in the benchmark's dtype. A CPU's copy also reads what it is about to overwrite; a sum in place has to.
    """
    gpu = device().type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = 2**30 if gpu else 2**26
    a, b = torch.randn(2, size // dtype.itemsize, device=device(), dtype=dtype)
    side = 8192 if gpu else 2048
    x, y = torch.randn(2, side, side, device=device(), dtype=dtype)
    copy, add, product = (median_seconds(f) for f in (lambda: b.copy_(a), lambda: b.add_(a), lambda: x @ y))
    rates = {"bytes_per_second": 2 * size / copy, "flop_per_second": 2 * side**3 / product}
    return rates | {"sum_bytes_per_second": 3 * size / add}


def median_seconds(run: Callable[[], object]) -> float:
    if device().type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode="median") / 1000
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


# -- times and memory -----------------------------------------------------------------------------------------------


def run(
    cases: Iterable[Case],
    limits: dict[str, float],
    keep: Callable[[dict], None] = lambda found: None,
    *,
    names: Sequence[str] = IMPLEMENTATIONS,
    quick: bool = False,
) -> dict:
    """A row for each case and each of `names` that runs it here.

    A row that fails, for want of memory or otherwise, is noted in `errors`, and the others go on. `keep` receives what
    there is after each case on a CPU and after each row on a GPU, so that a run that is stopped has lost nothing.

    Args:
        limits: the machine's ceilings.
        quick: three rounds of each, no memory.
    """
    result = {"skipped": skipped(PEERS), "rows": [], "errors": []}
    chosen = [name for name in names if name not in result["skipped"]]
    for case in cases:
        measured = _on_gpu(case, chosen) if device().type == "cuda" else _on_cpu(case, chosen, quick)
        for name, found in measured:
            if isinstance(found, Exception):
                text = f"{type(found).__name__}: {(str(found).strip().splitlines() or [''])[0]}"[:300]
                result["errors"].append({"case": case.name, "implementation": name, "error": text})
            else:
                result["rows"].append(row(case, name, limits, **found))
            keep(result)
        torch._dynamo.reset()
    return result


def _on_gpu(case: Case, names: Sequence[str]) -> Iterator[tuple[str, dict | Exception]]:
    """Each implementation's figures, or why it has none; each runs on inputs of its own."""
    from triton.testing import do_bench

    try:
        present = list(case.make(case, device(), SEED))  # a view of the dict would keep its inputs
    except Exception as error:
        yield "boxgrpo", error
        return
    for name in (name for name in names if name in present):
        try:
            taken = do_bench(case.make(case, device(), SEED)[name], rep=200, return_mode="all")
            seconds = [ms / 1000 for ms in taken]
            yield name, {"seconds": seconds, "peak": peak(case, name), "host": host_seconds(case, name)}
        except Exception as error:
            yield name, error
        gc.collect()
        torch.cuda.empty_cache()


def _on_cpu(case: Case, names: Sequence[str], quick: bool) -> Iterator[tuple[str, dict | Exception]]:
    """Each implementation's figures, or why it has none; all run on the same inputs."""
    runs = {}
    for name, call in case.make(case, device(), SEED).items():
        if name in names:
            try:
                call()  # compiles, touches its pages
                runs[name] = call
            except Exception as error:
                yield name, error
    rounds, warmup = (1, 0) if quick or case.shape.get("V", 0) > LARGE else (SMALL_ROUNDS, SMALL_WARMUP)
    taken = take_turns(runs, 3 if quick else TURNS, rounds, warmup=warmup)
    seconds = {name: [x for turn in taken[name] for x in turn] for name in names if name in taken}
    runs.clear()  # its inputs are gone when memory is measured
    with ThreadPoolExecutor(2) as two:  # each in a process of its own
        peaks = two.map(lambda name: None if quick else _isolated_peak(case, name), seconds)
        for name, most in zip(seconds, peaks, strict=True):
            yield name, {"seconds": seconds[name], "peak": most}


def _isolated_peak(case: Case, name: str) -> int | None:
    try:
        return run_isolated(peak_by_name, case.name, name, preload=PRELOADED)
    except ChildProcessError as error:
        print(f"{case.name} by {name}: {error}, its memory is not known", file=sys.stderr)
        return None


def peak_by_name(case: str, implementation: str) -> int | None:
    """`peak` of a CPU's case, which cannot travel to another process."""
    return peak(next(c for c in cases(torch.device("cpu")) if c.name == case), implementation)


def peak(case: Case, implementation: str) -> int | None:
    """The most bytes that a run holds beyond its inputs, gradients included."""
    call = case.make(case, device(), SEED)[implementation]
    if implementation == "compile" or device().type == "cuda":
        call()  # the compiler's own memory is not the op's
    memory = PeakMemory(gpu=device().type == "cuda")
    memory.start()
    call()
    return memory.peak()


def host_seconds(case: Case, implementation: str) -> float:
    """What a call costs the host of a GPU, which does not wait for it."""
    call, calls = case.make(case, device(), SEED)[implementation], 3  # more could fill the launch queue and wait
    call()
    torch.cuda.synchronize()
    return timeit.timeit(call, number=calls) / calls


def row(case: Case, implementation: str, limits: dict[str, float], seconds: list[float], peak=None, host=None) -> dict:
    """One line of results/: times in ms, rates, and the share of the floor. `peak`: bytes; `host`: seconds."""
    median = statistics.median(seconds)
    by_bytes = case.bytes_floor / limits["bytes_per_second"]
    by_flop = case.flops_floor / limits["flop_per_second"]
    return {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "implementation": implementation,
        **milliseconds(seconds),
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


def run_once(wanted: str, implementation: str, among: Sequence[Case]) -> None:
    """One run of the first case of the op `wanted`, or whose name begins with it, between CUDA profiler start and stop.

    Raises:
        ValueError: no case has such a name, or the implementation does not run it here.
    """
    named = [case for case in among if case.op == wanted] or [case for case in among if case.name.startswith(wanted)]
    if not named:
        raise ValueError(f"no case is {wanted!r}; there are: {'; '.join(case.name for case in among)}.")
    runs = named[0].make(named[0], device(), SEED)
    if implementation not in runs:
        raise ValueError(f"{named[0].name} is not run by {implementation!r} here; by {', '.join(runs)}.")
    runs[implementation]()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    runs[implementation]()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def chosen_cases(only: str | None, quick: bool) -> list[Case]:
    """On a GPU those with a demand first, at the 8192 rows that most demands name before others."""
    found = choose(list(cases(device())), only)
    if device().type == "cuda":
        found.sort(key=lambda c: (c.op not in DEMANDED, c.shape.get("N", 8192) != 8192))
    return [case.tiny() for case in found] if quick else found


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--only", help="cases whose name holds this regular expression, as fused_grpo_loss")
    parser.add_argument("--by", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, three rounds of each, no memory")
    parser.add_argument("--once", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help="run this alone, to be profiled")
    args = parser.parse_args()
    if args.once:
        run_once(*args.once, list(cases(device())))
        return
    chosen = chosen_cases(args.only, args.quick)
    record = begin() | {"ceilings": (limits := ceilings())}
    keep = keeper(record, "kernels", args.json)
    record["kernels"] = run(chosen, limits, keep, names=args.by, quick=args.quick)
    output(record, args.json, table("kernels", record["kernels"]))


if __name__ == "__main__":
    run_as_script(main, "bench_kernels.py")

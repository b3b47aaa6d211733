"""Each kernel's CPU path beside eager torch, measured now, against bounds that the newest record sets: what CI runs.

    python bench/kernel_bench/guard.py                       exit status 1 where a ratio is out of its bound
    python bench/kernel_bench/guard.py --only sample --json -   the ratios alone

A busy machine must not raise an alarm. So both sides have one thread and are charged processor seconds, which other
processes do not take away; their rounds take turns, so that a slow moment is shared; the median of the pairs' ratios
counts; and what is out of its bound is measured once more. A ratio may be 1.5 times the recorded one: less than the
double of it, more than caches shared with others cost.
"""

import math
import statistics
import time
import timeit
from collections.abc import Iterable
from dataclasses import replace

import torch

from boxgrpo.bench.kernel_bench.cases import Case, cases, choose
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import begin, flags, newest, output
from boxgrpo.trainer.runtime.ranks import RunFailed, run_as_script

TOLERANCE = 1.5  # times the recorded ratio
ROUNDS, LEAST_SECONDS = 9, 0.1  # pairs; of a round
SMALL = {"N": 64, "n": 16}  # rows of logits, where the vocabulary is real


def guarded_cases(only: str | None = None) -> list[Case]:
    """The CPU's cases, with an eighth of the rows where a row is a whole vocabulary."""

    def fewer(case: Case) -> Case:
        return replace(case, shape={key: SMALL.get(key, size) for key, size in case.shape.items()})

    every = [case for case in cases(torch.device("cpu")) if "calls" not in case.shape]
    return choose([fewer(case) if "V" in case.shape else case for case in every], only)


def measure(case: Case) -> dict:
    """Our processor seconds over eager's, pair by pair."""
    runs, timers, calls = case.make(case, torch.device("cpu"), 0), {}, {}
    for name in ("boxgrpo", "eager"):
        runs[name]()  # touches its pages
        timers[name] = timeit.Timer(runs[name], timer=time.process_time)
        calls[name] = math.ceil(LEAST_SECONDS / timers[name].timeit(1))  # a round long enough for the clock
    ratios = []
    for _ in range(ROUNDS):
        ours, eager = (timers[name].timeit(calls[name]) / calls[name] for name in ("boxgrpo", "eager"))
        ratios.append(round(ours / eager, 4))
    spread = [min(ratios), max(ratios)]
    return {"case": case.name, "ratio": statistics.median(ratios), "spread": spread, "samples_ratio": ratios}


def run(only: str | None = None) -> dict:
    """A row for each case. This process has one thread from then on."""
    torch.set_num_threads(1)
    return {"threads": 1, "rows": [measure(case) for case in guarded_cases(only)]}


def out_of_bounds(rows: Iterable[dict], recorded: dict) -> list[str]:
    """The cases whose ratio is more than TOLERANCE times the recorded one. Raises ValueError for one without record."""
    bounds = {row["case"]: TOLERANCE * row["ratio"] for row in recorded["rows"]}
    rows = list(rows)
    if unknown := [row["case"] for row in rows if row["case"] not in bounds]:
        raise ValueError(f"the newest record has no ratio of {'; '.join(unknown)}; `make bench` makes one that has.")
    for row in rows:
        word = "within" if row["ratio"] <= bounds[row["case"]] else "OUT OF"
        print(f"{row['case']:<66}{row['ratio']:>8.3f} x eager, {word} {bounds[row['case']]:.3f}", flush=True)
    return [row["case"] for row in rows if row["ratio"] > bounds[row["case"]]]


def main(args: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument("--only", help="cases whose name holds this regular expression")
    o = parser.parse_args(args)
    if o.json:
        record = begin() | {"guard": run(o.only)}
        output(record, o.json, table("guard", record["guard"]))
        return
    if "guard" not in (recorded := newest()):
        raise ValueError("the newest record of a CPU has no part guard; `make bench` makes one.")
    if out := out_of_bounds(run(o.only)["rows"], recorded["guard"]):
        print("once more:")
        again = [measure(case) for case in guarded_cases() if case.name in out]
        if out := out_of_bounds(again, recorded["guard"]):
            raise RunFailed(f"{'; '.join(out)}: more than {TOLERANCE} times the recorded ratio to eager, twice.")


if __name__ == "__main__":
    run_as_script(main, "guard.py")

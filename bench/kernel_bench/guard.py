"""Each kernel's CPU path beside eager torch, fresh, in bounds that the newest record sets: what CI runs.

    python bench/kernel_bench/guard.py                       exit status 1 where a ratio is out of its bound
    python bench/kernel_bench/guard.py --only sample --json -   the ratios alone

A busy machine must not raise an alarm. So both sides have one thread and are charged processor seconds, which other
processes do not take away; their rounds take turns, so that a slow moment is shared; the median of the pairs' ratios
counts; and what is out of its bound is measured once more. A ratio may be 1.5 times the recorded one: less than the
double of it, more than caches shared with others cost.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench.cases import Case, cases, holding
from boxgrpo.bench.publish.result_files import begin, dump, newest, write

ROOM = 1.5  # times the recorded ratio
ROUNDS, LEAST_SECONDS = 9, 0.1  # pairs; of a round
SMALL = {"N": 64, "n": 16}  # rows of logits, where the vocabulary is real


def guarded(only: str | None = None) -> list[Case]:
    """The CPU's cases, with an eighth of the rows where a row is a whole vocabulary."""

    def fewer(case: Case) -> Case:
        return replace(case, shape={key: SMALL.get(key, size) for key, size in case.shape.items()})

    every = cases(torch.device("cpu"))
    return holding([fewer(case) if "V" in case.shape else case for case in every], only)


def measured(case: Case) -> dict:
    """Our processor seconds over eager's, pair by pair."""
    runs = case.make(case, torch.device("cpu"), 0)
    ours, eager = (_round(runs[name]) for name in ("boxgrpo", "eager"))
    pairs = [(ours(), eager()) for _ in range(ROUNDS)]
    ratios = [round(a / b, 4) for a, b in pairs]
    spread = [min(ratios), max(ratios)]
    return {"case": case.name, "ratio": statistics.median(ratios), "spread": spread, "samples_ratio": ratios}


def _round(run: Callable[[], object]) -> Callable[[], float]:
    """Processor seconds of a call, by as many calls as make a round long enough for the clock."""
    run()  # pages in

    def seconds(calls: int) -> float:
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls

    calls = math.ceil(LEAST_SECONDS / seconds(1))
    return lambda: seconds(calls)


def run(only: str | None = None) -> dict:
    """A row for each case. This process has one thread from then on."""
    torch.set_num_threads(1)
    return {"threads": 1, "rows": [measured(case) for case in guarded(only)]}


def out_of_bounds(rows: Iterable[dict], recorded: dict) -> list[str]:
    """The cases whose ratio is more than ROOM times the recorded one. Raises ValueError for a case without record."""
    bounds = {row["case"]: ROOM * row["ratio"] for row in recorded["rows"]}
    rows = list(rows)
    if unknown := [row["case"] for row in rows if row["case"] not in bounds]:
        raise ValueError(f"the newest record has no ratio of {'; '.join(unknown)}; `make bench` makes one that has.")
    for row in rows:
        word = "within" if row["ratio"] <= bounds[row["case"]] else "OUT OF"
        print(f"{row['case']:<66}{row['ratio']:>8.3f} x eager, {word} {bounds[row['case']]:.3f}", flush=True)
    return [row["case"] for row in rows if row["ratio"] > bounds[row["case"]]]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--json", help="write the ratios there, - for standard output; holds them to no bound")
    o = parser.parse_args(args)
    record = begin()
    if o.json:
        record["guard"] = run(o.only)
        print(dump(record)) if o.json == "-" else write(record, Path(o.json))
        return
    recorded = newest()
    if "guard" not in recorded:
        raise ValueError("the newest record of a CPU has no part guard; `make bench` makes one.")
    out = out_of_bounds(run(o.only)["rows"], recorded["guard"])
    if out:
        print("once more:")
        again = [measured(case) for case in guarded() if case.name in out]
        out = out_of_bounds(again, recorded["guard"])
    if out:
        raise ValueError(f"{'; '.join(out)}: slower beside eager than recorded, by more than {ROOM} times, twice.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_guard.py: {error}")

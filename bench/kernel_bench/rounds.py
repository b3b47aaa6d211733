"""The kernel benchmark's rounds on a CPU. pytest-benchmark collects them for `bench_kernels.times_on_cpu`.

The implementations of a case take turns, so that a slow moment of the machine is shared.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from boxgrpo.bench.peers import skipped

from .cases import cases
from .kernels_table import SEED

CPU = torch.device("cpu")
CASES = {case.name: case for case in cases(CPU)}
IMPLEMENTATIONS = ("boxgrpo", "boxgrpo, overwriting", "eager", "compile", "liger", "trl", "one read")
TURNS, SMALL_ROUNDS = 4, 12  # rounds in a turn of what takes microseconds; what is large has one


@functools.lru_cache(1)  # a case's inputs are large
def runs(name: str) -> dict[str, Callable[[], object]]:
    return CASES[name].make(CASES[name], CPU, SEED)


# The last of these varies slowest.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("turn", range(TURNS))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cpu(benchmark, case, turn, implementation):
    run = runs(case.name).get(implementation)
    if run is None or implementation in skipped([implementation]):
        pytest.skip(f"no {implementation} here")
    if turn == 0:
        run()  # compiles, pages in
    benchmark.extra_info.update(case=case.name, implementation=implementation)
    large = case.shape.get("V", 0) > 10_000
    benchmark.pedantic(run, rounds=1 if large else SMALL_ROUNDS, warmup_rounds=0 if large else 5)

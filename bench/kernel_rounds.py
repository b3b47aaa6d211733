"""The kernel benchmark's rounds on a CPU. pytest-benchmark collects them for `bench_kernels.times_on_cpu`."""

import pytest
import torch

from boxgrpo.bench.bench_kernels import SEED
from boxgrpo.bench.cases import cases
from boxgrpo.bench.peers import skipped

CPU = torch.device("cpu")
IMPLEMENTATIONS = ("boxgrpo", "boxgrpo, overwriting", "eager", "compile", "liger", "trl", "one read")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", list(cases(CPU)), ids=lambda case: case.name)
def test_cpu(benchmark, case, implementation):
    run = case.make(case, CPU, SEED).get(implementation)
    if run is None or implementation in skipped([implementation]):
        pytest.skip(f"no {implementation} here")
    run()  # compiles, pages in
    benchmark.extra_info.update(case=case.name, implementation=implementation)
    large = case.shape.get("V", 0) > 10_000
    benchmark.pedantic(run, rounds=3 if large else 50, warmup_rounds=0 if large else 5)

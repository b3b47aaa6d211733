"""The kernel benchmark's cases by pytest-benchmark: each public op beside eager torch, in a group for each case.

    pytest --benchmark-only bench/kernel_bench/test_ops.py [-k "group_advantages and eager"]

Its options apply: --benchmark-autosave and --benchmark-compare keep and compare runs, --benchmark-json writes one.
`make test` does not collect this file. bench/kernel_bench/run.py has all peers, in turns, with memory and floors.
"""

import pytest
import torch

from .cases import Case, cases
from .run import SEED, device


@pytest.mark.parametrize("side", ("boxgrpo", "eager"))
@pytest.mark.parametrize("case", list(cases(device())), ids=lambda case: case.name)
def test_op(benchmark, case: Case, side: str) -> None:
    run = case.make(case, device(), SEED)[side]

    def run_and_wait() -> None:
        run()
        if device().type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info |= {"bytes": case.bytes_floor, "flop": case.flops_floor}
    run_and_wait()  # loads kernels and touches pages
    benchmark(run_and_wait)

"""One run of a case of the kernel benchmark, between cudaProfilerStart and Stop; nsight.sh starts it under ncu.

python -P -m boxgrpo.bench.profiles.nsight_worker CASE IMPLEMENTATION
"""

import sys
from collections.abc import Callable, Sequence

import torch

from boxgrpo.bench.kernel_bench.cases import Case, cases
from boxgrpo.bench.kernel_bench.run import SEED
from boxgrpo.trainer.runtime.ranks import run_as_script


def chosen(wanted: str, implementation: str, among: Sequence[Case], device: torch.device) -> Callable[[], object]:
    """The first case of the op `wanted`, or whose name begins with it, as `implementation` runs it.

    Raises:
        ValueError: no case has such a name, or nobody of that name runs it here.
    """
    of_op = [case for case in among if case.op == wanted]
    found = next(iter(of_op or [case for case in among if case.name.startswith(wanted)]), None)
    if found is None:
        raise ValueError(f"no case is {wanted!r}; there are: {'; '.join(case.name for case in among)}.")
    runs = found.make(found, device, SEED)
    if implementation not in runs:
        raise ValueError(f"{found.name} is not run by {implementation!r} here; by {', '.join(runs)}.")
    return runs[implementation]


def main(wanted: str, implementation: str) -> None:
    device = torch.device("cuda")
    run = chosen(wanted, implementation, list(cases(device)), device)
    run()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    run_as_script(lambda: main(*sys.argv[1:]), "nsight_worker")

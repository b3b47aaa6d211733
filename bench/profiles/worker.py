"""Some steps of a case by our loop, some of them profiled; profile_step.py starts it, under nsys where that is.

python -P -m boxgrpo.bench.profiles.worker '{"case": {...}, "folder": ..., "output_dir": ..., "steps": 4, ...}'
"""

import json
import sys
from pathlib import Path

from boxgrpo.bench.step_bench.cases import StepCase
from boxgrpo.bench.step_bench.sides import benchmark_hooks, our_options
from boxgrpo.trainer import grpo
from boxgrpo.trainer.runtime.ranks import ranks


def main() -> None:
    given = json.loads(sys.argv[1])
    case = StepCase(**given["case"] | {"side": tuple(given["case"]["side"])})
    more = {"profile_steps": given["profile_steps"], "overwrite_output_dir": True}
    options = our_options(case, Path(given["folder"]), given["output_dir"], given["steps"], **more)
    with ranks() as r:
        grpo.train(options, r, benchmark_hooks(case))


if __name__ == "__main__":
    main()

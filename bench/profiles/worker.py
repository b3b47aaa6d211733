"""Some steps of a case by our loop, some of them profiled; profile_step.py starts it, under nsys where that is.

python -P -m boxgrpo.bench.profiles.worker '{"case": {...}, "folder": ..., "output_dir": ..., "steps": 4, ...}'
"""

import json
import sys
from pathlib import Path
from unittest import mock

from boxgrpo.bench.step_bench.cases import StepCase
from boxgrpo.bench.step_bench.sides import engine_of, our_options, whole_and_paid
from boxgrpo.trainer import grpo
from boxgrpo.trainer.runtime.ranks import ranks


def main() -> None:
    asked = json.loads(sys.argv[1])
    case = StepCase(**asked["case"] | {"side": tuple(asked["case"]["side"])})
    options = our_options(
        case,
        Path(asked["folder"]),
        asked["output_dir"],
        asked["steps"],
        profile_steps=asked["profile_steps"],
        overwrite_output_dir=True,
    )
    engine = mock.patch.object(grpo, "make_engine", engine_of(case))
    with whole_and_paid(), engine, ranks() as r:
        grpo.train(options, r)


if __name__ == "__main__":
    main()

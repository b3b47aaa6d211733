"""The GRPO loop with a NaN in the loss now and then, and a log of every step; bench/soaks/soak.py starts it.

torchrun bench/soaks/worker.py --soak_seed 0 [flags of trainer/grpo.py]
"""

import argparse
import ctypes
import json
import os
import random
from pathlib import Path

from boxgrpo.bench.processes import process_tree, resident_bytes
from boxgrpo.bench.soaks.kills import logged
from boxgrpo.trainer import grpo
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.run import Hooks
from boxgrpo.trainer.runtime.files import open_lines
from boxgrpo.trainer.runtime.ranks import run_as_script

NAN_SHARE = 0.03  # of the steps


def nan_rank(seed: int, step: int, world_size: int) -> int | None:
    """The rank whose loss is NaN at this step, the same however often the step is taken; mostly None."""
    draw = random.Random(f"{seed} {step}")
    return draw.randrange(world_size) if draw.random() < NAN_SHARE else None


class Faults:
    """Makes some losses NaN, and notes that in a log, and after each step this rank's memory and its loader's.

    Free memory is returned to the system before it is read: protobuf, with which TensorBoard writes, returns it on
    rank 0 at moments of its own, and that rank would seem to shrink.
    """

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder, self.step = seed, folder, None
        self.rank, self.world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        self.step_log = open_lines(folder / f"step_log.rank{self.rank}.jsonl")

    def pack_loss(self, loss):
        if self.step is None:  # every step is logged, and the metrics of those after the checkpoint are cut off
            self.step = logged(self.folder)
        if nan_rank(self.seed, self.step + 1, self.world_size) != self.rank:
            return loss
        self.step_log.write(json.dumps({"step": self.step + 1, "nan": True}) + "\n")
        return loss * float("nan")

    def step_taken(self, step: int) -> None:
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)
        me, *others = process_tree(os.getpid())
        sizes = {"resident": resident_bytes(me), "anonymous": resident_bytes(me, anonymous=True)}
        sizes["loader"] = sum(map(resident_bytes, others))
        self.step_log.write(json.dumps({"step": step, **sizes}) + "\n")
        self.step = step


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--soak_seed", type=int, required=True)
    own, flags = parser.parse_known_args(args)
    faults = Faults(own.soak_seed, Path(parse(GrpoOptions, flags).output_dir))
    grpo.main(flags, Hooks(pack_loss=faults.pack_loss, step_taken=faults.step_taken))


if __name__ == "__main__":
    run_as_script(main, "worker.py")

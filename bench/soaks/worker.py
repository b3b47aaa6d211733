"""The GRPO loop with a NaN in the loss now and then, and a diary of every step; bench/soaks/soak.py starts it.

    torchrun bench/soaks/worker.py --soak_seed 0 [flags of trainer/grpo.py]

The loop itself knows nothing of this: what it calls is replaced from outside.
"""

import argparse
import ctypes
import json
import os
import random
import sys

from boxgrpo.bench.launches import descendants, resident_kb
from boxgrpo.trainer import grpo

NAN_SHARE = 0.03  # of the steps


def nan_rank(seed: int, step: int, world_size: int) -> int | None:
    """The rank whose loss is NaN at this step, the same however often the step is taken; mostly None."""
    draw = random.Random(f"{seed} {step}")
    return draw.randrange(world_size) if draw.random() < NAN_SHARE else None


def disturb(seed: int) -> None:
    """Replace the loop's loss and reporter."""
    loss, diaries = grpo.fused_grpo_loss, []

    class Diary(grpo.Reporter):
        """A line a step, on every rank: its memory, that of its loader, and whether its loss was made NaN.

        What is free goes back to the system first: protobuf, which TensorBoard writes with, gives it back on rank 0
        whenever it likes, and that rank would seem to shrink.
        """

        def __init__(self, folder, ranks, total_steps: int, title: str, start: int = 0):
            super().__init__(folder, ranks, total_steps, title, start=start)
            self.step, self.ranks, self.nan = start, ranks, False
            self.path = folder / f"diary.rank{ranks.rank}.jsonl"
            diaries.append(self)

        def advance(self, **shown: float) -> None:
            super().advance(**shown)
            self.step += 1
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
                trim(0)
            me, *others = descendants(os.getpid())
            line = {"step": self.step, "rss_kb": resident_kb(me), "anonymous_kb": resident_kb(me, "RssAnon")}
            line["loader_kb"] = sum(map(resident_kb, others))
            with self.path.open("a") as file:
                file.write(json.dumps(line | {"nan": self.nan}) + "\n")
            self.nan = False

    def faulty_loss(*args, **options):
        value, stats = loss(*args, **options)
        diary = diaries[-1]
        if nan_rank(seed, diary.step + 1, diary.ranks.world_size) == diary.ranks.rank:
            diary.nan = True
            value = value * float("nan")
        return value, stats

    grpo.fused_grpo_loss, grpo.Reporter = faulty_loss, Diary


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--soak_seed", type=int, required=True)
    own, flags = parser.parse_known_args(args)
    disturb(own.soak_seed)
    grpo.main(flags)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"soak_worker.py: {error}")

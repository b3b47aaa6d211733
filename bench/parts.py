"""The functions that bench.py runs, each in a process of its own; what one has so far goes to a file after each row.

python bench/parts.py FUNCTION FILE OPTIONS        OPTIONS as JSON; runner.py starts it
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench import guard as guard_bench
from boxgrpo.bench.kernel_bench import run as kernel_bench
from boxgrpo.bench.kernel_bench.cases import Case, cases, choose
from boxgrpo.bench.profiles import profile_step
from boxgrpo.bench.records import write
from boxgrpo.bench.reward_bench import run as reward_bench
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.step_bench import run as step_bench
from boxgrpo.bench.step_bench.cases import TEXTS, StepCase, step_cases
from boxgrpo.bench.step_bench.run import Plan
from boxgrpo.trainer.runtime.ranks import run_as_script

Keep = Callable[[dict], None]

ROOT = Path(__file__).resolve().parent.parent
DEMANDED = ("fused_grpo_loss_from_logits", "fused_grpo_loss", "sample_tokens", "group_advantages")
TINY = {"N": 16, "V": 160, "H": 8, "n": 4, "B": 3, "G": 4}
TINY_STEP = StepCase("tiny", images=2, side=(56, 84), generations=4, tokens=6)
# TRL's steps are what takes long; sizes that the rows have cost nothing more.
QUARTER_HOUR = Plan(
    peer_steps={"trl": (2, 1), "univg_r1": (2, 0)},
    growth={"images": (1, 4, 6), "generations": (4, 8, 16), "tokens": (16, 32, 64), "prompts": (1, 2, 4)},
    growth_steps=3,
)
GPU_STEPS = Plan(peer_steps=dict.fromkeys(step_bench.PEERS, (2, 2)), growth={})
GPU_GROWTH = {"images": (1, 2, 4, 6), "generations": (4, 8, 16), "tokens": (64, 128, 256), "prompts": (1, 2, 4)}


def build(o: Namespace, keep: Keep) -> None:
    """The box parser, compiled in place. Raises ValueError where it does not serve the device afterwards."""
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    check = f"import boxgrpo.kernels; assert boxgrpo.kernels.dispatch.is_compiled({kind!r})"
    if done.returncode or subprocess.run([sys.executable, "-P", "-c", check]).returncode:  # it was not loaded here
        raise ValueError(f"csrc/ was not compiled for {kind}; the compiler's message stands above.")


def tests(o: Namespace, keep: Keep) -> None:
    """pytest on the files that have tests for a GPU; for a CPU on one that has none. Its last line is the log's."""
    gpu = torch.cuda.is_available()
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [file for file in every if re.search(r"mark\.gpu|\bBACKENDS\b|\bon_triton\b", file.read_text())]
    files = [str(file.relative_to(ROOT)) for file in files] if gpu else ["tests/kernel_tests/test_boxes.py"]
    flags = ["-v", "--tb=short", "-p", "no:cacheprovider", *(["-m", "gpu"] if gpu else [])]
    if importlib.util.find_spec("xdist"):
        flags += ["-n", str(min(12, os.cpu_count() or 1))]
    # -P: else the repository's own folder `kernels` would stand first on the path.
    sys.exit(subprocess.run([sys.executable, "-P", "-m", "pytest", *flags, *files]).returncode)


def kernel_cases(o: Namespace) -> list[Case]:
    """On a GPU those with a demand first, at the 8192 rows that most demands name before others."""
    found = choose(list(cases(kernel_bench.device())), o.only)
    if o.quick:
        return [replace(case, shape=tiny(case), bytes_floor=1.0, flops_floor=1.0) for case in found]
    if torch.cuda.is_available():
        found.sort(key=lambda c: (c.op not in DEMANDED, c.shape.get("N", 8192) != 8192))
    return found


def tiny(case: Case) -> dict[str, int]:
    """Small sizes for a case; what forbids the vocabulary's last tokens has the whole vocabulary."""
    kept = ("V",) if case.op == "sample_tokens" else ()
    return {key: size if key in kept else TINY[key] for key, size in case.shape.items()}


def kernels(o: Namespace, keep: Keep) -> None:
    """Rows of every case; with `compiled` true or false those of torch.compile alone, or all others."""
    compiled = getattr(o, "compiled", None)
    names = [n for n in kernel_bench.IMPLEMENTATIONS if compiled is None or (n == "compile") == compiled]
    keep(kernel_bench.run(kernel_cases(o), o.ceilings, keep, names=names, quick=o.quick))


def guard(o: Namespace, keep: Keep) -> None:
    keep(guard_bench.run(o.only))


def rewards(o: Namespace, keep: Keep) -> None:
    keep(reward_bench.run(o.merges))


def step(o: Namespace, keep: Keep) -> None:
    """All rows beside all peers, and their growth; or those with so many `images`."""
    every, images = step_cases(torch.cuda.is_available()), getattr(o, "images", None)
    plan = GPU_STEPS if images else Plan() if o.full else QUARTER_HOUR
    chosen = choose([case for case in every if images is None or case.images in images], o.only)
    if o.quick:
        chosen, plan = [replace(TINY_STEP, images=n) for n in images or (2,)], replace(GPU_STEPS, steps=2)
    elif o.only:
        plan = replace(plan, growth={})
    tokenizer, vocabulary = benchmark_tokenizer(o.merges, TEXTS)

    def keep_named(found: dict) -> None:
        keep(found | {"vocabulary": vocabulary})

    keep_named(step_bench.run(chosen, o.peers, plan, tokenizer, o.ceilings, keep_named))


def growth(o: Namespace, keep: Keep) -> None:
    """Our step of the first case against each of its sizes."""
    plan = Plan(growth={"images": (1, 2)} if o.quick else GPU_GROWTH, growth_steps=2)
    with tempfile.TemporaryDirectory() as at:
        arguments = plan, first_case(o), Path(at), benchmark_tokenizer(o.merges, TEXTS)[0], {}
        keep({"growth": step_bench.growth(*arguments, lambda found: keep({"growth": found}))})


def profile(o: Namespace, keep: Keep) -> None:
    """Two steps of the first case, range by range."""
    tokenizer, _ = benchmark_tokenizer(o.merges, TEXTS)
    keep(profile_step.run(first_case(o), Path(o.folder) / "profile", 2, tokenizer, o.ceilings))


def first_case(o: Namespace) -> StepCase:
    return TINY_STEP if o.quick else step_cases(torch.cuda.is_available())[0]


FUNCTIONS = {part.__name__: part for part in (build, tests, kernels, guard, rewards, step, growth, profile)}


def main() -> None:
    name, path, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    FUNCTIONS[name](Namespace(folder=path.parent, **options), lambda found: write(found, path))


if __name__ == "__main__":
    run_as_script(main, "parts.py")

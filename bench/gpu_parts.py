"""One part of `bench_gpu.py`, in a process of its own: what it measures goes to a file after each row.

    python bench/gpu_parts.py kernels --json FILE [--ceilings FILE] [--quick]

A part that is stopped leaves its file with what there is; one that fails, for one row, goes on with the next and notes
the error. `--quick` takes tiny sizes, to try a part where there is no GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench import kernels_table as bench_kernels
from boxgrpo.bench.kernel_bench.cases import Case
from boxgrpo.bench.peers import skipped
from boxgrpo.bench.profiles import profile_step
from boxgrpo.bench.publish.result_files import begin, write
from boxgrpo.bench.reward_bench import rewards_table as bench_rewards
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.step_bench import step_table as bench_step
from boxgrpo.bench.step_bench.cases import TEXTS, StepCase, step_cases
from boxgrpo.bench.step_bench.floors import limits

Keep = Callable[[dict], None]

FIRST = ("boxgrpo", "one read", "boxgrpo, overwriting", "liger", "trl", "eager")  # before what has to be compiled
DEMANDED = ("fused_grpo_loss_from_logits", "fused_grpo_loss", "sample_tokens", "group_advantages")
TINY = {"N": 16, "V": 160, "H": 8, "n": 4, "B": 3, "G": 4}
TINY_STEP = StepCase("tiny", images=2, side=(56, 84), generations=4, tokens=6)
GROWTH = {"images": (1, 2, 6), "generations": (4, 16), "tokens": (64, 128), "prompts": (2, 4)}  # beside 4, 8, 256, 1


def kernel_cases(quick: bool) -> list[Case]:
    """Those with a demand first, at the 8192 rows that most demands name before others."""
    cases = bench_kernels.chosen(None)
    if quick:
        return [replace(case, shape=tiny(case), bytes_floor=1.0, flops_floor=1.0) for case in cases]
    return sorted(cases, key=lambda c: (c.op not in DEMANDED, c.shape.get("N", 8192) != 8192))


def tiny(case: Case) -> dict[str, int]:
    """Small sizes for a case; what forbids the vocabulary's last tokens keeps the vocabulary."""
    kept = ("V",) if case.op == "sample_tokens" else ()
    return {key: size if key in kept else TINY[key] for key, size in case.shape.items()}


def kernels(args, measured: dict, keep: Keep) -> dict:
    """Rows of every case by what needs no compiling; with --compiled those of torch.compile."""
    how = {"names": ("compile",) if args.compiled else FIRST}
    if torch.cuda.is_available():
        how["more"] = bench_kernels.peak_and_host
    else:
        how["seconds"] = lambda run: [timed(run) for _ in range(3)]
    return bench_kernels.one_by_one(kernel_cases(args.quick), measured, keep, **how)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rewards(args, measured: dict, keep: Keep) -> dict:
    return bench_rewards.run(args.merges)


def step(args, measured: dict, keep: Keep) -> dict:
    """The rows that --images names, of the 2B and then of the 7B, beside the peers."""
    tokenizer, vocabulary = benchmark_tokenizer(args.merges, TEXTS)
    cases = [case for case in step_cases(torch.cuda.is_available()) if case.images in args.images]
    if args.quick:
        cases = [replace(TINY_STEP, images=n) for n in args.images]
    peer_steps = dict.fromkeys(bench_step.PEERS, (args.peer_steps, args.peer_steps))
    plan = bench_step.Plan(steps=args.steps, peer_steps=peer_steps, growth={})
    return bench_step.run(
        cases, args.peers, plan, tokenizer, measured, lambda found: keep(found | {"vocabulary": vocabulary})
    ) | {"vocabulary": vocabulary}


def growth(args, measured: dict, keep: Keep) -> dict:
    """Our step of the first case against each of its sizes."""
    tokenizer, _ = benchmark_tokenizer(args.merges, TEXTS)
    case = TINY_STEP if args.quick else step_cases(torch.cuda.is_available())[0]
    sizes = {"images": (1, 2)} if args.quick else {k: (*v, getattr(case, k)) for k, v in GROWTH.items()}
    plan = bench_step.Plan(growth={k: tuple(sorted(v)) for k, v in sizes.items()}, growth_steps=2)
    with tempfile.TemporaryDirectory() as at:
        found = bench_step.growth(plan, case, Path(at), tokenizer, {}, lambda found: keep({"growth": found}))
    return {"growth": found}


def profile(args, measured: dict, keep: Keep) -> dict:
    """Two steps of the first case, range by range."""
    tokenizer, _ = benchmark_tokenizer(args.merges, TEXTS)
    case = TINY_STEP if args.quick else step_cases(torch.cuda.is_available())[0]
    return profile_step.run(case, Path(args.json).with_suffix(""), 2, tokenizer, measured)


def build(args, measured: dict, keep: Keep) -> dict:
    """The box parser, compiled in place. Raises ValueError where that does not know the device afterwards."""
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    asked = f"import boxgrpo.kernels; assert ('box_iou', {kind!r}) in boxgrpo.kernels.dispatch._COMPILED"
    if done.returncode or subprocess.run([sys.executable, "-P", "-c", asked]).returncode:  # it was not loaded here
        raise ValueError(f"csrc/ was not compiled for {kind}; what the compiler said stands above.")
    return {}


def look(args, measured: dict, keep: Keep) -> dict:
    """What is here: the record has the machine, this the peers that are missing."""
    return {"cuda": torch.cuda.is_available(), "skipped": skipped(bench_kernels.PEERS)}


PARTS = {part.__name__: part for part in (look, build, kernels, rewards, step, growth, profile)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--json", required=True, help="where the record goes")
    parser.add_argument("--ceilings", help="a record to take the machine's ceilings from, instead of measuring them")
    parser.add_argument("--compiled", action="store_true", help="kernels by torch.compile alone")
    parser.add_argument("--images", type=int, nargs="+", default=[4], help="steps with so many images a prompt")
    parser.add_argument("--peers", nargs="*", default=list(bench_step.PEERS), help="sides beside ours")
    parser.add_argument("--steps", type=int, default=4, help="steps of ours, the first among them")
    parser.add_argument(
        "--peer_steps", type=int, default=2, help="and of each other side, which take many times as long"
    )
    parser.add_argument("--merges", help="a Qwen2 tokenizer's merges.txt")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    record, path = begin(), Path(args.json)
    if args.part not in ("look", "build"):
        known = Path(args.ceilings) if args.ceilings else path
        kept = json.loads(known.read_text()) if known.exists() else {}
        record["ceilings"] = kept.get("ceilings") or limits()
        write(record, path)

    def keep(found: dict) -> None:
        write(record | {args.part: found}, path)

    keep(PARTS[args.part](args, record.get("ceilings", {}), keep))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"gpu_parts.py: {error}")

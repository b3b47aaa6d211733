"""A whole GRPO step beside TRL's `GRPOTrainer` and the paper's trainer, phase by phase beside what the machine allows,
and how it grows.

    python bench/step_bench/step_table.py --peers trl univg_r1 --growth        all rows
    python bench/step_bench/step_table.py --peers trl --images 4 --json -      one row, printed as JSON

`make bench` keeps the results. On a CPU a 44M-parameter Qwen2-VL with the real vocabulary in fp32; on a GPU the
published sizes of the 2B and the 7B in bf16; weights are random. Each side runs in a fresh process, and a step's
seconds are the median of those after the first (of a single step, its own), from one step's begin to the next's, data
and logging included. A ratio is over the same steps of both sides: where a peer takes one, over our first. The phases
are those of that very step; on a GPU, where they overlap, of a second run in which each waits for the device. Peak
memory is what is held above the loaded model: reference, gradients, moments and activations. A peer whose package is
missing is skipped, and named. The vocabulary is made from Qwen2's merges.txt (--merges; default: data/qwen2_tokenizer
under BOXGRPO_SHARED or ../shared), or without it one of as many tokens.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from boxgrpo.bench.peers import NAMES, skipped
from boxgrpo.bench.publish.result_files import begin, dump, later, write
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.step_bench.cases import ASKED, MODELS, TEXTS, StepCase, asked_case, prepare, step_cases
from boxgrpo.bench.step_bench.floors import floors, limits, work
from boxgrpo.bench.step_bench.sides import Side, run_side
from boxgrpo.model.checkpoint import read_config

PEERS = {"trl": "", "univg_r1": "univg_r1_"}  # and what their ratios' names begin with
SIDES = ("ours", "trl", "univg_r1")  # as tables have them
PHASES = ("data", "vision", "prefill", "decode", "reward", "pack", "reference", "policy_forward", "backward")
PHASES += ("optimizer", "other")
# What is left of a stage without the phases inside.
RENAMED = {"rollout": "decode", "policy": "policy_forward", "forward": "policy_forward"}
GROWTH = {"images": (1, 2, 4, 6), "generations": (4, 8, 16), "tokens": (16, 32, 64, 128), "prompts": (1, 2, 4)}


@dataclass(frozen=True)
class Plan:
    """How much is measured: steps, the first among them, and the sizes at which our step is looked at again."""

    steps: int = 4  # of ours in each row
    # Of each peer in the first row and in the others; 0: it is not run there.
    peer_steps: dict[str, tuple[int, int]] = field(default_factory=lambda: dict.fromkeys(PEERS, (4, 4)))
    growth: dict[str, tuple[int, ...]] = field(default_factory=lambda: GROWTH)  # none: no growth
    growth_steps: int = 4


def fresh(side: str, case: StepCase, at: Path, steps: int) -> Side | str:
    """`run_side` in a process of its own, which may start workers.

    On a CPU it is forked off a process that has imported what is ours, and no peer.
    """
    gpu = torch.cuda.is_available()
    context = get_context("spawn" if gpu else "forkserver")
    if not gpu:
        context.set_forkserver_preload(["boxgrpo.bench.step_bench.sides"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(run_side, side, case, at, steps).result()
        except BrokenProcessPool:
            return "failed: its process died"


def row(case: StepCase, sides: dict[str, Side | str], at: Path, measured: dict[str, float]) -> dict:
    """One line of results/. Of a side that had no room, or failed, there is the error, and no ratio."""
    found = asdict(case) | {"case": case.name}
    for name, side in sides.items():
        if name == "ours_by_phase":
            continue
        if isinstance(side, str):
            found[f"{name}_error"] = side
            continue
        seconds = later(side.seconds)
        found[f"{name}_s"] = round(statistics.median(seconds), 3)
        found[f"{name}_spread_s"] = [round(min(seconds), 3), round(max(seconds), 3)]
        found[f"{name}_samples_s"] = [round(x, 3) for x in side.seconds]
        found[f"{name}_peak_mb"] = None if side.peak_bytes is None else round(side.peak_bytes / 1e6)
        found[f"{name}_settings"] = side.settings | {"threads": side.threads}
    ours, *peers = (side if isinstance(side := sides.get(name), Side) else None for name in ("ours", *PEERS))
    for (name, prefix), peer in zip(PEERS.items(), peers, strict=True):
        if not ours or not peer:
            continue
        if (ours.prompt_tokens, ours.trained) != (peer.prompt_tokens, peer.trained):
            found[f"{name}_error"] = (
                f"it differs from ours: prompts of {ours.prompt_tokens} and {peer.prompt_tokens} tokens, "
                f"{ours.trained} and {peer.trained} trained parameters"
            )
            continue
        like = ours.seconds[:1] if len(peer.seconds) == 1 else later(ours.seconds)
        found[f"{prefix}ratio"] = round(statistics.median(later(peer.seconds)) / statistics.median(like), 2)
        if ours.peak_bytes and peer.peak_bytes:
            found[f"{prefix}peak_memory_ratio"] = round(ours.peak_bytes / peer.peak_bytes, 3)
    if ours:
        found |= {"prompt_tokens": ours.prompt_tokens, "trained_parameters": ours.trained}
        counted = work(read_config(at / "model"), case, ours.prompt_tokens, ours.trained)
        by_phase = sides.get("ours_by_phase", None if torch.cuda.is_available() else ours)
        if isinstance(by_phase, Side):
            found["phases"] = phases(by_phase, floors(counted, measured))
    return found


def phases(side: Side, least: dict[str, dict]) -> dict[str, dict]:
    """Seconds of each phase of the median step (of two, the faster), which they add up to, and its floor."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for name, value in median_step(side).items():
        name = RENAMED.get(name, name)
        seconds[name] = seconds.get(name, 0.0) + value
    if not seconds["prefill"] or not seconds["backward"]:
        raise ValueError("no prefill or no backward pass was seen; the loop's parts have other names now.")
    return {name: {"seconds": round(value, 6)} | least.get(name, {}) for name, value in seconds.items()}


def median_step(side: Side) -> dict[str, float]:
    return side.steps[side.seconds.index(statistics.median_low(later(side.seconds)))]


def growth(
    plan: Plan,
    base: StepCase,
    at: Path,
    tokenizer,
    known: dict[str, list[float]],
    keep: Callable[[dict], None] = lambda found: None,
) -> dict[str, dict]:
    """Our step's seconds against each size, the others as in `base`, with a straight line through them.

    Of a case's steps after the first the fastest, which was disturbed least. `known`: samples by case of what is
    measured already. `keep` is given what there is after each size.
    """

    def points(cases: list[StepCase]) -> dict[str, list]:
        for case in cases:
            if case.name in known:
                continue
            prepare(case, at, tokenizer)
            side = fresh("ours", case, at, plan.growth_steps)
            if isinstance(side, str):
                raise ValueError(f"{case.name}: {side}")
            known[case.name] = [round(x, 3) for x in side.seconds]
        samples = [known[case.name] for case in cases]
        return {"seconds": [min(later(x)) for x in samples], "samples_s": samples}

    found = {}
    for size, values in plan.growth.items():
        taken = points([replace(base, **{size: value}) for value in values])
        found[size] = {"values": list(values)} | taken | line(values, taken["seconds"])
        keep(found)
    # Where prompts dominate: six images of the default max_pixels, and short answers.
    case = replace(base, images=6, side=(448, 896), tokens=8)
    taken = points([replace(case, generations=g) for g in (8, 16)])
    ratio = taken["seconds"][1] / taken["seconds"][0]
    found["doubled_group"] = {"case": case.name} | taken | {"ratio": round(ratio, 3)}
    return found


def line(values, seconds) -> dict[str, float]:
    """Least squares: seconds = fixed + each · value, and the farthest that a measurement lies off it."""
    each, fixed = np.polyfit(values, seconds, 1)
    off = max(abs(fixed + each * v - s) / s for v, s in zip(values, seconds, strict=True))
    return {"fixed_s": round(fixed, 4), "each_s": round(each, 5), "misfit_percent": round(100 * off, 1)}


def steps_table(result: dict) -> str:
    """Markdown: a line for each row; a peer's columns where it ran."""
    ran = [name for name in SIDES if any({f"{name}_s", f"{name}_error"} & r.keys() for r in result["rows"])]
    head = ["model", "images", "prompts", *(f"{NAMES[name]}, s" for name in ran)]
    head += [f"{NAMES[name]}, ratio" for name in ran if name in PEERS] + [f"{NAMES[name]}, MB" for name in ran]
    lines = [head, ["---"] * len(head)]
    for r in result["rows"]:
        cells = [r["model"], str(r["images"]), str(r["prompts"])]
        cells += [f"{r[f'{name}_s']:.2f}" if f"{name}_s" in r else "-" for name in ran]
        ratios = [r.get(f"{PEERS[name]}ratio") for name in ran if name in PEERS]
        cells += ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
        lines.append(cells + [str(r.get(f"{name}_peak_mb") or "-") for name in ran])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def phases_table(r: dict) -> str:
    """Markdown: where a row's step goes, in ms."""
    lines = ["| phase | ms | floor, ms | set by |", "|---|---|---|---|"]
    for name, p in r["phases"].items():
        floor = f"{1e3 * p['floor_s']:.0f}" if "floor_s" in p else ""
        lines.append(f"| {name.replace('_', ' ')} | {1e3 * p['seconds']:.0f} | {floor} | {p.get('floor_is', '')} |")
    least = sum(p.get("floor_s", 0) for p in r["phases"].values())
    return "\n".join([*lines, f"| step | {1e3 * r['ours_s']:.0f} | {1e3 * least:.0f} | |"])


def growth_table(grown: dict) -> str:
    """Markdown: what each more of a size costs."""
    lines = ["| size | values | fastest step, s | each more, ms | misfit |", "|---|---|---|---|---|"]
    for size in (size for size in GROWTH if size in grown):
        g = grown[size]
        values, seconds = (", ".join(map(str, g[key])) for key in ("values", "seconds"))
        lines.append(f"| {size} | {values} | {seconds} | {1e3 * g['each_s']:.1f} | {g['misfit_percent']:.0f} % |")
    if twice := grown.get("doubled_group"):
        lines += ["", f"Twice the completions, {twice['case']}: x {twice['ratio']}"]
    return "\n".join(lines)


def chosen(args, gpu: bool) -> list[StepCase]:
    """All rows, or the one that the flags ask for."""
    asked = any(getattr(args, key) is not None for key in ASKED)
    return [asked_case(args, gpu)] if asked else step_cases(gpu)


def run(
    cases: list[StepCase],
    peers: Sequence[str],
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    measured: dict[str, float],
    keep: Callable[[dict], None],
) -> dict:
    """Everything that was asked for; `keep` is given what there is after each side, so that a stopped run has it.

    Args:
        peers: sides beside ours; those that are not installed are skipped.
        measured: the machine's ceilings, as `limits` measures them.
    """
    result = {"steps": plan.steps, "skipped": skipped(peers), "rows": []}
    peers, known = [name for name in peers if name not in result["skipped"]], {}
    with tempfile.TemporaryDirectory() as scratch:
        for i, case in enumerate(cases):
            at = Path(scratch) / case.model
            prepare(case, at, tokenizer)
            torch.cuda.empty_cache()  # the sides have the device to themselves
            # On a GPU phases overlap, and are looked at in a run of their own, which waits for each.
            steps = {"ours": plan.steps} | ({"ours_by_phase": plan.steps} if torch.cuda.is_available() else {})
            steps |= {name: plan.peer_steps[name][i > 0] for name in peers}
            sides = {}
            for name in (name for name in steps if steps[name]):
                sides[name] = fresh(name, case, at, steps[name])
                result["rows"][i:] = [found := row(case, sides, at, measured)]
                keep(result)
            if "ours_samples_s" in found:
                known[case.name] = found["ours_samples_s"]
        if plan.growth:

            def keep_growth(found: dict) -> None:
                keep(result | {"growth": found})

            at = Path(scratch) / cases[0].model
            result["growth"] = growth(plan, cases[0], at, tokenizer, known, keep_growth)
            keep(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[], help="who runs the same step")
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], help="one row, of this size")
    parser.add_argument("--images", type=int, help="one row, with this many images a prompt")
    parser.add_argument("--prompts", type=int, help="one row, with this many prompts a step")
    parser.add_argument("--steps", type=int, default=4, help="steps of each side, the first among them")
    parser.add_argument("--growth", action="store_true", help="also our step against each of its sizes")
    parser.add_argument("--merges", help="a Qwen2 tokenizer's merges.txt")
    parser.add_argument("--json", help="write the results there, - for standard output")
    args = parser.parse_args()
    cases = chosen(args, torch.cuda.is_available())
    plan = Plan(args.steps, dict.fromkeys(PEERS, (args.steps,) * 2), GROWTH if args.growth else {}, args.steps)
    tokenizer, vocabulary = benchmark_tokenizer(args.merges, TEXTS)
    record = begin() | {"ceilings": (measured := limits()), "vocabulary": vocabulary}

    def keep(found: dict) -> None:
        if args.json not in (None, "-"):
            write(record | {"step": found}, Path(args.json))

    result = run(cases, args.peers, plan, tokenizer, measured, keep)
    if args.json == "-":
        print(dump(record | {"step": result}))
        return
    told = [f"{r['case']}:\n\n{phases_table(r)}" for r in result["rows"] if "phases" in r]
    print(steps_table(result), *told, sep="\n\n")
    if args.growth:
        print("\n" + growth_table(result["growth"]))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_step.py: {error}")

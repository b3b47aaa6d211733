"""A whole GRPO step beside TRL's `GRPOTrainer` and the paper's trainer, phase by phase beside what the machine allows,
and how it grows.

    python bench/step_bench/run.py --peers trl univg_r1 --growth        all rows
    python bench/step_bench/run.py --peers trl --images 4 --json -      one row, printed as JSON

`make bench` keeps the results. On a CPU a 44M-parameter Qwen2-VL with the real vocabulary in fp32; on a GPU the
published sizes of the 2B and the 7B in bf16; weights are random. Each side runs in a fresh process, and a step's
seconds are the median of those after the first (of a single step, its own), from one step's begin to the next's, data
and logging included. A ratio is over the same steps of both sides: where a peer takes one, over our first. The phases
are those of that very step; on a GPU, where they overlap, of a second run in which each waits for the device. Peak
memory is what is held above the loaded model: reference, gradients, moments and activations. A peer whose package is
missing is skipped, and named. The vocabulary is made from Qwen2's merges.txt (--merges; default: data/qwen2_tokenizer
under BOXGRPO_SHARED or ../shared), or without it one of as many tokens.
"""

import contextlib
import functools
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench.cases import choose
from boxgrpo.bench.kernel_bench.run import ceilings
from boxgrpo.bench.peers import skipped
from boxgrpo.bench.processes import run_isolated
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import begin, flags, keeper, output, without_first
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.step_bench.cases import TEXTS, TINY_STEP, StepCase, add_selectors, choose_cases, prepare
from boxgrpo.bench.step_bench.dry_run import counts_of
from boxgrpo.bench.step_bench.floors import floors
from boxgrpo.bench.step_bench.sides import Side, ours
from boxgrpo.bench.step_bench.trl_side import trl
from boxgrpo.bench.step_bench.univg import univg_r1
from boxgrpo.model.checkpoint import read_config
from boxgrpo.trainer.runtime.ranks import run_as_script

Keep = Callable[[dict], None]
SIDES = {"ours": ours, "ours_by_phase": functools.partial(ours, waits=True), "trl": trl, "univg_r1": univg_r1}
PEERS = {"trl": "", "univg_r1": "univg_r1_"}  # and what their ratios' names begin with
PHASES = ("data", "vision", "prefill", "decode", "reward", "pack", "reference", "policy_forward", "backward")
PHASES += ("optimizer", "other")
# What is left of a stage without the phases inside.
RENAMED = {"rollout": "decode", "policy": "policy_forward", "forward": "policy_forward"}
GROWTH = {"images": (1, 2, 4, 6), "generations": (4, 8, 16), "tokens": (16, 32, 64, 128), "prompts": (1, 2, 4)}


@dataclass(frozen=True)
class Plan:
    """How much is measured: steps, the first among them, and the sizes at which our step is measured again."""

    steps: int = 4  # of ours in each row; 0: no rows
    # Of each peer in the first row and in the others; 0: it is not run there.
    peer_steps: dict[str, tuple[int, int]] = field(default_factory=lambda: dict.fromkeys(PEERS, (4, 4)))
    growth: dict[str, tuple[int, ...]] = field(default_factory=lambda: GROWTH)  # none: no growth
    growth_steps: int = 4


# TRL's steps are what takes long; sizes that the rows have cost nothing more.
QUARTER_HOUR = Plan(
    peer_steps={"trl": (2, 1), "univg_r1": (2, 0)},
    growth={"images": (1, 4, 6), "generations": (4, 8, 16), "tokens": (16, 32, 64), "prompts": (1, 2, 4)},
    growth_steps=3,
)
GPU_GROWTH = GROWTH | {"tokens": (64, 128, 256)}
PLANS = {
    "full": Plan(),
    "quarter_hour": QUARTER_HOUR,
    "gpu": Plan(peer_steps=dict.fromkeys(PEERS, (2, 2)), growth={}),
    "gpu_growth": Plan(steps=0, growth=GPU_GROWTH, growth_steps=2),
}


def run_side(name: str, case: StepCase, folder: Path, steps: int) -> Side | str:
    """One side; where the device's memory is too small for it, or it fails, the error. The others go on."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return SIDES[name](case, folder, steps)
        except torch.OutOfMemoryError as error:
            return f"out of memory: {error}"
        except Exception as error:
            traceback.print_exc()
            return f"failed: {type(error).__name__}: {error}"


def run_fresh(side: str, case: StepCase, at: Path, steps: int) -> Side | str:
    """`run_side` in a process of its own. On a CPU that is forked off one which has imported what is ours, no peer."""
    preload = () if torch.cuda.is_available() else ("boxgrpo.bench.step_bench.sides",)
    try:
        return run_isolated(run_side, side, case, at, steps, preload=preload)
    except ChildProcessError as error:
        return f"failed: {error}"


def counted_on_a_gpu(case: StepCase) -> dict[str, dict]:
    """`counts_of` where the step runs on a GPU, and of the tiny case; nothing where counting fails."""
    if not torch.cuda.is_available() and case != TINY_STEP:
        return {}
    try:
        return counts_of(case)
    except Exception:
        traceback.print_exc()
        return {}


def row(
    case: StepCase,
    sides: dict[str, Side | str],
    at: Path,
    measured: dict[str, float],
    counted: Callable[[], dict[str, dict]] = dict,
) -> dict:
    """One line of results/. Of a side that had too little memory, or failed, there is the error, and no ratio."""
    found = asdict(case) | {"case": case.name}
    for name, side in sides.items():
        if isinstance(side, str):
            found[f"{name}_error"] = side
        elif name != "ours_by_phase":
            seconds = without_first(side.seconds)
            found[f"{name}_s"] = round(statistics.median(seconds), 3)
            found[f"{name}_spread_s"] = [round(min(seconds), 3), round(max(seconds), 3)]
            found[f"{name}_samples_s"] = [round(x, 3) for x in side.seconds]
            found[f"{name}_peak_mb"] = None if side.peak_bytes is None else round(side.peak_bytes / 1e6)
            found[f"{name}_settings"] = side.settings
    if not isinstance(ours := sides.get("ours"), Side):
        return found
    for name, prefix in PEERS.items():
        if isinstance(peer := sides.get(name), Side):
            found |= compare(ours, peer, name, prefix)
    found |= {"prompt_tokens": ours.prompt_tokens, "trained_parameters": ours.trained}
    by_phase = sides.get("ours_by_phase", None if torch.cuda.is_available() else ours)
    if isinstance(by_phase, Side):
        least = floors(read_config(at / "model"), case, ours.prompt_tokens, measured)
        known = {name: least.get(name, {}) | counted().get(name, {}) for name in PHASES}
        found["phases"] = phases(by_phase, known)
    return found


def compare(ours: Side, peer: Side, name: str, prefix: str) -> dict:
    """The peer's ratios to ours, or an error where it did other work."""
    if (ours.prompt_tokens, ours.trained) != (peer.prompt_tokens, peer.trained):
        prompts = f"prompts of {ours.prompt_tokens} and {peer.prompt_tokens} tokens"
        differs = f"it differs from ours: {prompts}, {ours.trained} and {peer.trained} trained parameters"
        return {f"{name}_error": differs}
    like = ours.seconds[:1] if len(peer.seconds) == 1 else without_first(ours.seconds)
    times = statistics.median(without_first(peer.seconds)) / statistics.median(like)
    found = {f"{prefix}ratio": round(times, 2)}
    if ours.peak_bytes and peer.peak_bytes:
        found[f"{prefix}peak_memory_ratio"] = round(ours.peak_bytes / peer.peak_bytes, 3)
    return found


def phases(side: Side, least: dict[str, dict]) -> dict[str, dict]:
    """Seconds of each phase of the median step (of two, the faster), which they add up to, and its floor."""
    seconds = dict.fromkeys(PHASES, 0.0)
    median = side.seconds.index(statistics.median_low(without_first(side.seconds)))
    for name, value in side.steps[median].items():
        name = RENAMED.get(name, name)
        seconds[name] = seconds.get(name, 0.0) + value
    if not seconds["prefill"] or not seconds["backward"]:
        raise ValueError("no prefill or no backward pass was seen; the loop's parts have other names now.")
    return {name: {"seconds": round(value, 6)} | least.get(name, {}) for name, value in seconds.items()}


def growth(plan: Plan, base: StepCase, at: Path, tokenizer, known: dict, keep: Keep) -> dict[str, dict]:
    """Our step's seconds against each size, the others as in `base`, with a straight line through them.

    Of a case's steps after the first the fastest, which was disturbed least. `known`: samples by case of what is
    measured already. `keep` receives what there is after each size.
    """

    def points(cases: list[StepCase]) -> dict[str, list]:
        for case in (case for case in cases if case.name not in known):
            prepare(case, at, tokenizer)
            side = run_fresh("ours", case, at, plan.growth_steps)
            if isinstance(side, str):
                raise ValueError(f"{case.name}: {side}")
            known[case.name] = [round(x, 3) for x in side.seconds]
        samples = [known[case.name] for case in cases]
        return {"seconds": [min(without_first(x)) for x in samples], "samples_s": samples}

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
    each, fixed = statistics.linear_regression(values, seconds)
    off = max(abs(fixed + each * v - s) / s for v, s in zip(values, seconds, strict=True))
    return {"fixed_s": round(fixed, 4), "each_s": round(each, 5), "misfit_percent": round(100 * off, 1)}


def run(cases: list[StepCase], peers: Sequence[str], plan: Plan, tokenizer, measured: dict, keep: Keep) -> dict:
    """All rows and the growth; `keep` receives what there is after each side, so that a stopped run has it.

    Args:
        peers: sides beside ours; those that are not installed are skipped.
        measured: the machine's ceilings, as `ceilings` measures them.
    """
    result, known = {"steps": plan.steps, "skipped": skipped(peers), "rows": []}, {}
    peers = [name for name in peers if name not in result["skipped"]]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        for i, case in enumerate(cases if plan.steps else ()):
            at = Path(scratch) / case.model
            prepare(case, at, tokenizer)
            torch.cuda.empty_cache()  # the sides have the device to themselves
            # On a GPU phases overlap, and are measured in a run of their own, which waits for each.
            steps = {"ours": plan.steps} | ({"ours_by_phase": plan.steps} if torch.cuda.is_available() else {})
            steps |= {name: plan.peer_steps[name][i > 0] for name in peers}
            sides, counted = {}, pool.submit(counted_on_a_gpu, case)  # meanwhile, on another core
            for name in (name for name in steps if steps[name]):
                sides[name] = run_fresh(name, case, at, steps[name])
                result["rows"][i:] = [found := row(case, sides, at, measured, counted.result)]
                keep(result)
            if "ours_samples_s" in found:
                known[case.name] = found["ours_samples_s"]
        if plan.growth:
            at = Path(scratch) / cases[0].model
            arguments = plan, cases[0], at, tokenizer, known
            result["growth"] = growth(*arguments, lambda found: keep(result | {"growth": found}))
            keep(result)
    return result


def chosen_plan(args) -> Plan:
    steps = (args.steps,) * 2
    plan = Plan(args.steps, dict.fromkeys(PEERS, steps), GROWTH if args.growth else {}, args.steps)
    plan = PLANS.get(args.plan, plan)
    if args.quick:
        steps = 2 if plan.steps else 0
        return Plan(steps, dict.fromkeys(PEERS, (2, 2)), {} if steps else {"images": (1, 2)}, 2)
    return replace(plan, growth={}) if args.only else plan


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[], help="who runs the same step")
    add_selectors(parser)
    parser.add_argument("--only", help="rows whose name holds this regular expression, and no growth")
    parser.add_argument("--steps", type=int, default=4, help="steps of each side, the first among them")
    parser.add_argument("--growth", action="store_true", help="also our step against each of its sizes")
    parser.add_argument("--plan", choices=list(PLANS), help="in the place of --steps and --growth")
    args = parser.parse_args()
    cases = choose_cases(args, torch.cuda.is_available())
    cases = cases if args.quick else choose(cases, args.only)
    tokenizer, vocabulary = benchmark_tokenizer(args.merges, TEXTS)
    record = begin() | {"ceilings": (measured := ceilings())}
    keep = keeper(record, "step", args.json)
    found = run(cases, args.peers, chosen_plan(args), tokenizer, measured, keep)
    record["step"] = found | {"vocabulary": vocabulary}
    output(record, args.json, table("step", record["step"]))


if __name__ == "__main__":
    run_as_script(main, "bench_step.py")

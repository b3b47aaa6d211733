"""All measurements of this machine into one file, bench/results/<device>/<date>.json.

    python bench/bench_all.py                         make bench: a quarter of an hour on two quiet cores
    python bench/bench_all.py --full                  more steps of the peers, more sizes of ours
    python bench/bench_all.py --parts kernels,rewards     the other parts that the file holds stay as they are
    python bench/bench_all.py --parts kernels --only fused --json -   cases whose name holds this, kept nowhere

The file is written after each part, and after each side of a step, so that a run that is stopped leaves what it has
measured. A part that cannot be measured here is named, and the exit status is 1.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench import guard as bench_guard
from boxgrpo.bench.kernel_bench import kernels_table as bench_kernels
from boxgrpo.bench.kernel_bench.cases import holding
from boxgrpo.bench.profiles import profile_step
from boxgrpo.bench.publish.result_files import begin, dump, of_today, write
from boxgrpo.bench.reward_bench import rewards_table as bench_rewards
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.step_bench import step_table as bench_step
from boxgrpo.bench.step_bench.cases import TEXTS, step_cases
from boxgrpo.bench.step_bench.floors import limits

PROFILED = 2  # steps
FULL = bench_step.Plan()
# TRL's steps are what takes long; sizes that the rows have cost nothing more.
QUARTER_HOUR = bench_step.Plan(
    peer_steps={"trl": (2, 1), "univg_r1": (2, 0)},
    growth={"images": (1, 4, 6), "generations": (4, 8, 16), "tokens": (16, 32, 64), "prompts": (1, 2, 4)},
    growth_steps=3,
)


@dataclass(frozen=True)
class Run:
    """What the parts are told."""

    record: dict
    plan: bench_step.Plan = QUARTER_HOUR
    only: str | None = None
    merges: str | None = None


def alone(function: Callable, *args):
    """The function's result from a process of its own, which may bind itself to a core."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def kernels(r: Run, keep: Callable[[dict], None]) -> dict:
    return bench_kernels.run(r.only, r.record["ceilings"], keep)


def guard(r: Run, keep: Callable[[dict], None]) -> dict:
    return alone(bench_guard.run, r.only)


def rewards(r: Run, keep: Callable[[dict], None]) -> dict:
    return alone(bench_rewards.run, r.merges)


def step(r: Run, keep: Callable[[dict], None]) -> dict:
    cases = holding(step_cases(torch.cuda.is_available()), r.only)
    plan = r.plan if r.only is None else replace(r.plan, growth={})
    tokenizer, vocabulary = benchmark_tokenizer(r.merges, TEXTS)
    found = bench_step.run(cases, list(bench_step.PEERS), plan, tokenizer, r.record["ceilings"], keep)
    return found | {"vocabulary": vocabulary}


def profile(r: Run, keep: Callable[[dict], None]) -> dict:
    tokenizer, _ = benchmark_tokenizer(r.merges, TEXTS)
    with tempfile.TemporaryDirectory() as out:
        case = step_cases(torch.cuda.is_available())[0]
        return profile_step.run(case, Path(out), PROFILED, tokenizer, r.record["ceilings"])


CHOOSING = ("kernels", "guard", "step")  # parts of which --only takes some cases
PARTS = {"kernels": kernels, "guard": guard, "rewards": rewards, "step": step, "profile": profile}


def run(parts: list[str], r: Run, path: Path | None) -> dict[str, str]:
    """Measure into `r.record`, and into `path` as it goes. Returns why parts are missing."""
    missing = {}
    for name in parts:
        started = time.perf_counter()

        def keep(found: dict, name=name, started=started) -> None:
            r.record[name] = found | {"took_s": round(time.perf_counter() - started)}
            if path is not None:
                write(r.record, path)

        try:
            keep(PARTS[name](r, keep))
        except ValueError as error:
            missing[name] = str(error)
        print(f"{name}: {missing.get(name) or str(r.record[name]['took_s']) + ' s'}", file=sys.stderr, flush=True)
    return missing


def told(record: dict) -> str:
    """The tables of what the record holds."""
    tables = []
    if "kernels" in record:
        tables.append(bench_kernels.table(record["kernels"]))
    if "rewards" in record:
        tables.append(bench_rewards.summary(record["rewards"]))
    if "step" in record:
        tables.append(bench_step.steps_table(record["step"]))
        tables += [f"{r['case']}:\n\n{bench_step.phases_table(r)}" for r in record["step"]["rows"] if "phases" in r]
        tables += [bench_step.growth_table(record["step"]["growth"])] if "growth" in record["step"] else []
    if "profile" in record:
        tables.append(profile_step.shown(record["profile"]))
    return "\n\n".join(tables)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"some of {','.join(PARTS)}; default: all, guard on a CPU only")
    parser.add_argument("--only", help="cases whose name holds this; kept where --json says, or nowhere")
    parser.add_argument("--full", action="store_true", help="all steps and sizes")
    parser.add_argument("--merges", help="Qwen2's merges.txt; default: data/qwen2_tokenizer under BOXGRPO_SHARED")
    parser.add_argument("--json", help="the file, - for standard output; default: bench/results/<device>/<date>.json")
    o = parser.parse_args(args)
    gpu = torch.cuda.is_available()
    parts = o.parts.split(",") if o.parts else [name for name in PARTS if not (gpu and name == "guard")]
    if wrong := set(parts) - PARTS.keys():
        raise ValueError(f"parts are {o.parts}; {', '.join(sorted(wrong))} is none of {', '.join(PARTS)}.")
    if o.only and not set(parts) <= set(CHOOSING):
        raise ValueError(f"only is {o.only!r}; name the parts it is meant for with --parts, of {', '.join(CHOOSING)}.")
    path = Path(o.json) if o.json and o.json != "-" else None
    if not o.json and not o.only:  # a part of a part does not take the place of the whole
        path = of_today()
    record = begin(path)
    if path and record["machine"]["revision"].endswith("-dirty"):
        print("the tree has changes of its own, and the record will say so; commit first to keep it", file=sys.stderr)
    record["ceilings"] = limits()
    missing = run(parts, Run(record, FULL if o.full else QUARTER_HOUR, o.only, o.merges), path)
    print(dump(record) if o.json == "-" else told(record))
    if missing:
        raise ValueError(f"{', '.join(missing)} could not be measured; see above.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_all.py: {error}")

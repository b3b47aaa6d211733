"""The time of a step of the step benchmark, range by range: by nsys where there is one and a GPU, else torch.profiler.

    python bench/profiles/profile_step.py  profiles two steps, prints the table; the trace is kept
    python bench/profiles/profile_step.py --json FILE|-  writes the table's figures; `make bench` keeps them
    python bench/profiles/profile_step.py --read TRACE  the table of a trace that was recorded before, of any run

The case is the benchmark's first: a 44M model on a CPU, the published 2B on a GPU. A first step warms up, and one
after the profiled ones shows what a step takes without a profiler. bench/README.md explains the table. The vocabulary
is made from Qwen2's merges.txt (--merges; default: data/qwen2_tokenizer under BOXGRPO_SHARED or ../shared), or without
it one of as many tokens.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench.run import ceilings
from boxgrpo.bench.profiles.nsys_sqlite import read_nsys
from boxgrpo.bench.publish.tables import table as results_table
from boxgrpo.bench.records import begin, flags, output
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.step_bench.cases import TEXTS, StepCase, add_selectors, choose_cases, prepare
from boxgrpo.bench.step_bench.floors import floors
from boxgrpo.bench.step_bench.sides import benchmark_hooks, our_options
from boxgrpo.model.checkpoint import read_config
from boxgrpo.trainer import grpo
from boxgrpo.trainer.arguments import check_range
from boxgrpo.trainer.profiling.chrome_trace import read_chrome_trace
from boxgrpo.trainer.profiling.profiler import FOLDER, kept_rows
from boxgrpo.trainer.profiling.timeline import Row, rows, table
from boxgrpo.trainer.runtime.ranks import RunFailed, join_ranks, run_as_script

WARMUP = 1
NSYS = ["nsys", "profile", "-t", "cuda,nvtx", "-s", "none", "-c", "cudaProfilerApi", "--capture-range-end", "stop"]
NSYS += ["--cuda-graph-trace", "node", "--export", "sqlite", "-f", "true", "-o"]
# The phase of `step_work` that a range is compared with.
PREFILL = "step > rollout > prefill"
COUNTED = {
    "step > rollout > vision": "vision",
    PREFILL: "prefill",
    "step > rollout > decode": "decode",
    "step > reference": "reference",
    "step > policy > forward": "policy_forward",
    "step > policy > forward > head+loss": "head_and_loss",
    "step > policy > backward": "backward",
    "step > optimizer": "optimizer",
}


def read(trace: Path) -> list[Row]:
    """The rows of a Chrome trace of torch.profiler, or of what nsys exported to SQLite."""
    if not trace.is_file():
        raise ValueError(f"there is no trace {trace}. Record one with --profile_steps; it is in output_dir/profile.")
    if trace.suffix == ".sqlite":
        return rows(read_nsys(trace))
    if kept_rows(trace).is_file():
        return [Row(**row) for row in json.loads(kept_rows(trace).read_text())]
    return rows(read_chrome_trace(trace))


def train(case: dict, at: str, output_dir: str, steps: int) -> None:
    """Some steps of a case by our loop, `steps` of them profiled; in a process of its own, under nsys where that is."""
    case = StepCase(**case)
    more = {"profile_steps": f"{WARMUP + 1}:{WARMUP + 1 + steps}", "overwrite_output_dir": True}
    options = our_options(case, Path(at), output_dir, WARMUP + steps + 1, **more)
    with join_ranks() as r:
        grpo.train(options, r, benchmark_hooks(case))


def record(case: StepCase, at: Path, output_dir: Path, steps: int) -> tuple[Path, float]:
    """The trace of `steps` steps, and the seconds of one step after them without a profiler."""
    given = asdict(case), str(at), str(output_dir), steps
    code = f"from boxgrpo.bench.profiles.profile_step import train; train(*{given})"
    command = [sys.executable, "-P", "-c", code]
    by_nsys = torch.cuda.is_available() and shutil.which("nsys")
    if by_nsys:
        output_dir.mkdir(parents=True, exist_ok=True)
        command = [*NSYS, str(output_dir / "nsys"), *command]  # the run empties its folder of profiles
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RunFailed(f"the profiled run failed:\n{done.stdout[-4000:]}")
    for written in output_dir.glob("nsys.*"):
        written.replace(output_dir / FOLDER / written.name)
    (trace,) = (output_dir / FOLDER).glob("nsys.sqlite" if by_nsys else "*-rank0.trace.json.gz")
    last = (output_dir / "metrics.jsonl").read_text().splitlines()[-1]
    return trace, json.loads(last)["step_time"]


def run(case: StepCase, output_dir: Path, steps: int, tokenizer, measured: dict[str, float]) -> dict:
    """The profile of a case as the results' files hold it.

    Args:
        output_dir: of the run; its folder `profile` has the trace.
        measured: FLOP and bytes a second of the machine, as `ceilings` measures them.
    """
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch) / case.model
        prepare(case, at, tokenizer)
        trace, unwatched = record(case, at, output_dir, steps)
        found = read(trace)
        prefilled = next(row for row in found if row.name == PREFILL)
        prompts, tokens = map(int, prefilled.titles[0].split(" ")[1].split("x"))
        by_phase = floors(read_config(at / "model"), case, tokens / prompts, measured)
    least = {name: by_phase[phase] for name, phase in COUNTED.items()}
    return {
        "case": case.name,
        "tool": "nsys" if trace.suffix == ".sqlite" else "torch.profiler",
        "on_gpu": found[0].gpu_seconds is not None,
        "steps": steps,
        "unwatched_step_s": round(unwatched, 4),
        "rows": [rounded(row) | {"floor": least.get(row.name)} for row in found],
    }


def rounded(row: Row) -> dict:
    """A row as JSON, to the microsecond and the tenth of a percent."""
    found = {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(row).items()}
    found |= {key: [round(value, 6) for value in found[key]] for key in ("samples", "gpu_samples")}
    return found | {"top": [[name, round(share, 3)] for name, share in row.top]}


def main() -> None:
    parser = flags(__doc__)
    add_selectors(parser)
    parser.add_argument("--steps", type=int, default=2, help="profiled steps")
    parser.add_argument("--output_dir", default="out/profile_step", help="of the run; its folder profile has the trace")
    parser.add_argument("--read", help="only the table of this trace: .trace.json.gz, or nsys's .sqlite")
    args = parser.parse_args()
    if args.read:
        print(table(read(Path(args.read))))
        return
    check_range("steps", args.steps, "[1, 1e6]")
    case = choose_cases(args, torch.cuda.is_available())[0]
    tokenizer, _ = benchmark_tokenizer(args.merges, TEXTS)
    record = begin() | {"ceilings": ceilings()}
    record["profile"] = result = run(case, Path(args.output_dir), args.steps, tokenizer, record["ceilings"])
    unwatched = f"A step without a profiler: {1e3 * result['unwatched_step_s']:.0f} ms."
    trace = f"The trace is in {Path(args.output_dir) / FOLDER}."
    output(record, args.json, "\n\n".join((results_table("profile", result), f"{unwatched}\n{trace}")))


if __name__ == "__main__":
    run_as_script(main, "profile_step.py")

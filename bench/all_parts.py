"""Options of bench/bench.py, the parts that it runs on a CPU and on a GPU, and what it keeps of them."""

import argparse
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch

from boxgrpo.bench.kernel_bench.run import IMPLEMENTATIONS
from boxgrpo.bench.processes import run_isolated
from boxgrpo.bench.publish.demands import verdicts
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import PARTS, begin, dump, path_of_today, write
from boxgrpo.bench.runner import MARGIN, ROOT, Part, Runner, failures
from boxgrpo.trainer.arguments import FlagParser
from boxgrpo.trainer.presence import check_output, check_paths
from boxgrpo.trainer.runtime.ranks import RunFailed

OUT = ROOT / "out/bench"
MINUTES = 9  # that the limits of a GPU's parts are made for
SELECTED = ("kernels", "guard", "step")  # parts of which --only takes some cases
KERNELS, REWARDS, LOADER, STEP = (f"bench/{name}_bench/run.py" for name in ("kernel", "reward", "loader", "step"))
PROFILE = ("bench/profiles/profile_step.py", "--output_dir", str(OUT / "profile"))
CPU_PARTS = [
    Part("kernels", (KERNELS,), "kernels", takes=("only", "quick")),
    Part("guard", ("bench/kernel_bench/guard.py",), "guard", takes=("only",)),
    Part("rewards", (REWARDS,), "rewards", takes=("merges",)),
    Part("loader", (LOADER,), "loader", takes=("quick",)),
    Part("step", (STEP, "--plan", "quarter_hour"), "step", takes=("only", "merges", "quick", "peers", "full")),
    Part("profile", PROFILE, "profile", takes=("merges", "quick")),
]
UNCOMPILED = (name for name in IMPLEMENTATIONS if name != "compile")
FOUR, OTHERS = ("--only", "x 4 images"), ("--only", "x [16] images")
# The figures that are demanded first. Nine minutes are not enough for the last.
GPU_PARTS = [
    Part("build", ("bench/checks.py", "build"), limit=170, beside="kernels", needs="setuptools"),
    Part("kernels", (KERNELS, "--by", *UNCOMPILED), "kernels", 90, ("only", "quick")),
    Part("rewards", (REWARDS,), "rewards", 40, ("merges",)),
    Part("steps", (STEP, "--plan", "gpu", *FOUR), "step", 320, ("merges", "quick", "peers")),
    Part("loader", (LOADER,), "loader", 40, ("quick",)),
    Part("tests", ("bench/checks.py", "tests"), limit=130, needs="pytest"),
    Part("profile", PROFILE, "profile", 150, ("merges", "quick")),
    Part("kernels_compiled", (KERNELS, "--by", "compile"), "kernels", 90, ("only", "quick"), adds=True),
    Part("steps_rest", (STEP, "--plan", "gpu", *OTHERS), "step", 600, ("merges", "quick", "peers"), adds=True),
    Part("growth", (STEP, "--plan", "gpu_growth"), "step", 600, ("merges", "quick"), adds=True),
]


def parsed(args: list[str] | None, description: str = "") -> tuple[argparse.Namespace, list[Part]]:
    """Options and the parts to run. Raises ValueError for what cannot be run together."""
    parser = FlagParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="build, test and measure on one GPU, within --minutes")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: with --gpu cuda, else what torch sees")
    parser.add_argument("--minutes", type=float, help="all parts together; with --gpu 9, and more gives each part more")
    parser.add_argument("--parts", nargs="+", help="only these, separated by blanks or commas")
    parser.add_argument("--only", help="cases whose name matches this; written to the file of --json, or to none")
    parser.add_argument("--full", action="store_true", help="all steps and sizes")
    parser.add_argument("--peers", nargs="*", default=["univg_r1", "trl"], help="whose steps are measured beside ours")
    parser.add_argument("--merges", help="Qwen2's merges.txt; default: data/qwen2_tokenizer under BOXGRPO_SHARED")
    parser.add_argument("--revision", help="of a copy that is no git checkout")
    parser.add_argument("--json", help="the file, - for standard output; default: bench/results/<device>/<date>.json")
    parser.add_argument("--output", help="a folder for a copy of record, verdicts and logs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, kept out of bench/results")
    check_paths(o := parser.parse_args(args))
    if o.output:
        check_output("output", o.output, folder=True)
    o.device = o.device or ("cuda" if o.gpu else None)
    parts = GPU_PARTS if o.gpu else CPU_PARTS
    names = ",".join(o.parts).split(",") if o.parts else [part.name for part in parts]
    if unknown := sorted(set(names) - {part.name for part in parts}):
        known = ", ".join(part.name for part in parts)
        raise ValueError(f"parts are {','.join(names)}; {', '.join(unknown)} is none of {known}.")
    if o.only and not set(names) <= set(SELECTED):
        raise ValueError(f"only is {o.only!r}; name the parts it is meant for with --parts, of {', '.join(SELECTED)}.")
    if o.gpu and o.device == "cpu" and not o.quick:
        raise ValueError("device is cpu, where --gpu is only tried: `make bench` measures a CPU. Add --quick.")
    return o, [part for part in parts if part.name in names]


def look(o: argparse.Namespace) -> tuple[dict, Path | None]:
    """The record to begin with, and the file that keeps it. In a process of its own: it holds a GPU's memory."""
    if o.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; add --device cpu --quick to try the script without one.")
    kept = o.json != "-" and bool(o.json or not (o.quick or o.only))
    path = (Path(o.json) if o.json else path_of_today()) if kept else None
    return begin(path), path


def arguments(o: argparse.Namespace) -> dict[str, list[str]]:
    """What the parts' scripts are given, by option."""
    found = {name: [f"--{name}", value] for name in ("only", "merges") if (value := getattr(o, name))}
    found |= {"peers": ["--peers", *o.peers], "quick": ["--quick"] * o.quick}
    return found | {"full": ["--plan", "full"] * o.full}


def keep(path: Path | None, output: str | None, record: dict) -> None:
    """Write record and verdicts, to `path` too; all of it, with the logs, into the folder `output`."""
    (OUT / "verdicts.md").write_text(table("verdicts", verdicts(record)) + "\n")
    for file in filter(None, (OUT / "results.json", path)):
        write(record, file)
    if output:
        shutil.copytree(OUT, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("profile"))


def report(record: dict, o: argparse.Namespace, names: list[str | None]) -> None:
    """Print the record, or the tables of what was measured and the verdicts."""
    if o.json == "-":
        print(dump(record))
        return
    tables = [table(name, record[name]) for name in PARTS if name in names and record.get(name, {}).get("rows")]
    print(*tables, *([] if o.only else [(OUT / "verdicts.md").read_text()]), sep="\n\n")


def main(args: list[str] | None, description: str) -> None:
    begun = time.monotonic()
    o, chosen = parsed(args, description)
    if o.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if o.revision:
        os.environ["BOXGRPO_REVISION"] = o.revision
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    record, path = run_isolated(look, o)
    # For the parts too, which write into a file of the tree.
    revision = os.environ["BOXGRPO_REVISION"] = record["machine"]["revision"]
    if path and revision.endswith("-dirty"):
        print("the tree has uncommitted changes, and the record will say so; commit first to keep it", file=sys.stderr)
    if "cuda" in record["machine"]:
        chosen = [part for part in chosen if part.name != "guard" or o.parts]  # which has bounds for a CPU alone
    minutes = o.minutes or (MINUTES if o.gpu else math.inf)
    patience = max(1.0, minutes / MINUTES) if o.gpu else 1.0
    kept, deadline = partial(keep, path, o.output), begun + 60 * minutes - MARGIN
    Runner(OUT, deadline, record, kept, patience, arguments(o)).run(chosen)
    report(record, o, [part.into for part in chosen])
    print(f"{path or OUT}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if failed := failures(record, [part.name for part in chosen]):
        raise RunFailed(f"failed: {'; '.join(failed)}. The logs are in {OUT}.")

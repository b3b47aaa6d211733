"""Build, test and measure on one GPU, from a bare checkout, without a network, in nine minutes.

    python3 bench/bench_gpu.py                             make bench-gpu
    python3 bench/bench_gpu.py --output DIR                a copy of record, verdicts and logs there as well
    python3 bench/bench_gpu.py --parts build kernels_compiled steps_rest profile growth     the rest, into the same file
    python3 bench/bench_gpu.py --device cpu --quick        tries the script where there is no GPU: tiny sizes

Nothing is installed: the folders get their import names by links under out/site, and the box parser is compiled in
place, at the lowest priority beside the first kernels. What is missing (pytest, liger-kernel, TRL) is named, and left
out; PYTHONPATH may add it. Without nvcc the build fails, and the rewards with it. Each part runs in a process of its
own with a limit of its own, and what it has measured by then is kept: first the figures that are demanded, then the
tests marked gpu, then the rest, as far as the minutes go. The record is bench/results/<device>/<date>.json, the verdict
on each demand is printed and kept beside it. The exit status is 1 where something of ours failed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "trainer", "bench")
OUT = ROOT / "out/bench_gpu"
CUDA = Path("/usr/local/cuda")
MINUTES = 9  # that the parts' limits are made for
LOOKING = 180  # seconds in which torch must have been imported
FIRST = ("kernels", "rewards", "steps")  # parts that begin a part of the record; others add rows to it
MARGIN = 8  # seconds kept for the record and the verdicts
# A line of pytest -v, with workers and without; names may hold spaces.
WORD = "(PASSED|FAILED|ERROR|SKIPPED)"
BEFORE = re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORD} (tests/.+)|{WORD} (tests/.+?)(?: - .*)?")
AFTER = re.compile(rf"(tests/.+?) {WORD}(?: .*)?")


@dataclass(frozen=True)
class Part:
    """A command, and the most seconds that it may take. `into`: the record's part that its rows belong to."""

    name: str
    command: tuple[str, ...]
    limit: float
    into: str | None = None
    beside: bool = False  # runs beside the parts that follow, until `after` asks for it
    after: str | None = None


def plan(args) -> list[Part]:
    """All parts, the figures that are demanded first. Nine minutes are not enough for the last ones."""
    python, quick = sys.executable, ("--quick",) if args.quick else ()
    merges = ("--merges", args.merges) if args.merges else ()

    def measure(name: str, *flags: str) -> tuple[str, ...]:
        common = ("--json", str(OUT / f"{name}.json"), *quick)
        return (python, "bench/gpu_parts.py", *flags, *common)

    def steps(name: str, *images: str) -> tuple[str, ...]:
        return measure(name, "step", "--images", *images, "--peers", *args.peers, *merges, *ceilings)

    ceilings = ("--ceilings", str(OUT / "kernels.json"))
    return [
        Part("build", measure("build", "build"), 170, beside=True),
        Part("kernels", measure("kernels", "kernels"), 90, "kernels"),
        Part("rewards", measure("rewards", "rewards", *merges, *ceilings), 40, "rewards", after="build"),
        Part("steps", steps("steps", "4"), 320, "step", after="build"),
        Part("tests", tests(args), 130, after="build"),
        Part("profile", measure("profile", "profile", *merges, *ceilings), 150, "profile", after="build"),
        Part("kernels_compiled", measure("kernels_compiled", "kernels", "--compiled", *ceilings), 90, "kernels"),
        Part("steps_rest", steps("steps_rest", "1", "6"), 600, "step", after="build"),
        Part("growth", measure("growth", "growth", *merges, *ceilings), 600, "step", after="build"),
    ]


def tests(args) -> tuple[str, ...]:
    """pytest on the files that have tests for a GPU; for a CPU on one that has none."""
    chosen = [ROOT / "tests/kernel_tests/test_advantages.py"]
    if args.device == "cuda":
        chosen = [
            f for f in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(r"mark\.gpu|\bLANE\b", f.read_text())
        ]
    several = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    marked = ("-m", "gpu") if args.device == "cuda" else ()
    files = (str(f.relative_to(ROOT)) for f in chosen)
    # -P: else the repository's own folder `kernels` would stand first on the path.
    return (
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *several,
        *marked,
        *files,
    )


@dataclass
class Conductor:
    """Runs parts against the clock and gathers what they leave."""

    deadline: float
    patience: float  # what every part's limit is multiplied by
    environment: dict[str, str]
    record: dict = field(default_factory=dict)
    running: dict[str, tuple[subprocess.Popen, Part, float]] = field(default_factory=dict)
    scratch: dict[str, tempfile.TemporaryDirectory] = field(default_factory=dict)

    def run(self, part: Part) -> None:
        if part.after in self.running:
            self.finish(part.after)
        left = self.deadline - time.monotonic()
        if left < MARGIN:
            return self.told(part, f"not begun: {left:.0f} s were left", 0)
        if reason := missing(part):
            return self.told(part, f"skipped: {reason}", 0)
        log = (OUT / f"{part.name}.log").open("wb")
        command = ("nice", "-n", "19", *part.command) if part.beside else part.command
        # What a part that is killed leaves there, checkpoints of the 7B, goes with it.
        self.scratch[part.name] = tempfile.TemporaryDirectory(prefix="boxgrpo-", ignore_cleanup_errors=True)
        env = self.environment | {"TMPDIR": self.scratch[part.name].name}
        started = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.running[part.name] = started, part, time.monotonic()
        return None if part.beside else self.finish(part.name)

    def finish(self, name: str) -> None:
        """Wait for a part as long as it may take, and take over what it has measured."""
        from boxgrpo.bench.launches import kill

        process, part, begun = self.running.pop(name)
        until = min(begun + self.patience * part.limit, self.deadline)
        try:
            process.wait(max(0.1, until - time.monotonic()))
            outcome = "done" if process.returncode == 0 else f"failed with {process.returncode}: {last_line(name)}"
        except subprocess.TimeoutExpired:
            kill(process)
            outcome = f"stopped after {time.monotonic() - begun:.0f} s"
        self.scratch.pop(name).cleanup()
        self.told(part, outcome, time.monotonic() - begun)

    def told(self, part: Part, outcome: str, seconds: float) -> None:
        self.record.setdefault("parts", {})[part.name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        print(f"{part.name}: {outcome} ({seconds:.0f} s)", flush=True)
        if part.name == "tests":
            self.record["tests"] = outcomes(OUT / "tests.log")
        elif part.into:
            self.gather(part)

    def gather(self, part: Part) -> None:
        """What a part has left in its file; rows and errors are added to those of the same part of the record."""
        file = OUT / f"{part.name}.json"
        if not file.exists():
            return
        left = json.loads(file.read_text())
        for key in ("machine", "load_before", "ceilings"):
            if key in left:
                self.record.setdefault(key, left[key])
        found = next((left[key] for key in (part.into, "growth") if key in left), None)
        if not found:  # stopped before its first row
            return
        into = self.record.setdefault(part.into, {})
        added = {
            key: merged(into[key], value) for key, value in found.items() if isinstance(value, list) and key in into
        }
        self.record[part.into] = into | found | added


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows of both; of a case that both have, the new one's."""

    def name(row: dict) -> list:
        return [row.get(key) for key in ("case", "op", "shape", "dtype", "implementation", "run")]

    named = [name(row) for row in new]
    return [row for row in old if name(row) not in named] + new


def missing(part: Part) -> str | None:
    """Why a part cannot run here."""
    script = next(word for word in part.command[1:] if not word.startswith("-"))
    if script.endswith(".py") and not (ROOT / script).is_file():
        return f"there is no {script}"
    if part.name == "tests" and importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    if part.name == "build" and importlib.util.find_spec("setuptools") is None:
        return "setuptools is not installed"
    return None


def failures(record: dict, chosen: list[Part]) -> list[str]:
    """Parts and tests that failed, and what of ours could not be measured. What was stopped has left what it had."""
    outcomes = record.get("parts", {})
    found = [part.name for part in chosen if outcomes.get(part.name, {}).get("outcome", "").startswith("failed")]
    found += record.get("tests", {}).get("failed", [])
    for error in record.get("kernels", {}).get("errors", []):
        if error.get("implementation", "boxgrpo").startswith("boxgrpo"):
            found.append(error["case"])
    return found + [row["case"] for row in record.get("step", {}).get("rows", []) if "ours_error" in row]


def last_line(name: str) -> str:
    lines = (OUT / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def outcomes(log: Path) -> dict:
    """Counts, and the names of what failed, of a pytest log with -v, also of one that was cut off."""
    found: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        line = line.rstrip()
        if match := BEFORE.fullmatch(line):
            found[match[2] or match[4]] = match[1] or match[3]
        elif match := AFTER.fullmatch(line):
            found[match[1]] = match[2]
    counts = {outcome: sum(o == outcome for o in found.values()) for outcome in sorted(set(found.values()))}
    return {"counts": counts, "failed": sorted(n for n, o in found.items() if o in ("FAILED", "ERROR"))}


def link_packages() -> Path:
    """The folder that gives the checkout's folders their import names."""
    site = ROOT / "out/site"
    (site / "boxgrpo").mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = site / "boxgrpo" / name
        if not link.is_symlink() or link.resolve() != ROOT / name:  # the checkout may have been moved
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / name)
    return site


def environment(site: Path, device: str) -> dict[str, str]:
    """For the parts: our packages first, no hub, the CUDA compiler where it usually lies."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    found = os.environ | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    if "CUDA_HOME" not in os.environ and (CUDA / "bin/nvcc").exists():
        found["CUDA_HOME"] = str(CUDA)
    return found


def look(device: str, env: dict[str, str]) -> dict:
    """The machine. Raises ValueError where it is not what was asked for."""
    file = OUT / "look.json"
    command = [sys.executable, "bench/gpu_parts.py", "look", "--json", str(file)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LOOKING)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"looking at the machine takes above {LOOKING} s; torch does not come up here.") from error
    if done.returncode:
        raise ValueError(f"the benchmark does not start: {done.stderr.strip()[-2000:]}")
    found = json.loads(file.read_text())
    if device == "cuda" and not found["look"]["cuda"]:
        raise ValueError("torch sees no GPU here; add --device cpu --quick to try the script without one.")
    return found


def of_the_day(machine: dict) -> Path:
    """The GPU's file of results."""
    from boxgrpo.bench.machine import folder_name

    return ROOT / f"bench/results/{folder_name(machine['device'])}/{machine['date']}.json"


def kept_before(machine: dict, chosen: list[Part]) -> dict:
    """What an earlier call of this day measured at this revision, without what `chosen` measures anew.

    The first of the parts that fill a part of the record begins it; the others add their rows.
    """
    file = of_the_day(machine)
    old = json.loads(file.read_text()) if file.exists() else {}
    if old.get("machine") != machine:
        return {}
    anew = {part.into for part in chosen if part.name in FIRST} | {part.name for part in chosen}
    return {name: value for name, value in old.items() if name not in anew}


def keep(record: dict, args) -> Path:
    """Write record and verdicts, of a GPU into bench/results; all of it, with the logs, into --output."""
    from boxgrpo.bench.publish.demands import verdict_table, verdicts
    from boxgrpo.bench.publish.result_files import write

    record["verdicts"] = verdicts(record)
    write(record, OUT / "results.json")
    (OUT / "verdicts.md").write_text(verdict_table(record["verdicts"]) + "\n")
    targets = [OUT / "results.json"]
    if not args.quick:
        targets.append(of_the_day(record["machine"]))
    if args.output:
        targets.append(Path(args.output) / "results.json")
        Path(args.output).mkdir(parents=True, exist_ok=True)
        shutil.copy(OUT / "verdicts.md", args.output)
        logs = [f"== {f.name}\n{f.read_text(errors='replace')[-200_000:]}" for f in sorted(OUT.glob("*.log"))]
        (Path(args.output) / "logs.txt").write_text("\n".join(logs))
    for target in targets[1:]:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(targets[0], target)
    return targets[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all parts together; more gives each part more")
    parser.add_argument("--parts", nargs="+", help="only these: build, kernels, rewards, steps, tests, ...")
    parser.add_argument("--peers", nargs="*", default=["univg_r1", "trl"], help="whose steps are taken beside ours")
    parser.add_argument("--output", help="a folder for a copy of record, verdicts and logs")
    parser.add_argument("--merges", help="a Qwen2 tokenizer's merges.txt; without one a vocabulary is made")
    parser.add_argument("--revision", help="of a copy that git does not know")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, kept out of bench/results")
    args = parser.parse_args()
    begun = time.monotonic()
    parts = plan(args)
    if unknown := set(args.parts or ()) - {part.name for part in parts}:
        names = ", ".join(part.name for part in parts)
        raise ValueError(f"parts are {' '.join(args.parts)}; {', '.join(unknown)} is none of {names}.")
    if args.device == "cpu" and not args.quick:
        raise ValueError("device is cpu, where the script is tried alone: `make bench` measures a CPU. Add --quick.")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    site = link_packages()
    env = environment(site, args.device) | ({"BOXGRPO_REVISION": args.revision} if args.revision else {})
    sys.path.insert(0, str(site))
    conductor = Conductor(begun + 60 * args.minutes - MARGIN, max(1.0, args.minutes / MINUTES), env)
    found = look(args.device, env)
    chosen = [part for part in parts if args.parts is None or part.name in args.parts]
    conductor.record |= {} if args.quick else kept_before(found["machine"], chosen)
    conductor.record |= {key: found[key] for key in ("machine", "load_before")} | {"skipped": found["look"]["skipped"]}
    if "ceilings" in conductor.record:  # which all parts of a day share
        (OUT / "kernels.json").write_text(json.dumps({"ceilings": conductor.record["ceilings"]}))
    for part in chosen:
        conductor.run(part)
        kept = keep(conductor.record, args)
    for name in list(conductor.running):
        conductor.finish(name)
        kept = keep(conductor.record, args)
    print(f"\n{(OUT / 'verdicts.md').read_text()}\n{kept}: {time.monotonic() - begun:.0f} s")
    if failed := failures(conductor.record, chosen):
        raise ValueError(f"failed: {'; '.join(failed)}. The logs are in {OUT}.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"bench_gpu.py: {error}")

"""All measurements of this machine into one file, bench/results/<device>/<date>.json.

    python bench/bench.py                             make bench: a quarter of an hour on two quiet cores
    python bench/bench.py --full                      more steps of the peers, more sizes of ours
    python bench/bench.py --parts kernels rewards     the other parts that the file holds stay as they are
    python bench/bench.py --parts kernels --only fused --json -   cases whose name holds this, kept nowhere
    python bench/bench.py --gpu                       make bench-gpu: builds, tests and measures on one GPU
    python bench/bench.py --gpu --output DIR          a copy of record, verdicts and logs there as well
    python bench/bench.py --gpu --parts build kernels_compiled steps_rest profile growth    the rest, same file
    python bench/bench.py --gpu --device cpu --quick  tries the script where there is no GPU: tiny sizes

Each part runs in a process of its own, and the rows that it has measured are kept if it fails or is stopped. Nothing is
installed: the folders get their import names by links under out/site. The exit status is 1 where something of ours
failed.

With --gpu a bare checkout is enough, with torch, transformers and psutil, and without a network. The box parser is
compiled in place, at the lowest priority beside the first kernels; without nvcc that fails, and the rewards with it.
What is missing (pytest, liger-kernel, TRL) is named and left out; PYTHONPATH may add it. Nine minutes are the limit,
and each part has a limit of its own: first the figures that are demanded, then the tests marked gpu, then the rest.
"""

import argparse
import importlib.util
import json
import math
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
OUT = ROOT / "out/bench"
CUDA = Path("/usr/local/cuda")
MINUTES = 9  # that the limits of a GPU's parts are made for
IMPORT_SECONDS = 180  # in which torch must have been imported
MARGIN = 8  # seconds reserved for the record and the verdicts
SELECTED = ("kernels", "guard", "step")  # parts of which --only takes some cases


@dataclass(frozen=True)
class Part:
    """A command, the record's part that its rows belong to, and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    into: str | None = None
    limit: float = math.inf
    adds: bool = False  # its rows join those that are there; else they replace them
    beside: bool = False  # runs beside the parts that follow, until `after` waits for it
    after: str | None = None


def worker(function: str, name: str, o: argparse.Namespace, **options) -> tuple[str, ...]:
    """The command that runs a function of parts.py; it writes to OUT/name.json."""
    common = {"only": o.only, "merges": o.merges, "quick": o.quick, "full": o.full}
    return sys.executable, "bench/parts.py", function, str(OUT / f"{name}.json"), json.dumps(common | options)


def plan(o: argparse.Namespace) -> list[Part]:
    """All parts of `make bench`."""
    return [Part(name, worker(name, name, o), name) for name in ("kernels", "guard", "rewards", "step", "profile")]


def gpu_plan(o: argparse.Namespace) -> list[Part]:
    """All parts of `make bench-gpu`, the figures that are demanded first. Nine minutes are not enough for the last."""

    def part(name: str, function: str, into: str | None, limit: float, options: dict | None = None, **more) -> Part:
        return Part(name, worker(function, name, o, **options or {}), into, limit, **more)

    def steps(*images: int) -> dict:
        return {"images": images, "peers": o.peers}

    return [
        part("build", "build", None, 170, beside=True),
        part("kernels", "kernels", "kernels", 90, {"compiled": False}),
        part("rewards", "rewards", "rewards", 40, after="build"),
        part("steps", "step", "step", 320, steps(4), after="build"),
        Part("tests", tests(o), limit=130, after="build"),
        part("profile", "profile", "profile", 150, after="build"),
        part("kernels_compiled", "kernels", "kernels", 90, {"compiled": True}, adds=True),
        part("steps_rest", "step", "step", 600, steps(1, 6), adds=True, after="build"),
        part("growth", "growth", "step", 600, adds=True, after="build"),
    ]


def tests(o: argparse.Namespace) -> tuple[str, ...]:
    """pytest on the files that have tests for a GPU; for a CPU on one that has none."""
    files = [ROOT / "tests/kernel_tests/test_advantages.py"]
    if o.device != "cpu":
        every = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [file for file in every if re.search(r"mark\.gpu|\bLANE\b", file.read_text())]
    flags = ["-v", "--tb=short", "-p", "no:cacheprovider", *([] if o.device == "cpu" else ["-m", "gpu"])]
    if importlib.util.find_spec("xdist"):
        flags += ["-n", str(min(12, os.cpu_count() or 1))]
    # -P: else the repository's own folder `kernels` would stand first on the path.
    return sys.executable, "-P", "-m", "pytest", *flags, *(str(file.relative_to(ROOT)) for file in files)


@dataclass
class Conductor:
    """Runs parts against the clock and gathers their results into a record."""

    deadline: float
    patience: float  # factor of every part's limit
    environment: dict[str, str]
    record: dict = field(default_factory=dict)
    running: dict[str, tuple[subprocess.Popen, Part, float]] = field(default_factory=dict)
    scratch: dict[str, tempfile.TemporaryDirectory] = field(default_factory=dict)

    def run(self, part: Part) -> None:
        if part.after in self.running:
            self.finish(part.after)
        left = self.deadline - time.monotonic()
        if left < MARGIN:
            return self.note(part, f"not begun: {left:.0f} s were left", 0)
        if reason := missing(part):
            return self.note(part, f"skipped: {reason}", 0)
        log = (OUT / f"{part.name}.log").open("wb")
        command = ("nice", "-n", "19", *part.command) if part.beside else part.command
        # Removed with what a killed part leaves there, such as checkpoints of the 7B.
        self.scratch[part.name] = tempfile.TemporaryDirectory(prefix="boxgrpo-", ignore_cleanup_errors=True)
        env = self.environment | {"TMPDIR": self.scratch[part.name].name}
        started = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.running[part.name] = started, part, time.monotonic()
        return None if part.beside else self.finish(part.name)

    def finish(self, name: str) -> None:
        """Wait for a part as long as it may take, and gather what it has measured."""
        from boxgrpo.bench.processes import kill

        process, part, begun = self.running.pop(name)
        until = min(begun + self.patience * part.limit, self.deadline)
        outcome = "interrupted"
        try:
            process.wait(max(0.1, until - time.monotonic()) if until < math.inf else None)
            outcome = "done" if process.returncode == 0 else f"failed with {process.returncode}: {last_line(name)}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {time.monotonic() - begun:.0f} s"
        finally:
            if process.poll() is None:
                kill(process)
            self.scratch.pop(name).cleanup()
            self.note(part, outcome, time.monotonic() - begun)

    def note(self, part: Part, outcome: str, seconds: float) -> None:
        from boxgrpo.bench.outcomes import read_test_log

        self.record.setdefault("parts", {})[part.name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        print(f"{part.name}: {outcome} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        if part.name == "tests":
            self.record["tests"] = read_test_log(OUT / "tests.log")
        elif part.into:
            self.gather(part, seconds)

    def gather(self, part: Part, seconds: float) -> None:
        """Take over what a part has left in its file. With `adds` its rows and errors join those of this machine."""
        from boxgrpo.bench.outcomes import merged

        file = OUT / f"{part.name}.json"
        left = json.loads(file.read_text()) if file.exists() else {}
        if "ceilings" in left:
            self.record["ceilings"] = left["ceilings"]
        if not (found := left.get("measured")):  # stopped before its first row
            return
        into = self.record.get(part.into, {})
        if not part.adds or into.get("machine", self.record["machine"]) != self.record["machine"]:
            into = {}
        lists = {key: merged(into.get(key, []), value) for key, value in found.items() if isinstance(value, list)}
        took = {"took_s": round(into.get("took_s", 0) + seconds)}
        self.record[part.into] = into | found | lists | took


def missing(part: Part) -> str | None:
    """Why a part cannot run here."""
    needed = {"tests": "pytest", "build": "setuptools"}.get(part.name)
    return f"{needed} is not installed" if needed and importlib.util.find_spec(needed) is None else None


def last_line(name: str) -> str:
    lines = (OUT / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


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


def environment(site: Path, o: argparse.Namespace) -> dict[str, str]:
    """Of the parts: our packages first, no hub, the CUDA compiler where it usually lies."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    found = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if o.device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    if "CUDA_HOME" not in os.environ and (CUDA / "bin/nvcc").exists():
        found["CUDA_HOME"] = str(CUDA)
    return found | ({"BOXGRPO_REVISION": o.revision} if o.revision else {})


def look(o: argparse.Namespace, env: dict[str, str]) -> dict:
    """The machine, and its file of results. Raises ValueError where it is not what was asked for."""
    command = worker("look", "look", o, path=o.json if o.json != "-" else None)
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"importing torch takes more than {IMPORT_SECONDS} s here; nothing was measured.") from error
    if done.returncode:
        raise ValueError(f"the benchmark does not start: {done.stderr.strip()[-2000:]}")
    found = json.loads((OUT / "look.json").read_text())["measured"]
    if o.device == "cuda" and not found["cuda"]:
        raise ValueError("torch sees no GPU here; add --device cpu --quick to try the script without one.")
    return found


def keep(record: dict, paths: list[Path], output: str | None) -> None:
    """Write record and verdicts, to `paths` too; all of it, with the logs, into the folder `output`."""
    from boxgrpo.bench.publish.demands import verdicts
    from boxgrpo.bench.publish.tables import table
    from boxgrpo.bench.records import write

    (OUT / "verdicts.md").write_text(table("verdicts", verdicts(record)) + "\n")
    for path in (OUT / "results.json", *paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(record, path)
    if output:
        for name in ("results.json", "verdicts.md"):
            shutil.copy(OUT / name, output)
        logs = [f"== {f.name}\n{f.read_text(errors='replace')[-200_000:]}" for f in sorted(OUT.glob("*.log"))]
        (Path(output) / "logs.txt").write_text("\n".join(logs))


def parsed(args: list[str] | None) -> tuple[argparse.Namespace, list[Part]]:
    """Options and the parts to run. Raises ValueError for what cannot be run together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="build, test and measure on one GPU, within --minutes")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: with --gpu cuda, else what torch sees")
    parser.add_argument("--minutes", type=float, help="all parts together; with --gpu 9, and more gives each part more")
    parser.add_argument("--parts", nargs="+", help="only these, separated by blanks or commas")
    parser.add_argument("--only", help="cases whose name holds this; kept where --json says, or nowhere")
    parser.add_argument("--full", action="store_true", help="all steps and sizes")
    parser.add_argument(
        "--peers", nargs="*", default=["univg_r1", "trl"], help="of --gpu: whose steps stand beside ours"
    )
    parser.add_argument("--merges", help="Qwen2's merges.txt; default: data/qwen2_tokenizer under BOXGRPO_SHARED")
    parser.add_argument("--revision", help="of a copy that is no git checkout")
    parser.add_argument("--json", help="the file, - for standard output; default: bench/results/<device>/<date>.json")
    parser.add_argument("--output", help="a folder for a copy of record, verdicts and logs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, kept out of bench/results")
    o = parser.parse_args(args)
    o.device = o.device or ("cuda" if o.gpu else None)
    parts = gpu_plan(o) if o.gpu else plan(o)
    names = ",".join(o.parts).split(",") if o.parts else [part.name for part in parts]
    if unknown := sorted(set(names) - {part.name for part in parts}):
        known = ", ".join(part.name for part in parts)
        raise ValueError(f"parts are {','.join(names)}; {', '.join(unknown)} is none of {known}.")
    if o.only and not set(names) <= set(SELECTED):
        raise ValueError(f"only is {o.only!r}; name the parts it is meant for with --parts, of {', '.join(SELECTED)}.")
    if o.gpu and o.device == "cpu" and not o.quick:
        raise ValueError("device is cpu, where --gpu is only tried: `make bench` measures a CPU. Add --quick.")
    return o, [part for part in parts if part.name in names]


def main(args: list[str] | None = None) -> None:
    begun = time.monotonic()
    o, chosen = parsed(args)
    shutil.rmtree(OUT, ignore_errors=True)
    for folder in (OUT, *([Path(o.output)] if o.output else [])):
        folder.mkdir(parents=True, exist_ok=True)
    site = link_packages()
    env = environment(site, o)
    sys.path.insert(0, str(site))
    from boxgrpo.bench.outcomes import failures

    found = look(o, env)
    minutes = o.minutes or (MINUTES if o.gpu else math.inf)
    patience = max(1.0, minutes / MINUTES) if o.gpu else 1.0
    paths = [] if o.json == "-" or (not o.json and (o.quick or o.only)) else [Path(found["path"])]
    begin = {key: found["record"][key] for key in ("machine", "load_before")}
    conductor = Conductor(begun + 60 * minutes - MARGIN, patience, env, found["record"] if paths else begin)
    if paths and found["record"]["machine"]["revision"].endswith("-dirty"):
        print("the tree has uncommitted changes, and the record will say so; commit first to keep it", file=sys.stderr)
    if "ceilings" in conductor.record and "kernels" not in {part.name for part in chosen}:
        (OUT / "ceilings.json").write_text(json.dumps(conductor.record["ceilings"]))  # those of the day's kernels
    if found["cuda"]:
        chosen = [part for part in chosen if part.name != "guard" or o.parts]  # which has bounds for a CPU alone
    try:
        for part in chosen:
            conductor.run(part)
            keep(conductor.record, paths, o.output)
    finally:
        for name in list(conductor.running):
            conductor.finish(name)
        keep(conductor.record, paths, o.output)
    report(conductor.record, o, [part.into for part in chosen])
    print(f"{', '.join(map(str, paths)) or OUT}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    if failed := failures(conductor.record, [part.name for part in chosen]):
        raise ValueError(f"failed: {'; '.join(failed)}. The logs are in {OUT}.")


def report(record: dict, o: argparse.Namespace, names: list[str | None]) -> None:
    """Print the record, or the tables of what was measured and the verdicts."""
    from boxgrpo.bench.publish.tables import table
    from boxgrpo.bench.records import PARTS, dump

    if o.json == "-":
        print(dump(record))
        return
    tables = [table(name, record[name]) for name in PARTS if name in names and record.get(name, {}).get("rows")]
    print(*tables, *([] if o.only else [(OUT / "verdicts.md").read_text()]), sep="\n\n")


def command(args: list[str] | None = None) -> None:
    try:
        main(args)
    except ValueError as error:
        sys.exit(f"bench.py: {error}")


if __name__ == "__main__":
    command()

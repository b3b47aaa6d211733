"""Runs parts of a benchmark, each in a process of its own and against the clock, and gathers their rows in a record."""

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .processes import kill
from .records import part as part_of

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 8  # seconds reserved for the record and the verdicts
# A line of pytest -v, with workers and without; names may hold spaces.
WORD = "(PASSED|FAILED|ERROR|SKIPPED)"
BEFORE = re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORD} (tests/.+)|{WORD} (tests/.+?)(?: - .*)?")
AFTER = re.compile(rf"(tests/.+?) {WORD}(?: .*)?")


@dataclass(frozen=True)
class Part:
    """A script of bench/ with its arguments, and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    into: str | None = None  # the part of the record that it measures; the script has --json
    limit: float = math.inf
    takes: tuple[str, ...] = ()  # options of all_parts.py that it has too
    adds: bool = False  # its rows join those that are there; else they replace them
    beside: str | None = None  # the part that may run meanwhile
    needs: str | None = None  # a package


@dataclass
class Runner:
    """Parts write their rows and their logs to the folder `out`; `keep` receives the record after each of them."""

    out: Path
    deadline: float  # of time.monotonic
    record: dict
    keep: Callable[[dict], None] = lambda record: None
    patience: float = 1.0  # factor of every part's limit
    options: dict[str, list[str]] = field(default_factory=dict)  # arguments by name, for the parts that take them

    def run(self, parts: Iterable[Part]) -> None:
        with contextlib.ExitStack() as background:
            beside = None
            for part in parts:
                if part.name != beside:
                    background.close()  # waits
                if part.beside:
                    beside = part.beside
                    background.enter_context(self.started(part))
                else:
                    with self.started(part):
                        pass

    @contextlib.contextmanager
    def started(self, part: Part) -> Iterator[None]:
        """The part runs during the block; at its end it is waited for as long as it may take, and gathered."""
        if refusal := self.refusal(part):
            self.note(part, refusal, 0)
            yield
            return
        begun, outcome = time.monotonic(), "interrupted"
        until = min(begun + self.patience * part.limit, self.deadline)
        taken = (word for name in part.takes for word in self.options.get(name, ()))
        command = [*(("nice", "-n", "19") if part.beside else ()), sys.executable, *part.command, *taken]
        command += ["--json", str(self.out / f"{part.name}.json")] if part.into else []
        log = self.out / f"{part.name}.log"
        # TMPDIR is removed with what a killed part leaves there, such as checkpoints of the 7B.
        with (
            tempfile.TemporaryDirectory(prefix="boxgrpo-", ignore_cleanup_errors=True) as scratch,
            log.open("wb") as to,
        ):
            env = os.environ | {"TMPDIR": scratch}
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=to, stderr=to)
            try:
                yield
                process.wait(max(0.1, until - time.monotonic()) if until < math.inf else None)
                last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
                outcome = f"failed with {process.returncode}: {last[:300]}" if process.returncode else "done"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {time.monotonic() - begun:.0f} s"
            finally:
                if process.poll() is None:
                    kill(process)
                self.note(part, outcome, time.monotonic() - begun)

    def refusal(self, part: Part) -> str | None:
        """Why a part cannot begin."""
        if (left := self.deadline - time.monotonic()) < MARGIN:
            return f"not begun: {left:.0f} s were left"
        absent = part.needs and importlib.util.find_spec(part.needs) is None
        return f"skipped: {part.needs} is not installed" if absent else None

    def note(self, part: Part, outcome: str, seconds: float) -> None:
        self.record.setdefault("parts", {})[part.name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        print(f"{part.name}: {outcome} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        if part.name == "tests":
            self.record["tests"] = read_test_log(self.out / "tests.log")
        elif part.into:
            self.gather(part, seconds)
        self.keep(self.record)

    def gather(self, part: Part, seconds: float) -> None:
        """Take over what a part has left in its file. With `adds` its rows and errors join those of this machine."""
        file = self.out / f"{part.name}.json"
        if not file.exists():  # stopped before its first row
            return
        found, into = part_of(json.loads(file.read_text()), part.into), self.record.get(part.into, {})
        if not part.adds or into.get("machine") != found["machine"]:
            into = {}
        lists = {key: merged(into.get(key, []), value) for key, value in found.items() if isinstance(value, list)}
        took = {"took_s": round(into.get("took_s", 0) + seconds)}
        self.record[part.into] = into | found | lists | took


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows of both; of a case that both have, the new one's."""
    names = ("case", "op", "shape", "dtype", "implementation", "run")
    named = [[row.get(key) for key in names] for row in new]
    return [row for row in old if [row.get(key) for key in names] not in named] + new


def failures(record: dict, parts: Iterable[str]) -> list[str]:
    """Parts and tests that failed, and what of ours could not be measured. A stopped part is no failure."""
    outcomes = record.get("parts", {})
    found = [name for name in parts if outcomes.get(name, {}).get("outcome", "").startswith("failed")]
    found += record.get("tests", {}).get("failed", [])
    for error in record.get("kernels", {}).get("errors", []):
        if error.get("implementation", "boxgrpo").startswith("boxgrpo"):
            found.append(error["case"])
    return found + [row["case"] for row in record.get("step", {}).get("rows", []) if "ours_error" in row]


def read_test_log(log: Path) -> dict:
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

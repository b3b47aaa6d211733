"""What parts of a measurement left: rows that join others, failures, and the outcomes in a log of pytest."""

import re
from collections.abc import Iterable
from pathlib import Path

# A line of pytest -v, with workers and without; names may hold spaces.
WORD = "(PASSED|FAILED|ERROR|SKIPPED)"
BEFORE = re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORD} (tests/.+)|{WORD} (tests/.+?)(?: - .*)?")
AFTER = re.compile(rf"(tests/.+?) {WORD}(?: .*)?")


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows of both; of a case that both have, the new one's."""

    def name(row: dict) -> list:
        return [row.get(key) for key in ("case", "op", "shape", "dtype", "implementation", "run")]

    named = [name(row) for row in new]
    return [row for row in old if name(row) not in named] + new


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

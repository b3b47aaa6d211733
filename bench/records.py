"""The files of results: one for each device and day, bench/results/<device>/<date>.json, and their content.

    {"machine": {...}, "load_before": 0.1, "ceilings": {...}, "kernels": {"rows": [...]}, "step": {...}, ...}

A part that another run left in the file has its own machine, load and ceilings.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from boxgrpo.trainer.arguments import FlagParser, check_range
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.files import replace_file

from .machine import RESULTS, folder, machine

PARTS = ("kernels", "guard", "rewards", "loader", "step", "profile")  # that a file may hold
COMMON = ("machine", "load_before", "ceilings")  # of all parts that have none of their own
# Commands that keep a file of their own.
STUDIES = ("demo", "data", "box_units", "soak", "soak_zero2", "fuzz", "ablation")
DATED = re.compile(r"\d{4}-\d\d-\d\d\.json")


def begin(path: Path | None = None) -> dict:
    """A record of this machine now; parts that `path` holds are kept as another run's.

    All else that `path` holds (ceilings, outcomes of tests and parts) is kept if it is of this machine, revision and
    day.
    """
    record = {"machine": machine(), "load_before": round(os.getloadavg()[0], 2)}  # the load of the minute before
    if path is not None and path.exists():
        old = json.loads(path.read_text())
        record = (old if old["machine"] == record["machine"] else {}) | record
        record |= {name: part(old, name) for name in PARTS if name in old}
    return record


def part(record: dict, name: str) -> dict:
    """A part with the machine, load and ceilings that it was measured with."""
    if "machine" in record[name]:
        return record[name]
    return {key: record[key] for key in COMMON if key in record} | record[name]


def find_row(rows: Iterable[dict], **wanted) -> dict | None:
    """The first row with these values; sizes of a row's shape count as values of the row."""
    return next((r for r in rows if wanted.items() <= (r.get("shape", {}) | r).items()), None)


def read(path: Path) -> dict:
    """Raises ValueError where there is none, or what it holds is no record."""
    if not path.is_file():
        raise ValueError(f"there is no file of results {path}; those kept lie in bench/results/<device>.")
    try:
        found = json.loads(path.read_text())
        return found | {"machine": dict(found["machine"])}
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} holds no results ({error}). Name a file of bench/results/<device>.") from error


def path_of_today() -> Path:
    """The file of this device and day."""
    return folder() / f"{machine()['date']}.json"


def dated(device: Path) -> list[Path]:
    """The dated files in a device's folder, oldest first."""
    return sorted(path for path in device.glob("*.json") if DATED.fullmatch(path.name))


def newest(device: Path = RESULTS / "cpu") -> dict:
    """The record of the last day; a part that it lacks is the last day's that has it.

    Raises ValueError where there is none.
    """
    if not (files := dated(device)):
        raise ValueError(f"{device} has no results of any day; `make bench` or `make bench-gpu` makes them.")
    *older, record = (json.loads(file.read_text()) for file in files)
    for old in reversed(older):
        found = (name for name in PARTS if old.get(name, {}).get("rows") and not record.get(name, {}).get("rows"))
        record |= {name: part(old, name) for name in found}
    return record


def without_first(seconds: Sequence[float]) -> Sequence[float]:
    """The steps after the first, which makes the optimizer's state and pages memory in; a single step stays."""
    return seconds[1:] or seconds


class Records(NamedTuple):
    """What bench/results holds: the newest record of each device, by its folder, and the records of the studies."""

    devices: dict[str, dict]
    studies: dict[str, dict]


def read_all(results: Path) -> Records:
    devices = {folder.name: newest(folder) for folder in sorted(results.iterdir()) if dated(folder)}
    studies = {name: results / f"cpu/{name}.json" for name in STUDIES}
    return Records(devices, {name: read(path) for name, path in studies.items() if path.exists()})


def write(record: dict, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, dump(record) + "\n")


class _Parser(FlagParser):
    def parse_args(self, args=None, namespace=None):
        check_paths(found := super().parse_args(args, namespace))
        for name, least in (("images", 1), ("prompts", 1), ("steps", 0)):
            if (value := getattr(found, name, None)) is not None:
                check_range(name, value, f"[{least}, 1e6]")
        return found


def flags(description: str) -> FlagParser:
    """A parser for a command that measures one part; it refuses a --json where no file can be written."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results there, - for standard output")
    return parser


def keeper(record: dict, name: str, path: str | None) -> Callable[[dict], None]:
    """keep(found) writes the record with what a part has so far, so that a run that is stopped has lost nothing."""
    return lambda found: None if path in (None, "-") else write(record | {name: found}, Path(path))


def output(record: dict, path: str | None, text: str) -> None:
    """Print the text, and write the record to `path`; - prints the record instead."""
    if path == "-":
        print(dump(record))
        return
    if path:
        write(record, Path(path))
    print(text)


def dump(value) -> str:
    """JSON in which a list of numbers takes one line."""
    return re.sub(r'\[\n[^][{}"]*\]', lambda found: json.dumps(json.loads(found[0])), json.dumps(value, indent=1))

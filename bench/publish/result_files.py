"""The files of results: one for each device and day, bench/results/<device>/<date>.json, and what stands where in it.

    {"machine": {...}, "load_before": 0.1, "ceilings": {...}, "kernels": {"rows": [...]}, "step": {...}, ...}

A part that another run left in the file has its own machine, load and ceilings.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boxgrpo.bench.machine import RESULTS, folder, machine

PARTS = ("kernels", "guard", "rewards", "step", "profile")  # that a file may hold
COMMON = ("machine", "load_before", "ceilings")  # of all parts that have none of their own
LONG = ("demo", "data", "soak", "soak_zero2", "fuzz", "ablation")  # commands that keep a record of their own
VERSIONS = {"driver": "driver", "cuda": "CUDA", "torch": "torch"}
PEERS = {"triton": "Triton", "transformers": "transformers", "liger-kernel": "Liger", "trl": "TRL"}
DATED = re.compile(r"\d{4}-\d\d-\d\d\.json")


def begin(path: Path | None = None) -> dict:
    """A record of this machine as it is now, without a part; what `path` holds already is kept, as another run's."""
    record = {"machine": machine(), "load_before": round(os.getloadavg()[0], 2)}  # the load of the minute before
    if path is not None and path.exists():
        old = json.loads(path.read_text())
        record |= {name: part(old, name) for name in PARTS if name in old}
    return record


def part(record: dict, name: str) -> dict:
    """A part with the machine, load and ceilings that it was measured with."""
    if "machine" in record[name]:
        return record[name]
    return {key: record[key] for key in COMMON if key in record} | record[name]


def read(path: Path) -> dict:
    """Raises ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"there is no file of results {path}; those kept lie in bench/results/<device>.")
    return json.loads(path.read_text())


def of_today() -> Path:
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


def later(seconds: Sequence[float]) -> Sequence[float]:
    """The steps after the first, which makes the optimizer's state and pages memory in; it alone where there is one."""
    return seconds[1:] or seconds


@dataclass
class Records:
    """What bench/results holds: by device's folder its newest record, and by command what a long one left."""

    devices: dict[str, dict] = field(default_factory=dict)
    long: dict[str, dict] = field(default_factory=dict)


def records(results: Path) -> Records:
    found = Records()
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        if dated(device):
            found.devices[device.name] = newest(device)
    for name in LONG:
        if (path := results / f"cpu/{name}.json").exists():
            found.long[name] = json.loads(path.read_text())
    return found


def described(machine: dict, *, peers: bool = False) -> str:
    """The machine in a line, with the revision and the day; with `peers` also the packages that are compared."""
    told = [machine["device"]]
    told += [f"{machine['gpu_memory_gb']:.0f} GB"] if "gpu_memory_gb" in machine else []
    told += [f"{n} thread{'s' * (n != 1)}"] if (n := machine.get("threads")) else []
    named = VERSIONS | PEERS if peers else VERSIONS
    told += [f"{name} {machine[key]}" for key, name in named.items() if key in machine]
    return ", ".join([*told, f"revision {machine['revision']}", machine["date"]])


def write(record: dict, path: Path) -> None:
    """Whole or not at all; a list of numbers takes one line."""
    aside = path.with_suffix(".part")
    aside.write_text(dump(record) + "\n")
    aside.replace(path)


def dump(value, depth: int = 0) -> str:
    """JSON, a key to a line, but for lists that hold no list or dict."""
    if not isinstance(value, (dict, list)) or not value:
        return json.dumps(value)
    if isinstance(value, list) and not any(isinstance(x, (dict, list)) for x in value):
        return json.dumps(value)
    inner = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        lines = (f"{json.dumps(key)}: {dump(x, depth + 1)}" for key, x in value.items())
        return "{" + inner + f",{inner}".join(lines) + "\n" + " " * depth + "}"
    return "[" + inner + f",{inner}".join(dump(x, depth + 1) for x in value) + "\n" + " " * depth + "]"

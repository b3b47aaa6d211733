"""The figures that are demanded of each machine, demands.json, and whether a record of results has them.

python bench/publish/demands.py [bench/results/<device>/<date>.json]        default: the newest of this machine's device
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boxgrpo.bench.machine import folder
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import PARTS, find_row, newest, part, read
from boxgrpo.trainer.arguments import FlagParser
from boxgrpo.trainer.runtime.ranks import run_as_script

TABLE = Path(__file__).with_name("demands.json")  # rows for one H200, and for two cores
MB = 1e6
Find = Callable[[dict, dict], float | None]


@dataclass(frozen=True)
class Demand:
    """A figure and its limit, a row of demands.json.

    `find` names a function below that takes it from our row of the `case` ({} without one) and from the whole record;
    with `of` and `other` it names what makes one of these arguments. It returns None or raises LookupError where the
    record lacks what it needs.
    """

    part: str
    what: str
    bound: str  # "at most" or "at least"
    limit: float
    unit: str
    case: dict
    find: str
    of: Sequence = ()
    other: Mapping = field(default_factory=dict)

    def verdict(self, record: dict) -> dict:
        """The figure that is wanted and the measured one: met, short by how much, or not measured."""
        find = globals()[self.find]
        try:
            row = _row(record, self.part, self.case)
            measured = (find(*self.of, **self.other) if self.of else find)(row, record)
        except LookupError:
            measured = None
        wanted = f"{self.bound} {self.limit:.3g} {self.unit}".strip()
        found = {"part": self.part, "what": self.what, "wanted": wanted, "measured": measured}
        if measured is None:
            return found | {"verdict": "not measured"}
        met = measured <= self.limit if self.bound == "at most" else measured >= self.limit
        away = f"{abs(measured - self.limit) / self.limit:.1%}" if self.limit else f"{measured:g}"
        short = "; ".join(filter(None, (f"short by {away}", _where(row))))
        return found | {"measured": float(f"{measured:.4g}"), "verdict": "met" if met else short}


def _row(record: dict, name: str, case: dict) -> dict:
    """The row of a case, ours where it names no implementation, without values that are None. Raises LookupError."""
    if not case:
        return {}
    ours = {"implementation": "boxgrpo"} if name == "kernels" else {}
    if (row := find_row(record.get(name, {}).get("rows", []), **ours | case)) is None:
        raise LookupError(f"{name} has no row {case}")
    return {key: value for key, value in row.items() if value is not None}


def _where(row: dict) -> str:
    """What bounds a kernel, and its cost on the host where that is much; or the two slowest phases of a step."""
    if "percent_of_floor" in row:
        text = f"at {row['percent_of_floor']:g}% of what {row['floor_is']} allow"
        host = row.get("host_ms") or 0.0
        return text + f", {1e3 * host:.0f} of {1e3 * row['ms']:.0f} µs on the host" * (host > row["ms"] / 2)
    above = {name: p["seconds"] - p.get("floor_s", 0.0) for name, p in row.get("phases", {}).items()}
    named = sorted(above, key=above.get, reverse=True)[:2]
    words = ", ".join(f"{name.replace('_', ' ')} {1e3 * above[name]:.0f} ms" for name in named)
    return f"above their floors: {words}" if named else ""


def figure(key: str, scale: float = 1.0) -> Find:
    return lambda row, record: scale * row[key]


def share_of(key: str, name: str, **other) -> Find:
    """Our figure over that of the part's row with other values."""

    def find(row: dict, record: dict) -> float:
        same = {key: row[key] for key in ("op", "shape") if key in row}
        return row[key] / _row(record, name, same | other)[key]

    return find


def times_of(name: str, **other) -> Find:
    """How many times ours another row takes."""
    share = share_of("ms", name, **other)
    return lambda row, record: 1 / share(row, record)


def head_memory(row: dict, record: dict) -> float:
    """MB beyond the inputs, their gradients in bf16 and one gradient of the weight in fp32."""
    n, vocabulary, width = (row["shape"][key] for key in "NVH")
    return max(0.0, row["peak_mb"] - (2 * (n + vocabulary) + 4 * vocabulary) * width / MB)


def matrix_rate(*names: str) -> Find:
    """Percent of the measured matrix rate that phases of a step together reach."""

    def find(row: dict, record: dict) -> float:
        phases = [row["phases"][name] for name in names]
        rate = 1e9 * sum(p["gflop"] for p in phases) / sum(p["seconds"] for p in phases)
        return 100 * rate / part(record, "step")["ceilings"]["flop_per_second"]

    return find


def failed_tests(row: dict, record: dict) -> float | None:
    """None where none passed, or none failed before the run was cut off: those it did not reach might have."""
    counts = record.get("tests", {}).get("counts", {})
    if failed := counts.get("FAILED", 0) + counts.get("ERROR", 0):
        return float(failed)
    outcome = record.get("parts", {}).get("tests", {}).get("outcome", "")
    return 0.0 if counts.get("PASSED") and outcome.startswith(("done", "failed with")) else None


def off_line(row: dict, record: dict) -> float | None:
    """The farthest of all sizes."""
    return max((g["misfit_percent"] for g in record["step"]["growth"].values() if "misfit_percent" in g), default=None)


def minutes(row: dict, record: dict) -> float | None:
    """What all parts of a record took; None where one does not have it."""
    taken = [record.get(name, {}).get("took_s") for name in PARTS]
    return None if None in taken else sum(taken) / 60


def decoding_over_floor(row: dict, record: dict) -> float:
    return row["phases"]["decode"]["seconds"] / row["phases"]["decode"]["floor_s"]


def doubled_group(row: dict, record: dict) -> float:
    return record["step"]["growth"]["doubled_group"]["ratio"]


def verdicts(record: dict) -> list[dict]:
    """Whether the record meets each demand on its machine."""
    rows = json.loads(TABLE.read_text())["gpu" if "cuda" in record["machine"] else "cpu"]
    return [Demand(**row).verdict(record) for row in rows]


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a file of results")
    file = parser.parse_args().file
    record = read(Path(file)) if file else newest(folder())
    print(f"{record['machine']['device']}, {record['machine']['date']}\n\n{table('verdicts', verdicts(record))}")


if __name__ == "__main__":
    run_as_script(main, "demands.py")

"""The cases that became slower between two files of results, beyond the noise of both.

    python bench/publish/compare.py [OLD.json NEW.json] [--parts kernels,rewards,step]

Without files: the last two days of this device. A case with peers is compared by its ratio to the peer's time within
each file, which is the same on a faster or slower machine: it is slower when its ratio rose against most of its peers.
A case without peers is compared by its own time, where machine and packages are the same. A time lies between the
quartiles of its samples, or their ends where they are few; a ratio rose when its interval begins above the old one's
end, and its middle by more than 5 %. Cases that one file alone has are named. The exit status is 1 when anything is
slower.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from boxgrpo.bench.machine import folder
from boxgrpo.bench.publish.tables import sizes
from boxgrpo.bench.records import dated, part, read, without_first
from boxgrpo.trainer.arguments import FlagParser
from boxgrpo.trainer.runtime.ranks import run_as_script

LEAST = 0.05  # a smaller change is none
UNKNOWN = 0.10  # noise of what was timed once
SAME = ("device", "driver", "threads", "torch", "triton")  # of two machines that are one
PARTS = ("kernels", "rewards", "step")
OURS, FLOOR = "ours", "one read"


class Interval(NamedTuple):
    """A time or a ratio, and where it may lie."""

    low: float
    middle: float
    high: float

    def over(self, other: "Interval") -> "Interval":
        return Interval(self.low / other.high, self.middle / other.middle, self.high / other.low)

    def rose_above(self, old: "Interval") -> bool:
        return self.low > old.high and self.middle > old.middle * (1 + LEAST)


def interval(median: float, samples: Sequence[float]) -> Interval:
    """Where the median of a time's samples may lie."""
    if len(samples) == 1:
        low, high = median * (1 - UNKNOWN), median * (1 + UNKNOWN)
    elif len(samples) < 8:
        low, high = min(samples), max(samples)
    else:
        low, _, high = statistics.quantiles(samples, n=4)
    return Interval(min(low, median), median, max(high, median))


def sides_of(part: str, row: dict) -> Iterator[tuple[str, str, Interval]]:
    """The case, the side, ours as OURS, and the time of each side in a row.

    Of steps in old records only the ends of the samples are known, which stand in for those after the first.
    """
    if part == "step":
        for side in (key.removesuffix("_spread_s") for key in row if key.endswith("_spread_s")):
            samples = without_first(row.get(f"{side}_samples_s", [None, *row[f"{side}_spread_s"]]))
            yield row["case"], side, interval(row[f"{side}_s"], samples)
        return
    time = interval(row["ms"], row.get("samples_ms", row["spread_ms"]))
    if part == "rewards":
        yield ("ids", row["run"], time) if row["run"] == "decode, re, IoU" else (row["run"], OURS, time)
        return
    case, side = f"{row['op']} {sizes(row['shape'])} {row['dtype']}", row["implementation"]
    if side.startswith("boxgrpo"):  # a variant of ours is a case of its own
        case, side = case + side.removeprefix("boxgrpo"), OURS
    if side != FLOOR:
        yield case, side, time


def times(record: dict, parts: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """case -> side -> time."""
    found = defaultdict(dict)
    for name in parts:
        for row in record.get(name, {}).get("rows", []):
            for case, side, time in sides_of(name, row):
                found[f"{name}: {case}"][side] = time
    return found


def same_machine(old: dict, new: dict, name: str) -> bool:
    a, b = (part(record, name)["machine"] for record in (old, new))
    return all(a.get(key) == b.get(key) for key in SAME)


def slower(old: dict, new: dict, parts: Sequence[str] = PARTS) -> list[str]:
    """A line for each case that got slower. Raises ValueError for files without a case in common."""
    before, after = times(old, parts), times(new, parts)
    if not before.keys() & after.keys():
        raise ValueError(f"the files have no case of {', '.join(parts)} in common; measure both alike.")
    common = (case for case in after if case in before)
    reasons = {c: _compare(before[c], after[c], same_machine(old, new, c.partition(":")[0])) for c in common}
    return [f"{case}: {reason}" for case, reason in reasons.items() if reason]


def left_out(old: dict, new: dict, parts: Sequence[str] = PARTS) -> list[str]:
    """A line for each file that has cases which the other has not."""
    before, after = times(old, parts).keys(), times(new, parts).keys()
    both = ("old", before - after), ("new", after - before)
    return [f"only the {word} file has {'; '.join(sorted(alone))}" for word, alone in both if alone]


def _compare(before: dict[str, Interval], after: dict[str, Interval], same: bool) -> str | None:
    """How a case got slower; None if it did not."""
    if OURS not in before or OURS not in after:
        return "no longer measured" if OURS in before else None
    peers = [side for side in after if side in before and side != OURS]
    if not peers:
        was, now = before[OURS], after[OURS]
        return f"{was.middle:.4g} -> {now.middle:.4g}" if same and now.rose_above(was) else None
    ratios = [(peer, before[OURS].over(before[peer]), after[OURS].over(after[peer])) for peer in peers]
    rose = [f"{a.middle:.3f} -> {b.middle:.3f} of {peer}'s time" for peer, a, b in ratios if b.rose_above(a)]
    return ", ".join(rose) if 2 * len(rose) > len(ratios) else None


def main(args: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="the old file and the new one")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    o = parser.parse_args(args)
    files = [Path(file) for file in o.files] or dated(folder())[-2:]
    if len(files) != 2:
        raise ValueError(f"{len(files)} files of results; two are compared. Name the old one and the new one.")
    if wrong := set(parts := o.parts.split(",")) - set(PARTS):
        raise ValueError(f"parts are {o.parts}; {', '.join(sorted(wrong))} is none of {', '.join(PARTS)}.")
    old, new = (read(file) for file in files)
    found = slower(old, new, parts)
    verdict = found or [f"nothing is slower in {files[1].name} than in {files[0].name}"]
    print(*left_out(old, new, parts), *verdict, sep="\n")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    run_as_script(main, "compare.py")

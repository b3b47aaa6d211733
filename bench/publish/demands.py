"""The figures that are demanded of each machine, in one place, and whether a record of results has them.

python bench/publish/demands.py [bench/results/<device>/<date>.json]        default: the newest of this machine's device
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from boxgrpo.bench.machine import folder
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import PARTS, find_row, newest, part, read
from boxgrpo.trainer.runtime.ranks import run_as_script

QWEN_2B, QWEN_7B = {"V": 151_936, "H": 1536}, {"V": 152_064, "H": 3584}
LOGITS, HEAD = "fused_grpo_loss_from_logits", "fused_grpo_loss"
MB = 1e6
Find = Callable[[dict, dict], float | None]


@dataclass(frozen=True)
class Demand:
    """A figure and its limit. `find` takes it from our row of the `case` ({} without one) and from the whole record.

    It returns None or raises LookupError where the record lacks what it needs.
    """

    part: str
    what: str
    bound: str  # "at most" or "at least"
    limit: float
    unit: str
    case: dict
    find: Find

    def verdict(self, record: dict) -> dict:
        """The figure that is wanted and the measured one: met, short by how much, or not measured."""
        try:
            row = _row(record, self.part, self.case)
            measured = self.find(row, record)
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


def minutes(record: dict) -> float | None:
    """What all parts of a record took; None where one does not have it."""
    taken = [record.get(name, {}).get("took_s") for name in PARTS]
    return None if None in taken else sum(taken) / 60


def decoding_over_floor(row: dict, record: dict) -> float:
    return row["phases"]["decode"]["seconds"] / row["phases"]["decode"]["floor_s"]


def doubled_group(row: dict, record: dict) -> float:
    return record["step"]["growth"]["doubled_group"]["ratio"]


def gpu_demands() -> Iterator[Demand]:
    """Of one H200."""
    yield Demand("tests", "tests marked gpu that fail", "at most", 0, "", {}, failed_tests)
    share, ms, us = figure("percent_of_floor"), figure("ms"), figure("ms", 1e3)
    peers = {name: times_of("kernels", implementation=name) for name in ("liger", "trl")}
    for n in (2048, 8192, 32768):
        what = f"loss from logits, N = {n}: of the copy bandwidth"
        yield Demand("kernels", what, "at least", 85, "%", {"op": LOGITS, "N": n}, share)
    what, case = "loss from logits: Liger's time over ours", {"op": LOGITS, "N": 8192}
    yield Demand("kernels", what, "at least", 1.4, "x", case, peers["liger"])
    for name, sizes, most in (("2B", QWEN_2B, 17), ("7B", QWEN_7B, 40)):
        head, case = f"fused head, {name}", {"op": HEAD, "N": 8192} | sizes
        yield Demand("kernels", f"{head}, N = 8192", "at most", most, "ms", case, ms)
        yield Demand("kernels", f"{head}: memory of its own", "at most", 1000, "MB", case, head_memory)
        for peer, slower in peers.items():
            yield Demand("kernels", f"{head}: {peer}'s time over ours", "at least", 1, "x", case, slower)
    for groups in (16, 1024):
        case = {"op": "group_advantages", "B": groups}
        yield Demand("kernels", f"group_advantages, {groups} groups", "at most", 15, "µs", case, us)
    case, reads = {"op": "sample_tokens", "n": 128}, share_of("ms", "kernels", implementation="one read")
    yield Demand("kernels", "sample_tokens, 128 rows: over one read", "at most", 1.3, "x", case, reads)
    yield Demand("rewards", "1,024 completions of 256 tokens", "at most", 50, "µs", {"run": "ids"}, us)
    rates = {"prefill": matrix_rate("prefill"), "training": matrix_rate("policy_forward", "backward")}
    for model in ("2B", "7B"):
        case = {"model": model, "images": 4, "prompts": 1}
        for name, rate in rates.items():
            yield Demand("step", f"{model}: {name}, of the matrix rate", "at least", 40, "%", case, rate)
        yield Demand("step", f"{model}: decoding, over its floor", "at most", 1.5, "x", case, decoding_over_floor)
        for images in (1, 4, 6):
            for peer, key in (("TRL's step", "ratio"), ("the paper's trainer's step", "univg_r1_ratio")):
                what = f"{model}, {_counted(images, 'image')}: {peer} over ours"
                yield Demand("step", what, "at least", 4, "x", case | {"images": images}, figure(key))


def cpu_demands() -> Iterator[Demand]:
    """Of two cores."""
    case = {"op": HEAD, "N": 512, "V": 151_936, "H": 256}
    for what, key, most in (("time", "ms", 1), ("memory", "peak_mb", 0.25)):
        what, share = f"fused loss: its {what} over eager's", share_of(key, "kernels", implementation="eager")
        yield Demand("kernels", what, "at most", most, "x", case, share)
    what, python = "decode, re and IoU in Python: over ours", times_of("rewards", run="decode, re, IoU")
    yield Demand("rewards", what, "at least", 100, "x", {"run": "ids"}, python)
    for run in ("bytes, think", "bytes, list"):
        yield Demand("rewards", f"{run}: read", "at least", 1, "GB/s", {"run": run}, figure("gb_per_second"))
    for images, prompts, least in ((4, 1, 5), (1, 1, 3), (6, 1, 3), (4, 4, 3)):
        case = {"model": "44M", "images": images, "prompts": prompts}
        what = f"{_counted(images, 'image')}, {_counted(prompts, 'prompt')}: TRL's step over ours"
        yield Demand("step", what, "at least", least, "x", case, figure("ratio"))
    what, case = "4 images: our memory over TRL's", {"model": "44M", "images": 4, "prompts": 1}
    yield Demand("step", what, "at most", 1 / 3, "x", case, figure("peak_memory_ratio"))
    yield Demand("step", "twice the completions, where prompts dominate", "at most", 1.3, "x", {}, doubled_group)
    yield Demand("step", "growth with a size: a step's distance from its line", "at most", 25, "%", {}, off_line)
    took = lambda row, record: minutes(record)  # noqa: E731
    yield Demand("all", "`make bench`: its parts", "at most", 15, "minutes", {}, took)


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def verdicts(record: dict) -> list[dict]:
    """Whether the record meets each demand on its machine."""
    demands = gpu_demands() if "cuda" in record["machine"] else cpu_demands()
    return [demand.verdict(record) for demand in demands]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a file of results")
    file = parser.parse_args().file
    record = read(Path(file)) if file else newest(folder())
    print(f"{record['machine']['device']}, {record['machine']['date']}\n\n{table('verdicts', verdicts(record))}")


if __name__ == "__main__":
    run_as_script(main, "demands.py")

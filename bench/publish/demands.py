"""The figures that are wanted of each machine, in one place, and whether a record of results has them.

python bench/publish/demands.py [bench/results/<device>/<date>.json]        default: the newest of this machine's device
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from boxgrpo.bench.machine import folder
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import PARTS, find_row, newest, part, read
from boxgrpo.trainer.runtime.ranks import run_as_script

QWEN_2B, QWEN_7B = {"V": 151_936, "H": 1536}, {"V": 152_064, "H": 3584}
LOGITS, HEAD = "fused_grpo_loss_from_logits", "fused_grpo_loss"
MB = 1e6
# What may close a gap: conclusions from counting, not tried yet.
ONE_READ = "each row of logits read once, not twice: kept in a cluster's shared memory, or a product that stores exp(z)"
READS = "more bytes in flight, for it is one pass over the logits: larger tiles, rows that overlap"
LATENCY = "one launch less, or a CUDA graph around it, for it moves next to nothing"
PRODUCTS = "more tokens in a pack for larger products, fewer small operators between them"
DECODING = "fewer and larger operators between the reads of the weights, more completions at a time"
SCRATCH = "smaller chunks of logits"
STEP = "the phase that is furthest above its floor"
LARGER = "larger chunks of logits, which are larger products, as far as the memory goes"
PYTHON = "less Python around the compiled parser's call"
WIDER = "wider loads where a byte opens no tag"
QUIET = "steps that the host's other guests do not disturb, or more of them"

Figure = Callable[[dict], float | None]  # of a record; None or LookupError where the record lacks what it needs


@dataclass(frozen=True)
class Demand:
    """A figure and its limit. `case`: the row of ours that it is about, to report where its time goes."""

    part: str
    what: str
    bound: str  # "at most" or "at least"
    limit: float
    unit: str
    find: Figure
    remedy: str = ""
    case: dict = field(default_factory=dict)

    def verdict(self, record: dict) -> dict:
        """What is wanted and what was measured: met, short by how much, or not measured."""
        try:
            measured = self.find(record)
        except LookupError:
            measured = None
        wanted = f"{self.bound} {self.limit:.3g} {self.unit}".strip()
        found = {"part": self.part, "what": self.what, "wanted": wanted, "measured": measured}
        if measured is None:
            return found | {"verdict": "not measured"}
        met = measured <= self.limit if self.bound == "at most" else measured >= self.limit
        away = f"{abs(measured - self.limit) / self.limit:.1%}" if self.limit else f"{measured:g}"
        where = WHERE[self.part](_row(record, self.part, **self.case)) if self.case and not met else ""
        short = "; ".join(filter(None, (f"short by {away}", where, f"to try: {self.remedy}" if self.remedy else "")))
        return found | {"measured": float(f"{measured:.4g}"), "verdict": "met" if met else short}


def _row(record: dict, name: str, **wanted) -> dict:
    """The row of a part with these values. Raises LookupError where there is none."""
    if name == "kernels":
        wanted = {"implementation": "boxgrpo"} | wanted
    if (row := find_row(record.get(name, {}).get("rows", []), **wanted)) is None:
        raise LookupError(f"{name} has no row {wanted}")
    return row


def figure(name: str, key: str, scale: float = 1.0, **case) -> Figure:
    """A figure of one row."""

    def find(record: dict) -> float | None:
        value = _row(record, name, **case)[key]
        return None if value is None else scale * value

    return find


def ratio(name: str, key: str, upper: dict, lower: dict, **case) -> Figure:
    """A figure of one row over the same figure of another; both are of the case."""

    def find(record: dict) -> float | None:
        above, below = (_row(record, name, **case | which)[key] for which in (upper, lower))
        return above / below if above and below else None

    return find


def times_of(by: str, **case) -> Figure:
    """How many times ours another implementation of a kernel takes."""
    return ratio("kernels", "ms", {"implementation": by}, {}, **case)


def head_memory(n: int, sizes: dict[str, int]) -> Figure:
    """MB beyond the inputs, their gradients in bf16 and one gradient of the weight in fp32."""
    returned = (2 * (n + sizes["V"]) + 4 * sizes["V"]) * sizes["H"] / MB

    def find(record: dict) -> float | None:
        peak = _row(record, "kernels", op=HEAD, N=n, **sizes)["peak_mb"]
        return max(0.0, peak - returned) if peak else None

    return find


def matrix_rate(names: tuple[str, ...], **case) -> Figure:
    """Percent of the measured matrix rate that phases of a step together reach."""

    def find(record: dict) -> float:
        phases = [_row(record, "step", **case)["phases"][name] for name in names]
        rate = 1e9 * sum(p["gflop"] for p in phases) / sum(p["seconds"] for p in phases)
        return 100 * rate / part(record, "step")["ceilings"]["flop_per_second"]

    return find


def over_floor(phase: str, **case) -> Figure:
    def find(record: dict) -> float:
        found = _row(record, "step", **case)["phases"][phase]
        return found["seconds"] / found["floor_s"]

    return find


def where_in_kernel(row: dict) -> str:
    """What bounds our row, and what the call costs the host where that is much of it."""
    text = f"at {row['percent_of_floor']:g}% of what {row['floor_is']} allow"
    host = row.get("host_ms") or 0.0
    return text + f", {1e3 * host:.0f} of {1e3 * row['ms']:.0f} µs on the host" * (host > row["ms"] / 2)


def where_in_step(row: dict) -> str:
    """The two phases that take the most above their floors."""
    above = {name: p["seconds"] - p.get("floor_s", 0.0) for name, p in row.get("phases", {}).items()}
    named = sorted(above, key=above.get, reverse=True)[:2]
    words = ", ".join(f"{name.replace('_', ' ')} {1e3 * above[name]:.0f} ms" for name in named)
    return f"above their floors: {words}" if named else ""


WHERE = {"kernels": where_in_kernel, "step": where_in_step}


def failed_tests(record: dict) -> float | None:
    """None where none passed, or none failed before the run was cut off: those it did not reach might have."""
    counts = record.get("tests", {}).get("counts", {})
    if failed := counts.get("FAILED", 0) + counts.get("ERROR", 0):
        return float(failed)
    outcome = record.get("parts", {}).get("tests", {}).get("outcome", "")
    return 0.0 if counts.get("PASSED") and outcome.startswith(("done", "failed with")) else None


def off_line(record: dict) -> float | None:
    """The farthest of all sizes."""
    return max((g["misfit_percent"] for g in record["step"]["growth"].values() if "misfit_percent" in g), default=None)


def minutes(record: dict) -> float | None:
    """What all parts of a record took; None where one does not have it."""
    taken = [record.get(name, {}).get("took_s") for name in PARTS]
    return None if None in taken else sum(taken) / 60


def gpu_demands() -> Iterator[Demand]:
    """Of one H200."""
    yield Demand("tests", "tests marked gpu that fail", "at most", 0, "", failed_tests)
    for n in (2048, 8192, 32768):
        case = {"op": LOGITS, "N": n}
        what, share = f"loss from logits, N = {n}: of the copy bandwidth", figure("kernels", "percent_of_floor", **case)
        yield Demand("kernels", what, "at least", 85, "%", share, READS, case)
    case = {"op": LOGITS, "N": 8192}
    what = "loss from logits: Liger's time over ours"
    yield Demand("kernels", what, "at least", 1.4, "x", times_of("liger", **case), READS, case)
    for name, sizes, most in (("2B", QWEN_2B, 17), ("7B", QWEN_7B, 40)):
        case = {"op": HEAD, "N": 8192} | sizes
        head, ms = f"fused head, {name}", figure("kernels", "ms", **case)
        yield Demand("kernels", f"{head}, N = 8192", "at most", most, "ms", ms, ONE_READ, case)
        yield Demand("kernels", f"{head}: memory of its own", "at most", 1000, "MB", head_memory(8192, sizes), SCRATCH)
        for peer in ("liger", "trl"):
            slower = times_of(peer, **case)
            yield Demand("kernels", f"{head}: {peer}'s time over ours", "at least", 1, "x", slower, ONE_READ, case)
    for groups in (16, 1024):
        case = {"op": "group_advantages", "B": groups}
        what, micro = f"group_advantages, {groups} groups", figure("kernels", "ms", 1e3, **case)
        yield Demand("kernels", what, "at most", 15, "µs", micro, LATENCY, case)
    case = {"op": "sample_tokens", "n": 128}
    reads = ratio("kernels", "ms", {}, {"implementation": "one read"}, **case)
    yield Demand("kernels", "sample_tokens, 128 rows: over one read", "at most", 1.3, "x", reads, READS, case)
    ids = figure("rewards", "ms", 1e3, run="ids")
    yield Demand("rewards", "1,024 completions of 256 tokens", "at most", 50, "µs", ids, LATENCY)
    for model in ("2B", "7B"):
        yield from _step_demands(model)


def _step_demands(model: str) -> Iterator[Demand]:
    """Of a GPU's step."""
    case = {"model": model, "images": 4, "prompts": 1}
    for name, phases in (("prefill", ("prefill",)), ("training", ("policy_forward", "backward"))):
        what, rate = f"{model}: {name}, of the matrix rate", matrix_rate(phases, **case)
        yield Demand("step", what, "at least", 40, "%", rate, PRODUCTS, case)
    what, decoding = f"{model}: decoding, over its floor", over_floor("decode", **case)
    yield Demand("step", what, "at most", 1.5, "x", decoding, DECODING, case)
    for images in (1, 4, 6):
        case = {"model": model, "images": images, "prompts": 1}
        for peer, key in (("TRL's step", "ratio"), ("the paper's trainer's step", "univg_r1_ratio")):
            what = f"{model}, {_counted(images, 'image')}: {peer} over ours"
            yield Demand("step", what, "at least", 4, "x", figure("step", key, **case), STEP, case)


def cpu_demands() -> Iterator[Demand]:
    """Of two cores."""
    case, eager = {"op": HEAD, "N": 512, "V": 151_936, "H": 256}, {"implementation": "eager"}
    time, memory = (ratio("kernels", key, {}, eager, **case) for key in ("ms", "peak_mb"))
    yield Demand("kernels", "fused loss: its time over eager's", "at most", 1, "x", time, LARGER, case)
    yield Demand("kernels", "fused loss: its memory over eager's", "at most", 0.25, "x", memory, SCRATCH)
    python = ratio("rewards", "ms", {"run": "decode, re, IoU"}, {"run": "ids"})
    yield Demand("rewards", "decode, re and IoU in Python: over ours", "at least", 100, "x", python, PYTHON)
    for run in ("bytes, think", "bytes, list"):
        yield Demand(
            "rewards", f"{run}: read", "at least", 1, "GB/s", figure("rewards", "gb_per_second", run=run), WIDER
        )
    for images, prompts, least in ((4, 1, 5), (1, 1, 3), (6, 1, 3), (4, 4, 3)):
        case = {"model": "44M", "images": images, "prompts": prompts}
        what = f"{_counted(images, 'image')}, {_counted(prompts, 'prompt')}: TRL's step over ours"
        yield Demand("step", what, "at least", least, "x", figure("step", "ratio", **case), STEP, case)
    memory = figure("step", "peak_memory_ratio", model="44M", images=4, prompts=1)
    yield Demand("step", "4 images: our memory over TRL's", "at most", 1 / 3, "x", memory, SCRATCH)
    what = "twice the completions, where prompts dominate"
    yield Demand("step", what, "at most", 1.3, "x", lambda r: r["step"]["growth"]["doubled_group"]["ratio"], DECODING)
    what = "growth with a size: a step's distance from its line"
    yield Demand("step", what, "at most", 25, "%", off_line, QUIET)
    yield Demand("all", "`make bench`: its parts", "at most", 15, "minutes", minutes, "fewer steps of the peers")


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

"""The figures that are wanted of each machine, in one place, and what a record of results says of them.

python bench/publish/demands.py [bench/results/<device>/<date>.json]        default: the newest of this machine's device
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from boxgrpo.bench.machine import folder
from boxgrpo.bench.publish.result_files import PARTS, newest, part, read

QWEN_2B, QWEN_7B = {"V": 151_936, "H": 1536}, {"V": 152_064, "H": 3584}
MB = 1e6
# What would close a gap, as far as counting tells: to be tried, not found.
HEAD = "each row of logits read once, not twice: kept in a cluster's shared memory, or a product that stores exp(z)"
READS = "more bytes in flight, for it is one pass over the logits: larger tiles, rows that overlap"
LATENCY = "one launch less, or a CUDA graph around it, for it moves next to nothing"
PRODUCTS = "more tokens in a pack for larger products, fewer small operators between them"
DECODING = "fewer and larger operators between the reads of the weights, more completions at a time"
SCRATCH = "smaller chunks of logits"
STEP = "the phase that is furthest above its floor"


@dataclass(frozen=True)
class Demand:
    """A figure and its limit; `find` takes it from a record, None where the record has not what it needs."""

    part: str
    what: str
    limit: float
    unit: str
    at_most: bool
    find: Callable[[dict], float | None]
    close: str = ""
    where: Callable[[dict], str] = lambda record: ""  # where the time goes, as the record tells

    def verdict(self, record: dict) -> dict:
        """What was wanted, what was measured, and whether it is met, short, or not measured."""
        measured = self.find(record)
        wanted = f"{'at most' if self.at_most else 'at least'} {self.limit:.3g} {self.unit}".strip()
        found = {"part": self.part, "what": self.what, "wanted": wanted, "measured": measured}
        if measured is None:
            return found | {"verdict": "not measured"}
        met = measured <= self.limit if self.at_most else measured >= self.limit
        away = f"{abs(measured - self.limit) / self.limit:.1%}" if self.limit else f"{measured:g}"
        to_try = f"to try: {self.close}" if self.close else ""
        short = "; ".join(filter(None, (f"short by {away}", self.where(record), to_try)))
        return found | {"measured": float(f"{measured:.4g}"), "verdict": "met" if met else short}


def kernel(record: dict, op: str, by: str = "boxgrpo", **shape: int) -> dict | None:
    """The row of an op at a shape, of which `shape` names some sizes."""
    rows = record.get("kernels", {}).get("rows", [])
    found = (r for r in rows if r["op"] == op and r["implementation"] == by and shape.items() <= r["shape"].items())
    return next(found, None)


def of_kernel(key: str, op: str, **shape: int) -> Callable[[dict], float | None]:
    return lambda record: (row := kernel(record, op, **shape)) and row[key]


def where_in_kernel(op: str, **shape: int) -> Callable[[dict], str]:
    """What bounds our row, and what the call costs the host where that is much of it."""

    def tell(record: dict) -> str:
        row = kernel(record, op, **shape)
        told = f"at {row['percent_of_floor']:g}% of what {row['floor_is']} allow"
        host = row.get("host_ms") or 0.0
        return told + f", {1e3 * host:.0f} of {1e3 * row['ms']:.0f} µs on the host" * (host > row["ms"] / 2)

    return tell


def times_of(op: str, by: str, **shape: int) -> Callable[[dict], float | None]:
    """How many times ours another implementation takes."""

    def find(record: dict) -> float | None:
        ours, other = kernel(record, op, **shape), kernel(record, op, by, **shape)
        return other["ms"] / ours["ms"] if ours and other else None

    return find


def share_of(op: str, by: str, key: str, **shape: int) -> Callable[[dict], float | None]:
    """Our figure over another implementation's."""

    def find(record: dict) -> float | None:
        ours, other = kernel(record, op, **shape), kernel(record, op, by, **shape)
        return ours[key] / other[key] if ours and other and ours[key] and other[key] else None

    return find


def head_memory(n: int, sizes: dict[str, int]) -> Callable[[dict], float | None]:
    """MB beyond the inputs, their gradients in bf16 and one gradient of the weight in fp32."""
    given_back = (2 * (n + sizes["V"]) + 4 * sizes["V"]) * sizes["H"] / MB

    def find(record: dict) -> float | None:
        row = kernel(record, "fused_grpo_loss", N=n, **sizes)
        return max(0.0, row["peak_mb"] - given_back) if row and row["peak_mb"] else None

    return find


def of_rewards(key: str, run: str, scale: float = 1.0) -> Callable[[dict], float | None]:
    def find(record: dict) -> float | None:
        rows = {r["run"]: r for r in record.get("rewards", {}).get("rows", [])}
        return rows[run][key] * scale if key in rows.get(run, {}) else None

    return find


def rewards_ratio(record: dict) -> float | None:
    rows = {r["run"]: r["ms"] for r in record.get("rewards", {}).get("rows", [])}
    return rows["decode, re, IoU"] / rows["ids"] if {"ids", "decode, re, IoU"} <= rows.keys() else None


def step(record: dict, model: str, images: int, prompts: int = 1) -> dict | None:
    wanted = {"model": model, "images": images, "prompts": prompts}
    return next((r for r in record.get("step", {}).get("rows", []) if wanted.items() <= r.items()), None)


def of_step(key: str, *which) -> Callable[[dict], float | None]:
    return lambda record: (row := step(record, *which)) and row.get(key)


def matrix_rate(names: tuple[str, ...], *which) -> Callable[[dict], float | None]:
    """Percent of the measured matrix rate that phases together reach."""

    def find(record: dict) -> float | None:
        row = step(record, *which)
        if not row or "phases" not in row:
            return None
        chosen = [row["phases"][name] for name in names]
        rate = 1e9 * sum(p["gflop"] for p in chosen) / sum(p["seconds"] for p in chosen)
        return 100 * rate / part(record, "step")["ceilings"]["flop_per_second"]

    return find


def over_floor(phase: str, *which) -> Callable[[dict], float | None]:
    def find(record: dict) -> float | None:
        found = ((step(record, *which) or {}).get("phases") or {}).get(phase)
        return found["seconds"] / found["floor_s"] if found else None

    return find


def where_in_step(*which) -> Callable[[dict], str]:
    """The two phases that take the most above their floors."""

    def tell(record: dict) -> str:
        phases = (step(record, *which) or {}).get("phases") or {}
        above = {name: p["seconds"] - p.get("floor_s", 0.0) for name, p in phases.items()}
        named = sorted(above, key=above.get, reverse=True)[:2]
        told = (f"{name.replace('_', ' ')} {1e3 * above[name]:.0f} ms" for name in named)
        return f"above their floors: {', '.join(told)}" if named else ""

    return tell


def tests_failed(record: dict) -> float | None:
    """None where none passed, or none failed before the run was cut off: what it did not reach might have."""
    counts = record.get("tests", {}).get("counts", {})
    if failed := counts.get("FAILED", 0) + counts.get("ERROR", 0):
        return float(failed)
    outcome = record.get("parts", {}).get("tests", {}).get("outcome", "")
    return 0.0 if counts.get("PASSED") and outcome.startswith(("done", "failed with")) else None


def of_gpu() -> Iterator[Demand]:
    """Of one H200."""
    logits = "fused_grpo_loss_from_logits"
    yield Demand("tests", "tests marked gpu that fail", 0, "", True, tests_failed)
    for n in (2048, 8192, 32768):
        share = of_kernel("percent_of_floor", logits, N=n)
        what, where = f"loss from logits, N = {n}: of the copy bandwidth", where_in_kernel(logits, N=n)
        yield Demand("kernels", what, 85, "%", False, share, READS, where)
    liger, where = times_of(logits, "liger", N=8192), where_in_kernel(logits, N=8192)
    yield Demand("kernels", "loss from logits: Liger's time over ours", 1.4, "x", False, liger, READS, where)
    for name, sizes, most in (("2B", QWEN_2B, 17), ("7B", QWEN_7B, 40)):
        head = of_kernel("ms", "fused_grpo_loss", N=8192, **sizes)
        where = where_in_kernel("fused_grpo_loss", N=8192, **sizes)
        yield Demand("kernels", f"fused head, {name}, N = 8192", most, "ms", True, head, HEAD, where)
        memory = head_memory(8192, sizes)
        yield Demand("kernels", f"fused head, {name}: memory of its own", 1000, "MB", True, memory, SCRATCH)
        for peer in ("liger", "trl"):
            slower = times_of("fused_grpo_loss", peer, N=8192, **sizes)
            what = f"fused head, {name}: {peer}'s time over ours"
            yield Demand("kernels", what, 1, "x", False, slower, HEAD, where)
    for groups in (16, 1024):
        found = of_kernel("ms", "group_advantages", B=groups)
        micro = lambda record, found=found: None if (ms := found(record)) is None else 1e3 * ms  # noqa: E731
        where = where_in_kernel("group_advantages", B=groups)
        yield Demand("kernels", f"group_advantages, {groups} groups", 15, "µs", True, micro, LATENCY, where)
    read, where = share_of("sample_tokens", "one read", "ms", n=128), where_in_kernel("sample_tokens", n=128)
    yield Demand("kernels", "sample_tokens, 128 rows: over one read", 1.3, "x", True, read, READS, where)
    ids = of_rewards("ms", "ids", 1e3)
    yield Demand("rewards", "1,024 completions of 256 tokens", 50, "µs", True, ids, LATENCY)
    for model in ("2B", "7B"):
        at, where = (model, 4), where_in_step(model, 4)
        prefill, training = matrix_rate(("prefill",), *at), matrix_rate(("policy_forward", "backward"), *at)
        yield Demand("step", f"{model}: prefill, of the matrix rate", 40, "%", False, prefill, PRODUCTS, where)
        yield Demand("step", f"{model}: training, of the matrix rate", 40, "%", False, training, PRODUCTS, where)
        decoding = over_floor("decode", *at)
        yield Demand("step", f"{model}: decoding, over its floor", 1.5, "x", True, decoding, DECODING, where)
        for images in (1, 4, 6):
            at = f"{model}, {_counted(images, 'image')}"
            trl, where = of_step("ratio", model, images), where_in_step(model, images)
            yield Demand("step", f"{at}: TRL's step over ours", 4, "x", False, trl, STEP, where)
            paper = of_step("univg_r1_ratio", model, images)
            yield Demand("step", f"{at}: the paper's trainer's step over ours", 4, "x", False, paper, STEP, where)


def of_cpu() -> Iterator[Demand]:
    """Of two cores."""
    shape = {"N": 512, "V": 151_936, "H": 256}
    time, memory = (share_of("fused_grpo_loss", "eager", key, **shape) for key in ("ms", "peak_mb"))
    where = where_in_kernel("fused_grpo_loss", **shape)
    larger = "larger chunks of logits, which are larger products, as far as the memory goes"
    yield Demand("kernels", "fused loss: its time over eager's", 1, "x", True, time, larger, where)
    yield Demand("kernels", "fused loss: its memory over eager's", 0.25, "x", True, memory, SCRATCH)
    python = "less Python around the compiled parser's call"
    yield Demand("rewards", "decode, re and IoU in Python: over ours", 100, "x", False, rewards_ratio, python)
    for run in ("bytes, think", "bytes, list"):
        rate = of_rewards("gb_per_second", run)
        yield Demand("rewards", f"{run}: read", 1, "GB/s", False, rate, "wider loads where a byte opens no tag")
    for images, prompts, least in ((4, 1, 5), (1, 1, 3), (6, 1, 3), (4, 4, 3)):
        what = f"{_counted(images, 'image')}, {_counted(prompts, 'prompt')}: TRL's step over ours"
        ratio, where = of_step("ratio", "44M", images, prompts), where_in_step("44M", images, prompts)
        yield Demand("step", what, least, "x", False, ratio, STEP, where)
    memory = of_step("peak_memory_ratio", "44M", 4)
    yield Demand("step", "4 images: our memory over TRL's", 1 / 3, "x", True, memory, SCRATCH)

    def doubled(record: dict) -> float | None:
        return record.get("step", {}).get("growth", {}).get("doubled_group", {}).get("ratio")

    yield Demand("step", "twice the completions, where prompts dominate", 1.3, "x", True, doubled, DECODING)
    straight = "steps that the host's other guests do not disturb, or more of them"
    yield Demand("step", "growth with a size: a step's distance from its line", 25, "%", True, off_line, straight)
    yield Demand("all", "`make bench`: its parts", 15, "minutes", True, minutes, "fewer steps of the peers")


def off_line(record: dict) -> float | None:
    """The farthest of all sizes."""
    grown = record.get("step", {}).get("growth", {}).values()
    return max((g["misfit_percent"] for g in grown if "misfit_percent" in g), default=None)


def minutes(record: dict) -> float | None:
    """What all parts of a record took; None where one does not say it."""
    taken = [record.get(name, {}).get("took_s") for name in PARTS]
    return None if None in taken else sum(taken) / 60


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def verdicts(record: dict) -> list[dict]:
    """What the record says of each demand on its machine."""
    return [demand.verdict(record) for demand in (of_gpu() if "cuda" in record["machine"] else of_cpu())]


def verdict_table(found: list[dict]) -> str:
    """Markdown: a line for each demand."""
    lines = ["| | wanted | measured | |", "|---|---|---|---|"]
    for v in found:
        measured = "" if v["measured"] is None else f"{v['measured']:g}"
        lines.append(f"| {v['what']} | {v['wanted']} | {measured} | {v['verdict']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a file of results")
    file = parser.parse_args().file
    record = read(Path(file)) if file else newest(folder())
    print(f"{record['machine']['device']}, {record['machine']['date']}\n\n{verdict_table(verdicts(record))}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"demands.py: {error}")

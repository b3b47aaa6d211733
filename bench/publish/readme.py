"""The README's numbers: what stands between `<!-- results:NAME -->` and `<!-- end -->`."""

import re

from boxgrpo.bench.kernel_bench.kernels_table import head_table
from boxgrpo.bench.reward_bench.rewards_table import first_and_rates, rewards_row
from boxgrpo.bench.step_bench.step_table import growth_table, phases_table, steps_table
from boxgrpo.bench.studies.ablation_tables import summary as ablation_summary
from boxgrpo.bench.studies.demo_seeds import table as demo_table

from .demands import minutes
from .result_files import PARTS, Records, part

BLOCK = re.compile(r"(?P<open><!-- results:(?P<name>[\w ]+) -->)(?P<body>.*?)(?P<close><!-- end -->)", re.DOTALL)
WIDTH = 120


def blocks(found: Records) -> dict[str, str]:
    """Each block's text. Raises ValueError where a record is missing that a block is about."""
    record = found.devices.get("cpu", {})
    if missing := set(PARTS) - record.keys():
        raise ValueError(f"bench/results/cpu has no results of {', '.join(sorted(missing))}; `make bench` makes them.")
    if missing := {"demo", "data", "soak", "soak_zero2", "ablation"} - found.long.keys():
        raise ValueError(
            f"bench/results/cpu has no {', '.join(sorted(missing))}.json; its command stands in README.md."
        )
    step, kernels, rewards = (part(record, name) for name in ("step", "kernels", "rewards"))
    return {
        "ablation": ablation_summary(found.long["ablation"]["runs"]),
        "ablation machine": found.long["ablation"]["machine"]["device"],
        "demo": demo_table(found.long["demo"]),
        "demo machine": found.long["demo"]["machine"]["device"],
        "data": data(found.long["data"]),
        "soak": soak(found.long["soak"]),
        "soak zero2": f"killed {len(_killed(found.long['soak_zero2']))} times, "
        f"{_found(found.long['soak_zero2'], 'A')['some while saving']} of them while saving",
        "step": steps_table(step),
        "step machine": step["machine"]["device"],
        "phases": phases_table(step["rows"][0]),
        "growth": growth_table(step["growth"]),
        "kernels": head_table(kernels),
        "kernels machine": kernels["machine"]["device"],
        "bench minutes": f"{minutes(record):.1f} minutes in its parts",
        "rewards": rewards_row(rewards),
        "rewards machine": rewards["machine"]["device"],
        "rewards first": first_and_rates(rewards),
    }


def data(record: dict) -> str:
    return (
        f"{record['options']['records']:,} records of {record['megabytes']} MB take {record['scan_s']:.1f} s, "
        f"{record['open_s']:.2f} s from then on, and {record['memory_mb']:.0f} MB of memory (`python "
        f"bench/bench_data.py`, {record['machine']['device']})"
    )


def soak(record: dict) -> str:
    """What the soak of `ddp` found."""
    a, b = (_found(record, name) for name in "AB")
    memory = record["parts"]["C"]["memory"]
    growths = [memory[f"rank{rank} anonymous"]["growth"] for rank in range(2)]
    told = " and ".join(f"{growth:+.2%}".replace("%", " %") for growth in growths)
    return (
        f"({record['machine']['device']}, two ranks, `bench/results/cpu/soak.json`): a run killed "
        f"{len(_killed(record))} times, {a['some while saving']} of them while it was saving, and one of "
        f"{record['parts']['B']['steps']} steps with {len(_killed(record, 'B'))} kills, "
        f"{b['NaN steps skipped, no others'].split()[0]} NaN steps and "
        f"{b['corrupt images passed over'].split()[0]} unreadable records end to the bit as their like without kills; "
        f"there the memory of steps 400–500, what is free given back first, differs by {told} from that of steps "
        "100–200"
    )


def _found(record: dict, name: str) -> dict[str, str]:
    return {d["demand"]: d["found"] for d in record["parts"][name]["demands"]}


def _killed(record: dict, name: str = "A") -> list[dict]:
    return record["parts"][name]["kills"]


def stale(text: str, wanted: dict[str, str]) -> list[str]:
    """Names of blocks that say something else, of those that nothing fills, and of those that are not there."""
    held = {block["name"]: block["body"] for block in BLOCK.finditer(text)}
    said = [name for name, body in held.items() if name not in wanted or not _same(body, wanted[name])]
    return said + [f"{name}, which is missing" for name in wanted.keys() - held.keys()]


def filled(text: str, wanted: dict[str, str]) -> str:
    """The text with its blocks as they should be; one that says the same in other lines is left alone."""

    def fill(block: re.Match) -> str:
        body = wanted.get(block["name"])
        if body is None:
            raise ValueError(f"README.md has a block {block['name']!r}; there are {', '.join(wanted)}.")
        if not _same(block["body"], body):
            on_its_own = block["body"].startswith("\n")
            column = block.start("body") - text.rfind("\n", 0, block.start("body")) - 1
            body = f"\n\n{body}\n\n" if on_its_own else _wrapped(body, column)
            return block["open"] + body + block["close"]
        return block[0]

    return BLOCK.sub(fill, text)


def _same(held: str, wanted: str) -> bool:
    """Tables line by line, sentences word by word."""
    if held.startswith("\n"):
        return held.strip() == wanted
    return held.split() == wanted.split()


def _wrapped(text: str, column: int) -> str:
    """The words in lines of the README's width, the first of which begins at a column."""
    lines = [[]]
    for word in text.split():
        if lines[-1] and column + len(word) + 1 > WIDTH:
            lines.append([])
            column = 0
        column += len(word) + (1 if lines[-1] else 0)
        lines[-1].append(word)
    return "\n".join(" ".join(words) for words in lines)

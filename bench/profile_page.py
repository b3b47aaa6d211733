"""The numbers of bench/README.md, between `<!-- profile:NAME -->` and `<!-- end -->`, from a recorded profile.

python bench/profile_step.py --json bench/results/cpu/profile.json
python -P -m boxgrpo.bench.profile_page             writes them into the page
"""

import json
import re
from pathlib import Path

from boxgrpo.bench.machine import RESULTS
from boxgrpo.bench.profile_step import shown

PAGE = Path(__file__).resolve().parent / "README.md"
RECORD = RESULTS / "cpu/profile.json"
BUSY = 1.0  # load of the minute before
BLOCK = re.compile(r"(<!-- profile:(\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def blocks(record: dict) -> dict[str, str]:
    """Each block's text: the table, and the figures that the worked example goes by."""
    by_name = {row["name"]: row for row in record["rows"]}
    step, decode = by_name["step"], by_name["step > rollout > decode"]
    forward, head = by_name["step > policy > forward"], by_name["step > policy > forward > head+loss"]
    tokens = int(decode["titles"][0].split("x")[1])
    machine = record["machine"]
    return {
        "machine": f"{machine['device']}, torch {machine['torch']}, revision {machine['revision']}, {machine['date']}, "
        f"load {record['load_before']} before it began"
        + (": it had other work, so read shares, not milliseconds" if record["load_before"] > BUSY else ""),
        "case": f"{record['case']}; {record['tool']}, mean of {record['steps']} steps",
        "table": f"\n\n{shown(record)}\n\n",
        "unwatched": f"{1e3 * record['unwatched_step_s']:.0f} ms",
        "largest": f"`decode` has {_share(decode, step)} of the step and `policy > forward` {_share(forward, step)}",
        "inside": f"{_share(head, forward)} of the forward pass",
        "blame": f"`{head['top'][0][0]}` with {head['top'][0][1]:.0%}",
        "decode": f"{decode['launches'] / tokens:.0f} operator calls a token, `{decode['top'][0][0]}` has "
        f"{decode['top'][0][1]:.0%} of its time",
    }


def filled(page: str, wanted: dict[str, str]) -> str:
    """The page with its blocks as the record has them. Raises ValueError where it has others than these."""
    if (held := {name for _, name, _, _ in BLOCK.findall(page)}) != wanted.keys():
        raise ValueError(f"the page's blocks are {sorted(held)}; they must be {sorted(wanted)}. Correct {PAGE.name}.")
    return BLOCK.sub(lambda found: found[1] + wanted[found[2]] + found[4], page)


def _share(part: dict, whole: dict) -> str:
    return f"{part['seconds'] / whole['seconds']:.0%}"


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(), blocks(json.loads(RECORD.read_text()))))


if __name__ == "__main__":
    main()

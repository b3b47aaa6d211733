"""The numbers of bench/README.md, between `<!-- profile:NAME -->` and `<!-- end -->`, from the recorded profile."""

import re

from boxgrpo.bench.profiles.profile_step import row_of, shown
from boxgrpo.trainer.profiling.timeline import percent_of_floor

from .result_files import described

BLOCK = re.compile(r"(<!-- profile:(\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)


def blocks(record: dict) -> dict[str, str]:
    """Each block's text: the table, and the figures that the worked example goes by."""
    by_name = {row["name"]: row for row in record["rows"]}
    step, decode = by_name["step"], by_name["step > rollout > decode"]
    forward, head = by_name["step > policy > forward"], by_name["step > policy > forward > head+loss"]
    tokens = int(decode["titles"][0].split("x")[1])
    return {
        "machine": described(record["machine"]),
        "case": f"{record['case']}; {record['tool']}, mean of {record['steps']} steps",
        "table": f"\n\n{shown(record)}\n\n",
        "unwatched": f"{1e3 * record['unwatched_step_s']:.0f} ms",
        "largest": f"`decode` has {_share(decode, step)} of the step and `policy > forward` {_share(forward, step)}",
        "inside": f"{_share(head, forward)} of the forward pass",
        "blame": f"`{head['top'][0][0]}` with {head['top'][0][1]:.0%}",
        "decode": f"It reaches {percent_of_floor(row_of(decode), decode['floor'])} % of its floor, in "
        f"{decode['launches'] / tokens:.0f} operator calls a token; `{decode['top'][0][0]}` has "
        f"{decode['top'][0][1]:.0%} of its time",
    }


def filled(page: str, wanted: dict[str, str]) -> str:
    """The page with its blocks as the record has them. Raises ValueError where it has others than these."""
    if (held := {name for _, name, _, _ in BLOCK.findall(page)}) != wanted.keys():
        raise ValueError(f"bench/README.md has the blocks {sorted(held)}; they must be {sorted(wanted)}.")
    return BLOCK.sub(lambda found: found[1] + wanted[found[2]] + found[4], page)


def _share(part: dict, whole: dict) -> str:
    return f"{part['seconds'] / whole['seconds']:.0%}"

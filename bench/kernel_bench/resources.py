"""Compile every Triton kernel as its launcher would start it, without a GPU, and print the resources it needs.

python -P -m boxgrpo.bench.kernel_bench.resources [--capability 90]
"""

import argparse
import re

from boxgrpo.kernels.resources import CAPABILITIES, compile_launch, launches, resources, walks
from boxgrpo.trainer.arguments import FlagParser


def instructions(ptx: str) -> str:
    """How many of some instructions a kernel has."""
    wide = {kind: len(re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st")}
    return f"{ptx.count('bar.sync')} barriers, {wide['ld']} 16-byte loads, {wide['st']} 16-byte stores"


def main() -> None:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, action="append", help="default: all")
    parser.add_argument("--every_variant", action="store_true", help="every combination of options")
    args = parser.parse_args()
    print(f"{'capability':>10} {'registers':>9} {'spilled':>7} {'shared':>6}  kernel")
    for name, launch in launches(args.every_variant):
        for capability in args.capability or CAPABILITIES:
            compiled = compile_launch(launch, capability)
            r, detail = resources(compiled), instructions(compiled.asm["ptx"])
            for walk in walks(launch, compiled):  # a loop that copies to shared memory, for 16 elements of a thread
                detail += f", {walk.slots:g} issue slots ({walk.half_rate:g} of half rate)"
            print(f"{capability:>10} {r.registers:>9} {r.spilled:>7} {r.shared:>6}  {name} ({detail})", flush=True)


if __name__ == "__main__":
    main()

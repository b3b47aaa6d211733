"""All measurements of this machine into one file, bench/results/<device>/<date>.json.

    python bench/bench.py                             make bench: a quarter of an hour on two quiet cores
    python bench/bench.py --full                      more steps of the peers, more sizes of ours
    python bench/bench.py --parts kernels rewards     the other parts that the file holds stay as they are
    python bench/bench.py --parts kernels --only fused --json -   cases whose name holds this, kept nowhere
    python bench/bench.py --gpu                       make bench-gpu: builds, tests and measures on one GPU
    python bench/bench.py --gpu --output DIR          a copy of record, verdicts and logs there as well
    python bench/bench.py --gpu --parts build kernels_compiled steps_rest profile growth    the rest, same file
    python bench/bench.py --gpu --device cpu --quick  tries the script where there is no GPU: tiny sizes

Each part runs in a process of its own, and the rows that it has measured are kept if it fails or is stopped. Nothing is
installed: the folders get their import names by links under out/site. The exit status is 1 where something of ours
failed.

With --gpu a bare checkout is enough, with torch, transformers and psutil, and without a network. The box parser is
compiled in place, at the lowest priority beside the first kernels; without nvcc that fails, and the rewards with it.
What is missing (pytest, liger-kernel, TRL) is named and left out; PYTHONPATH may add it. Nine minutes are the limit,
and each part has a limit of its own: first the figures that are demanded, then the tests marked gpu, then the rest.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "trainer", "bench")
CUDA = Path("/usr/local/cuda")


def link_packages() -> Path:
    """The folder that gives the checkout's folders their import names."""
    site = ROOT / "out/site"
    (site / "boxgrpo").mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = site / "boxgrpo" / name
        if not link.is_symlink() or link.resolve() != ROOT / name:  # the checkout may have been moved
            link.unlink(missing_ok=True)
            link.symlink_to(ROOT / name)
    return site


def command(args: list[str] | None = None) -> None:
    """Run with our packages first, here and in the parts; no hub; the CUDA compiler where it usually is installed."""
    site = str(link_packages())
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    os.environ |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if "CUDA_HOME" not in os.environ and (CUDA / "bin/nvcc").exists():
        os.environ["CUDA_HOME"] = str(CUDA)
    try:
        from boxgrpo.bench.all_parts import main
        from boxgrpo.trainer.runtime.ranks import run_as_script
    except ImportError as error:
        sys.exit(f"bench.py: {error}")
    run_as_script(lambda: main(args, __doc__), "bench.py")


if __name__ == "__main__":
    command()

"""What bench.py --gpu does besides measuring.

python bench/checks.py build|tests
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from boxgrpo.trainer.runtime.ranks import run_as_script

ROOT = Path(__file__).resolve().parent.parent


def build() -> None:
    """The box parser, compiled in place. Raises ValueError where it does not serve the device afterwards."""
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    check = f"import boxgrpo.kernels; assert boxgrpo.kernels.dispatch.is_compiled({kind!r})"
    if done.returncode or subprocess.run([sys.executable, "-P", "-c", check]).returncode:
        raise ValueError(f"csrc/ was not compiled for {kind}; the compiler's message stands above.")


def tests() -> None:
    """pytest on the files that have tests for a GPU; for a CPU on one that has none. The exit status is pytest's."""
    gpu = torch.cuda.is_available()
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [file for file in every if re.search(r"mark\.gpu|\bBACKENDS\b|\bon_triton\b", file.read_text())]
    files = [str(file.relative_to(ROOT)) for file in files] if gpu else ["tests/kernel_tests/test_boxes.py"]
    flags = ["-v", "--tb=short", "-p", "no:cacheprovider", *(["-m", "gpu"] if gpu else [])]
    if importlib.util.find_spec("xdist"):
        flags += ["-n", str(min(12, os.cpu_count() or 1))]
    # -P: else the repository's own folder `kernels` would stand first on the path.
    sys.exit(subprocess.run([sys.executable, "-P", "-m", "pytest", *flags, *files], cwd=ROOT).returncode)


CHECKS = {"build": build, "tests": tests}


def main() -> None:
    if sys.argv[1:] not in ([name] for name in CHECKS):
        raise ValueError(f"{' '.join(sys.argv[1:])!r} names no check. Name one of {', '.join(CHECKS)}.")
    CHECKS[sys.argv[1]]()


if __name__ == "__main__":
    run_as_script(main, "checks.py")

"""The machine that a figure belongs to."""

import os
import platform
import re
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl")
# As a description names them.
VERSIONS = {"driver": "driver", "cuda": "CUDA", "torch": "torch"}
PEERS = {"triton": "Triton", "transformers": "transformers", "liger-kernel": "Liger", "trl": "TRL"}


def shared_data() -> Path:
    """The folder of real records and Qwen2's merges: data/ in BOXGRPO_SHARED, else in `shared` beside the checkout."""
    return Path(os.environ.get("BOXGRPO_SHARED", RESULTS.parents[2] / "shared")) / "data"


def machine() -> dict[str, str | int | float]:
    """What describes the machine of a figure. A revision that ends in -dirty is of a tree with uncommitted changes.

    A copy that is no git checkout takes its revision from BOXGRPO_REVISION.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)", listed)
    return {
        "device": gpu or f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        **(_gpu() if gpu else {}),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
        "revision": os.environ.get("BOXGRPO_REVISION")
        or _output("git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def folder() -> Path:
    """bench/results/<device>, made if need be."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = RESULTS / device.replace(" ", "-").lower()
    path.mkdir(parents=True, exist_ok=True)
    return path


def describe(machine: dict, *, peers: bool = False) -> str:
    """The machine in a line, with the revision and the day; with `peers` also the packages that are compared."""
    words = [machine["device"]]
    words += [f"{machine['gpu_memory_gb']:.0f} GB"] if "gpu_memory_gb" in machine else []
    words += [f"{n} thread{'s' * (n != 1)}"] if (n := machine.get("threads")) else []
    named = VERSIONS | PEERS if peers else VERSIONS
    words += [f"{name} {machine[key]}" for key, name in named.items() if key in machine]
    return ", ".join([*words, f"revision {machine['revision']}", machine["date"]])


def _gpu() -> dict[str, str | float]:
    """Memory, CUDA and, where nvidia-smi reports it, the driver."""
    memory = torch.cuda.get_device_properties(0).total_memory
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    found = {"gpu_memory_gb": round(memory / 1e9, 1), "cuda": str(torch.version.cuda)}
    return found | ({"driver": driver[0]} if driver else {})


def _output(*command: str) -> str:
    """What a command prints; empty where it is not installed."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

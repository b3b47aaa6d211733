"""The machine that a figure belongs to, and what it allows."""

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


def machine() -> dict[str, str | int | float]:
    """What a figure must be read with. A revision that ends in -dirty is of a tree with changes of its own.

    A copy that git does not know takes it from BOXGRPO_REVISION.
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
        "revision": os.environ.get("BOXGRPO_REVISION") or _revision(),
        "date": time.strftime("%Y-%m-%d"),
    }


def folder() -> Path:
    """bench/results/<device>, made if need be."""
    path = RESULTS / (folder_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu")
    path.mkdir(parents=True, exist_ok=True)
    return path


def folder_name(gpu: str) -> str:
    return gpu.replace(" ", "-").lower()


def _gpu() -> dict[str, str | float]:
    """Memory, CUDA and driver; the driver where nvidia-smi tells it."""
    memory = torch.cuda.get_device_properties(0).total_memory
    found = {"gpu_memory_gb": round(memory / 1e9, 1), "cuda": str(torch.version.cuda)}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        found |= {"driver": told[0]} if told else {}
    return found


def _revision() -> str:
    if not shutil.which("git"):
        return ""
    asked = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Processes of a measurement: running a function in one of its own, killing a tree of them, the peak memory of one."""

import contextlib
import gc
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


def run_isolated(function: Callable, *args, preload: Sequence[str] = ()):
    """The function's result from a process of its own, forked off one that has imported the modules of `preload`.

    Without `preload` the process is spawned. A GPU's must be: CUDA does not survive a fork.

    Raises:
        ChildProcessError: the process died.
    """
    context = get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(f"the process of {function.__name__} died") from error


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants. (torchrun starts each rank in a session of its own: no group has all.)"""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(run: subprocess.Popen) -> None:
    """SIGKILL for the process and all its descendants, as in a power failure; returns when they are gone."""
    tree = process_tree(run.pid)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.communicate()
    while not all(map(_ended, tree)):  # one may be in an fsync
        time.sleep(0.001)


def _ended(process: psutil.Process) -> bool:
    """Also true of a process whose exit status is never collected, as in a container whose first process does not."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def resident_bytes(process: psutil.Process, *, anonymous: bool = False) -> int:
    """Resident memory, or the part of it that no file backs; 0 for a process that has ended."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return memory.rss - (memory.shared if anonymous else 0)


class PeakMemory:
    """The most memory that this process has held above what it held at `start`: allocated on a GPU, else resident."""

    def __init__(self, *, gpu: bool):
        self.gpu, self.base = gpu, None

    def start(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        elif CLEAR_REFS.exists():
            self.base = psutil.Process().memory_info().rss
            CLEAR_REFS.write_text("5")  # the kernel's high-water mark begins anew

    def peak(self) -> int | None:
        """Bytes; None where the system has no such count."""
        if self.base is None:
            return None
        if self.gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.base
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1]) - self.base

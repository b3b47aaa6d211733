"""Processes of a launcher: all of them, and the end of all of them at once."""

import os
import signal
import subprocess
import time
from pathlib import Path


def _state(pid: int) -> tuple[str, int] | None:
    """State and parent of a process; None when there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    except OSError:
        return None
    return state, int(parent)


def descendants(pid: int) -> list[int]:
    """The process and all below it. (torchrun gives each rank a session of its own: no group holds them.)"""
    states = {int(path.name): _state(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found, row = [], [pid]
    while row:
        found += row
        row = [pid for pid, state in states.items() if state and state[1] in row]
    return found


def kill(run: subprocess.Popen) -> None:
    """SIGKILL for the launcher and all below it, as when the machine goes down; returns when they are gone."""
    family = descendants(run.pid)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.communicate()
    while any((state := _state(pid)) and state[0] not in "ZX" for pid in family):  # one may sit in an fsync
        time.sleep(0.001)


def resident_kb(pid: int, kind: str = "VmRSS") -> int:
    """Resident memory of a process, what of it no file backs (RssAnon), or its most (VmHWM); 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith(f"{kind}:")]
    return int(sizes[0]) if sizes else 0

"""Ranks of a script, forked from a process that has imported torch: they start in a moment, not after 10 CPU-seconds.

`fork` does what torchrun does for a script on one machine: environment, a store that outlives the ranks, a SIGTERM
passed on, and the end of all ranks where one fails.
"""

import functools
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


class Run:
    """A launcher and its ranks, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, folder: tempfile.TemporaryDirectory):
        self.pid, self.folder, self.returncode = pid, folder, None

    def poll(self) -> int | None:
        if self.returncode is None and not Path(f"/proc/{self.pid}").exists():
            status = Path(self.folder.name, "status")
            self.returncode = int(status.read_text()) if status.exists() else -signal.SIGKILL
        return self.returncode

    def communicate(self, timeout: float = 200) -> tuple[str, None]:
        """What the ranks printed, when all have ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked ranks", timeout)
            time.sleep(0.01)
        return self.output(), None

    def output(self) -> str:
        """What the ranks have printed so far."""
        path = Path(self.folder.name, "output")
        return path.read_text(errors="replace") if path.exists() else ""


def fork(script: Path, arguments: list[str], ranks: int = 2) -> Run:
    """Start the ranks of a script that runs as `__main__` with these arguments."""
    folder, server = tempfile.TemporaryDirectory(), _server()
    request = {"script": str(script), "arguments": arguments, "ranks": ranks, "folder": folder.name}
    print(json.dumps(request), file=server.stdin, flush=True)
    return Run(int(server.stdout.readline()), folder)


@functools.cache
def _server() -> subprocess.Popen:
    """It ends with this process, when its standard input is closed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment)


def _serve() -> None:
    import boxgrpo.trainer.grpo  # noqa: F401 - for the scripts that are forked

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers leave no zombies
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _in_a_child(lambda line=line: _launch(**json.loads(line)))
        print(pid, flush=True)


def _in_a_child(call) -> None:
    """Call and end this process with the call's exit status."""
    status = 1
    try:
        status = call() or 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else bool(left.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _launch(script: str, arguments: list[str], ranks: int, folder: str) -> int:
    import torch.distributed as dist

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    output = os.open(f"{folder}/output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    meeting = socket.create_server(("127.0.0.1", 0))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1])}
    os.environ |= address | {"WORLD_SIZE": str(ranks), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    running, failed = set(), 0
    signal.signal(signal.SIGTERM, lambda *_: [os.kill(rank, signal.SIGTERM) for rank in running])
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _in_a_child(lambda rank=rank: _run(script, arguments, rank))
        running.add(pid)
    store = dist.TCPStore(  # noqa: F841 - which serves while it is referenced
        "127.0.0.1", meeting.getsockname()[1], is_master=True, wait_for_workers=False, master_listen_fd=meeting.detach()
    )
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            time.sleep(2)  # for those that end by themselves
            for other in running:
                os.kill(other, signal.SIGKILL)
    Path(folder, "status").write_text(str(failed))
    return 0


def _run(script: str, arguments: list[str], rank: int) -> None:
    import numpy
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    random.seed(), numpy.random.seed(), torch.seed()  # as in processes of their own
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _serve()

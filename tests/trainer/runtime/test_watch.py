"""A rank that was stopped or whose machine is lost is named by the others, which end."""

import os
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from boxgrpo.bench.processes import kill
from boxgrpo.trainer.runtime.watch import Watch
from runs import start, start_forked

STEPS = """
import os, sys, time
from boxgrpo.trainer.runtime.ranks import join_ranks

with join_ranks(timeout=20) as r:
    os.write(1, f"rank {r.rank} is {os.getpid()}\\n".encode())  # in one piece
    for step in range(1000):
        r.sum(1.0)
        time.sleep(0.02)
"""


def test_a_stopped_rank_ends_the_others_who_name_it(tmp_path):
    """Its process exists, so no launcher notices; no collective would end before the timeout of 20 s."""
    (tmp_path / "script.py").write_text(STEPS)
    run = start_forked(tmp_path / "script.py", SimpleNamespace(), ranks=3)
    while len(pids := dict(re.findall(r"rank (\d) is (\d+)\n", run.output()))) < 3:
        assert run.poll() is None, run.output()
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(int(pids["1"]), signal.SIGSTOP)
    out, _ = run.communicate(timeout=10)
    assert f"rank 1 (pid {pids['1']} on " in out and "sent no heartbeat for 2 s" in out, out
    assert "--resume auto" in out and run.returncode == 1


@pytest.mark.slow
def test_a_lost_machine_is_named_by_the_other(tmp_path):
    """Two launchers, as on two machines, of which one and its rank are killed: no launcher ends the other rank."""
    script = tmp_path / "script.py"
    script.write_text(STEPS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free.getsockname()[1]} --nnodes=2".split()
    here = start(script, SimpleNamespace(), 1, meeting)
    time.sleep(3)  # this one holds the meeting place
    there = start(script, SimpleNamespace(), 1, meeting)
    pid = int(there.stdout.readline().split()[-1])
    while not here.stdout.readline().startswith("rank"):
        pass
    kill(there)
    out, _ = here.communicate(timeout=60)
    assert here.returncode != 0 and f"(pid {pid} on " in out and "sent no heartbeat" in out, out


def test_who_is_lost(monkeypatch):
    """By the signs in the store alone: silent too long, not silent for long, finished."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    watch = Watch(0, 4, silence=30.0)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for rank in (1, 2, 3):
        watch.store.set(str(rank), "0")
    assert watch.lost() == {}
    now = 129.0
    watch.store.set("1", "1")
    watch.store.set("3", "finished")
    assert watch.lost() == {}
    now = 131.0
    assert watch.lost() == {2: "sent no heartbeat for 30 s"}
    now = 200.0
    assert watch.lost().keys() == {1, 2}
    watch.store.set("2", "1")
    assert watch.lost().keys() == {1}, "one that comes back is not lost"
    watch.store.set("1", "failed ValueError: no such file")
    assert watch.lost() == {1: "has failed with ValueError: no such file"}

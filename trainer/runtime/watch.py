"""Heartbeats: if a rank is killed or stopped, the others report it and exit instead of waiting for it."""

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

BEATS = 6  # heartbeats of a rank within the time after which it counts as lost
FINISHED, FAILED = "finished", "failed "


class Watch:
    """A thread in each rank that writes a heartbeat into torchrun's store, and checks those of the other ranks.

    It does not depend on the main thread, so a heartbeat is missing only where a process was killed
    or stopped, or its machine or network is lost. A collective that hangs between running ranks ends by the
    process group's timeout.

    Args:
        silence: seconds without a heartbeat after which a rank counts as lost.
    """

    def __init__(self, rank: int, world_size: int, silence: float):
        self.rank, self.silence = rank, silence
        self.others = [other for other in range(world_size) if other != rank]
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A separate connection: the process group's may be blocked by the main thread.
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=silence), wait_for_workers=False)
        self.store = dist.PrefixStore(f"boxgrpo/alive/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.over = threading.Event()
        self.seen: dict[int, tuple[str, float]] = {}
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> "Watch":
        """Return when every rank has written its process and host into the store."""
        self.store.set(f"{self.rank}/place", f"pid {os.getpid()} on {socket.gethostname()}")
        self.store.set(str(self.rank), "0")
        self.store.wait([f"{other}/place" for other in self.others] + [str(other) for other in self.others])
        self.thread.start()
        return self

    def stop(self, error: BaseException | None = None) -> None:
        """Mark this rank as finished or, with an error, as failed; then the others exit at their next heartbeat."""
        self.over.set()
        self.thread.join(self.silence)
        self.store.set(str(self.rank), f"{FAILED}{type(error).__name__}: {error}" if error else FINISHED)

    def wait_for_lost_rank(self) -> None:
        """After a failed collective: wait, for a limited time, until the thread reports the lost rank and exits."""
        self.thread.join(2 * self.silence)

    def _run(self) -> None:
        beat, last = 0, time.monotonic()
        while not self.over.wait(self.silence / BEATS):
            beat, before, last = beat + 1, last, time.monotonic()
            if last - before > self.silence / 2:  # this process was suspended, perhaps with the whole job
                self.seen.clear()  # because other ranks may continue later than this one
            try:
                self.store.set(str(self.rank), str(beat))
                lost = self.lost()
                places = {rank: self.store.get(f"{rank}/place").decode() for rank in lost}
            except RuntimeError as error:  # DistNetworkError among others
                _exit(f"rank {self.rank}: the store at {os.environ['MASTER_ADDR']} cannot be reached ({error}).")
            if lost and not self.over.is_set():
                named = ", ".join(f"rank {r} ({places[r]}) {why}" for r, why in lost.items())
                _exit(f"rank {self.rank}: {named}. This rank ends too; start again with --resume auto.")

    def lost(self) -> dict[int, str]:
        """The ranks that failed or sent no heartbeat for `silence` seconds, with the reason for each."""
        now = time.monotonic()
        found = {}
        for other, sign in zip(self.others, self.store.multi_get([str(r) for r in self.others]), strict=True):
            sign = sign.decode()
            last, since = self.seen.get(other, (None, now))
            if sign.startswith(FAILED):
                found[other] = f"has failed with {sign.removeprefix(FAILED)}"
            elif sign != last:
                self.seen[other] = sign, now
            elif sign != FINISHED and now - since > self.silence:
                found[other] = f"sent no heartbeat for {self.silence:.0f} s"
        return found


def _exit(message: str) -> NoReturn:
    """End the process from this thread, because the main thread may wait forever."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)

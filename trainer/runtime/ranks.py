"""The processes of a run under torchrun: rank, collectives, SIGTERM, and the exit of a script."""

import ctypes
import logging
import os
import signal
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .watch import Watch

LOST_AFTER = 0.1  # share of the timeout after which a rank without a heartbeat counts as lost
STOPPED = 128 + signal.SIGTERM  # the exit status of a run that a launcher's SIGTERM has stopped
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
# Modules whose warnings concern one rank alone: every rank logs them.
PER_RANK = ("data.loader", "rollout.local", "step.pack")


class RunFailed(ValueError):
    """A run ends for a reason outside its options and data, such as a full disk: its script exits with status 1."""


class Ranks:
    """This process among `world_size`; a run without torchrun is rank 0 of 1."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.is_main, self.world_size = rank, rank == 0, world_size
        self.device = torch.device(device)
        self.stop_requested = False  # by a launcher's SIGTERM

    def sum(self, *values: float) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """The picklable `value` of every rank, by rank."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def transfer(self, value, source: int, target: int):
        """The picklable `value` of rank `source` on rank `target`; None elsewhere.

        Every rank calls it, in the same order; otherwise two ranks would wait for each other forever.
        """
        received = [value]
        if self.rank == source:
            dist.send_object_list(received, dst=target, device=self.device)
        elif self.rank == target:
            dist.recv_object_list(received, src=source, device=self.device)
        return received[0] if self.rank == target else None

    def mean_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Mean over the ranks that have the key, in one collective: ranks may have different keys.

        It is the minimum if the key's last part begins with min_, the maximum if it begins with max_ or peak_.
        """
        if self.world_size == 1:
            return metrics
        everyone = self.gather(metrics)
        pick = {"min": min, "max": max, "peak": max}
        return {
            k: pick.get(k.split("/")[-1].split("_")[0], statistics.fmean)([m[k] for m in everyone if k in m])
            for k in sorted(set().union(*everyone))
        }

    @contextmanager
    def record_sigterm(self):
        """Within the block SIGTERM only sets `stop_requested`. (torchrun may send it twice, and SIGKILL later.)"""
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop_requested", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks.

    By default it maps, zeroes and unmaps each activation, which takes a seventh of a tiny model's step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return nothing to the system
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: map only blocks above 32 MiB, glibc's limit


@contextmanager
def join_ranks(timeout: float = 1800.0):
    """Join the process group that torchrun describes, NCCL on GPUs and gloo elsewhere.

    Args:
        timeout: seconds after which a collective that not all ranks have joined is an error. If a rank sends no
            heartbeat for a tenth of that, the others exit.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR  # log on rank 0 only
    logging.getLogger("boxgrpo").setLevel(level)
    for name in PER_RANK:
        logging.getLogger(f"boxgrpo.trainer.{name}").setLevel(logging.WARNING)
    logging.basicConfig(format="%(levelname)s %(message)s")
    if world_size == 1:
        yield Ranks(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    watch = Watch(dist.get_rank(), world_size, LOST_AFTER * timeout).start()
    failed = None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # a gloo peer that exits while another still reads from it aborts that one
    except SystemExit as end:
        if end.code == STOPPED:  # all ranks end after the same step
            dist.barrier()
        raise
    except Exception as error:
        failed = error
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # caused by a lost rank, which the watch reports
            watch.wait_for_lost_rank()
        raise
    finally:
        watch.stop(failed)


def run_as_script(main: Callable[[], None], name: str) -> None:
    """Call main; print a ValueError or OSError without a traceback, and exit.

    The status is 2 for wrong input, which is a ValueError or a path that cannot be used, and 1 for a run that failed.
    A process group's rank skips the interpreter's shutdown, during which threads of gloo and DeepSpeed have aborted
    ranks whose work was done. Before ranks have joined, all of a machine find the same, and the first one prints it.
    """
    status, text = 0, ""
    try:
        main()
    except (ValueError, OSError) as error:
        wrong = (not isinstance(error, RunFailed | OSError)) or isinstance(error, WRONG_PATH)
        status, text = 2 if wrong else 1, f"{name}: {error}"
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as end:
        status, text = (end.code, "") if isinstance(end.code, int | None) else (1, end.code)
    if text and (dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(text, file=sys.stderr)
    if not dist.is_initialized():
        sys.exit(status)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)

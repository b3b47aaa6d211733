"""Prepared examples, one step after another without end, the same for any number of ranks and workers."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from boxgrpo.trainer.data.readers import Example

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One slot of the stream."""

    serial: int  # number of the slot, the same for any number of ranks
    example: Example
    item: object  # what `prepare` made of it


class Loader:
    """An endless stream of prepared examples in steps of `batch_size`.

    The stream is a row of slots, numbered from 0. Slot k asks for one of the n records, at place k mod n in the order
    of epoch k // n, and belongs to rank k mod `world_size`. A step takes the next `batch_size` x `world_size` slots, so
    its records are the same for any number of ranks, and one number, `position`, says where to go on after a restart.

    A record that cannot be prepared (ValueError or OSError) is logged once, and its slot takes the next record of the
    epoch's order that can. This is the slot's own affair: no rank has to know of another's bad records, and no later
    slot moves.

    Args:
        examples: the records.
        prepare: makes what the step needs from one `Example`; picklable when there are workers. The same example must
            always give the same.
        batch_size: samples a step and rank.
        seed: of the order; each epoch is shuffled anew.
        workers: processes that prepare ahead, one thread each; 0 prepares in this process when asked. They are started
            by a fork server, so neither CUDA nor threads of this process are in their way, send their results through
            pipes, so /dev/shm cannot run full, and end with this process, however it ends. A script that uses them
            needs its `if __name__ == "__main__"`.
        rank, world_size: this process's part of the stream.
        start: first slot: 0, or the `position` of a former run with the same batch_size x world_size.
        shuffle: False keeps the records in the order given.

    Attributes:
        position: first slot that no step given out so far has taken, over all ranks.
        faults: why each record was skipped, by `Example.source`.

    Raises:
        ValueError: no examples, or a size out of range; while iterating: not one record can be prepared.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prepare: Callable[[Example], object],
        *,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        shuffle: bool = True,
    ):
        if len(examples) == 0:
            raise ValueError("there are 0 examples; the stream needs at least 1. Check --data.")
        if batch_size < 1 or workers < 0 or start < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, workers {workers}, start {start}, rank {rank} of {world_size}: batch_size "
                "must be at least 1, workers and start at least 0, rank 0 to world_size - 1. Correct what is not."
            )
        self.batch_size, self.workers, self.rank, self.world_size = batch_size, workers, rank, world_size
        self.position = start
        self.faults: dict[str, str] = {}
        self._slots = _Slots(examples, prepare, seed, shuffle)

    def __len__(self) -> int:
        """Examples, of which a step takes some again and again."""
        return len(self._slots.examples)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, by all ranks."""
        return self.position / len(self)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Steps from `position` on: lists of samples."""
        numbers = itertools.count(self.position + self.rank, self.world_size)
        prepared = self._in_workers(numbers) if self.workers else map(self._slots.prepare, numbers)
        while True:
            step = [self._unwrap(next(prepared)) for _ in range(self.batch_size)]
            self.position += self.batch_size * self.world_size
            yield step

    def _in_workers(self, numbers: Iterator[int]) -> Iterator["_Outcome"]:
        context = multiprocessing.get_context("forkserver")
        # Imported once in the server, not in each worker: torch, and whatever `prepare` comes with.
        context.set_forkserver_preload([__name__, self._slots.prepare_example.__module__])
        loader = DataLoader(
            self._slots,
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            collate_fn=bytes,
            multiprocessing_context=context,
            worker_init_fn=_end_with_parent,
            prefetch_factor=max(2, -(-self.batch_size // self.workers)),  # a whole step is prepared while one is used
        )
        with _ctrl_c_waits(), _sigterm_blocked():
            arriving = iter(loader)
        while True:
            with _ctrl_c_waits():
                outcome = next(arriving)
            yield pickle.loads(outcome)

    def _unwrap(self, outcome: "_Outcome") -> Sample:
        examples = self._slots.examples
        for index, reason in outcome.faults:
            source = examples[index].source
            if source not in self.faults:
                self.faults[source] = reason
                logger.warning("skipped %s: %s", source, reason)
        if outcome.index is None:
            (reason, times), *_ = Counter(reason for _, reason in outcome.faults).most_common(1)
            raise ValueError(f"none of the {len(examples)} records can be prepared. {times} of them: {reason}")
        return Sample(outcome.slot, examples[outcome.index], outcome.item)


@dataclass
class _Outcome:
    slot: int
    index: int | None  # of the record that was used; None: there is none
    item: object
    faults: list[tuple[int, str]]  # (index, reason) of the records passed over


class _Slots(Dataset):
    """What every process can work out alone: the record of a slot, prepared."""

    def __init__(self, examples: Sequence[Example], prepare: Callable[[Example], object], seed: int, shuffle: bool):
        self.examples, self.prepare_example, self._seed, self._shuffle = examples, prepare, seed, shuffle

    def __getitem__(self, slot: int) -> bytes:
        # Plain pickle copies tensors into the bytes; torch's own would leave them in shared memory.
        return pickle.dumps(self.prepare(slot), protocol=pickle.HIGHEST_PROTOCOL)

    def prepare(self, slot: int) -> _Outcome:
        n = len(self.examples)
        epoch, place = divmod(slot, n)
        order = _order(n, self._seed, epoch) if self._shuffle else range(n)
        faults = []
        for step in range(n):
            index = int(order[(place + step) % n])
            try:
                return _Outcome(slot, index, self.prepare_example(self.examples[index]), faults)
            except (ValueError, OSError) as error:
                faults.append((index, str(error)))
        return _Outcome(slot, None, None, faults)


@contextlib.contextmanager
def _ctrl_c_waits():
    """Keep a KeyboardInterrupt for the end of the block.

    One that strikes while a queue's lock is being taken leaves it held, and the interpreter's exit waits for it for
    ever. Outside the main thread, and where Ctrl-C does not interrupt, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    came = []
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


@contextlib.contextmanager
def _sigterm_blocked():
    """Processes started in the block never see a SIGTERM, which a launcher sends to all of a run's processes.

    The run still finishes its step and saves, for which its loader has to live; it ends the workers itself.
    """
    resource_tracker.ensure_running()  # which unblocks SIGTERM when it has to start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_worker: int) -> None:
    """Let a worker die when the run is killed.

    DataLoader's own watch looks at the process that forked the worker, which is the fork server, and the server lives
    as long as its workers do: without this a killed run leaves both behind.
    """
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)

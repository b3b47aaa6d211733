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
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .example import Example

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One slot of the stream."""

    serial: int  # number of the slot, the same for any number of ranks
    example: Example
    item: object  # what `prepare` made of it


class Loader:
    """An endless stream of prepared examples in steps of `batch_size`.

    The stream is a row of slots, numbered from 0. Slot k takes one of the n records, at place k mod n in the order of
    epoch k // n, and belongs to rank k mod `world_size`. A step takes the next `batch_size` x `world_size` slots, so
    its records are the same for any number of ranks, and one number, `position`, is enough to resume.

    A record that cannot be prepared (ValueError or OSError) is logged once, and its slot takes the next record of the
    epoch's order that can. No other slot moves, and no rank needs to know of another's bad records.

    Args:
        examples: the records.
        prepare: makes what the step needs from one `Example`; picklable when there are workers. The same example must
            always give the same.
        batch_size: samples a step and rank.
        seed: of the order; each epoch is shuffled anew.
        workers: processes that prepare ahead, one thread each; 0 prepares in this process on demand. A fork server
            starts them, free of CUDA and of this process's threads. They send results through pipes, so /dev/shm cannot
            run full, and end with this process, however it ends. A script that uses them needs its
            `if __name__ == "__main__"`.
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
        """Number of examples; the stream repeats them."""
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
            step = []
            for outcome in itertools.islice(prepared, self.batch_size):
                for source, reason in outcome.faults:
                    if source not in self.faults:
                        self.faults[source] = reason
                        logger.warning("skipped %s: %s", source, reason)
                if outcome.example is None:
                    ((reason, times),) = Counter(reason for _, reason in outcome.faults).most_common(1)
                    raise ValueError(f"none of the {len(self)} records can be prepared. {times} of them: {reason}")
                step.append(Sample(outcome.slot, outcome.example, outcome.item))
            self.position += self.batch_size * self.world_size
            yield step

    def _in_workers(self, numbers: Iterator[int]) -> Iterator["_Outcome"]:
        context = multiprocessing.get_context("forkserver")
        # Imported once in the server, not in each worker: torch, and the module of `prepare`.
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
        with _ctrl_c_delayed(), _sigterm_blocked():
            arriving = iter(loader)
        while True:
            with _ctrl_c_delayed():
                outcome = next(arriving)
            yield pickle.loads(outcome)


class _Outcome(NamedTuple):
    slot: int
    example: Example | None  # the one that was used; None: no record can be prepared
    item: object
    faults: list[tuple[str, str]]  # (source, reason) of the records passed over


class _Slots(Dataset):
    """The prepared record of each slot, which every process can work out alone."""

    def __init__(self, examples: Sequence[Example], prepare: Callable[[Example], object], seed: int, shuffle: bool):
        self.examples, self.prepare_example, self._seed, self._shuffle = examples, prepare, seed, shuffle
        self._count = len(examples)

    def __getitem__(self, slot: int) -> bytes:
        # Plain pickle copies tensors into the bytes; torch's own would leave them in shared memory.
        return pickle.dumps(self.prepare(slot), protocol=pickle.HIGHEST_PROTOCOL)

    def prepare(self, slot: int) -> _Outcome:
        n = self._count
        epoch, place = divmod(slot, n)
        order = _order(n, self._seed, epoch) if self._shuffle else range(n)
        faults = []
        for step in range(n):
            source = None
            try:
                example = self.examples[int(order[(place + step) % n])]
                source = example.source
                return _Outcome(slot, example, self.prepare_example(example), faults)
            except (ValueError, OSError) as error:  # reading the record gives a Refused with its source
                faults.append((source or getattr(error, "source", "a record"), str(error)))
        return _Outcome(slot, None, None, faults)


@contextlib.contextmanager
def _ctrl_c_delayed():
    """Delay a KeyboardInterrupt to the end of the block.

    Raised while a queue's lock is being taken, it would leave the lock held, and the interpreter's exit would wait for
    it forever. Outside the main thread, and where Ctrl-C does not interrupt, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    received = []
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: received.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


@contextlib.contextmanager
def _sigterm_blocked():
    """Processes started in the block ignore SIGTERM, which a launcher sends to all processes of a run.

    The run still finishes its step and saves, for which it needs its workers; it ends them itself.
    """
    resource_tracker.ensure_running()  # whose own start would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_worker: int) -> None:
    """End a worker when the run is killed.

    DataLoader only checks that the worker's parent is alive, which is the fork server, and the server lives as long as
    its workers do: without this a killed run would leave both behind.
    """
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)

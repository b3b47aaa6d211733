"""`Examples`, records that are read on access, and `Loader`, the stream of a run's prepared records."""

import concurrent.futures
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from boxgrpo.model.batch import Group

from .example import Example, Refused, Source, parse
from .schemas import SCHEMAS
from .tables import read_row

logger = logging.getLogger(__name__)
T = TypeVar("T")

GOLD, TURNS, UNREAD = 1, 2, 4  # bits of the column `has`
# A row per usable record: file, record number, byte range (in a table: its row), number of images, whether it has a
# gold box, answers, or a box that is not read.
TABLE = np.dtype([("file", "i2"), ("number", "i4"), ("start", "i8"), ("stop", "i8"), ("images", "i4"), ("has", "u1")])


class Examples(Sequence):
    """The usable records of one or several files, read and parsed on access. A pickle holds only their positions."""

    def __init__(self, files: list[Source], table: np.ndarray):
        self.files = files
        self.table = table  # (n) TABLE

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index):
        """One example; for a slice or an index array, the `Examples` of those records, which are not read.

        Raises:
            Refused: an image was removed since the scan; the error has the record's `source`.
        """
        if isinstance(index, slice | np.ndarray):
            return Examples(self.files, self.table[index])
        number_of_file, number, start, stop, *_ = self.table[index].item()
        file = self.files[number_of_file]
        if file.table:
            record = read_row(file.path, start)
        else:
            with file.path.open("rb") as content:
                content.seek(start)
                record = json.loads(content.read(stop - start))
        try:
            return parse(record, SCHEMAS[file.schema].read, file, number)
        except Refused as refused:
            source = f"{file.label}#{number}"
            raise Refused(refused.reason, f"{source}: {refused}", source) from refused

    def __add__(self, other: "Examples") -> "Examples":
        later = other.table.copy()
        later["file"] += len(self.files)
        return Examples(self.files + other.files, np.concatenate([self.table, later]))

    @property
    def sources(self) -> list[str]:
        """`Example.source` of each record, without reading it."""
        return [f"{self.files[file].label}#{number}" for file, number, *_ in self.table.tolist()]

    @property
    def max_images(self) -> int:
        """The largest number of images in an example."""
        return int(self.table["images"].max())


class Loader:
    """An endless stream of prepared examples in steps of `batch_size`.

    The stream is a sequence of slots, numbered from 0. With n records, slot k holds record k mod n in the order of
    epoch k // n, and belongs to rank k mod `world_size`. A step takes the next `batch_size` x `world_size` slots: its
    records are the same for any number of ranks, and one number, `position`, is enough to resume. A record that cannot
    be prepared (ValueError or OSError) is logged once, and its slot takes the next one in the epoch's order.

    Args:
        examples: the records, at least one.
        prepare: makes a group's `prompt` from an `Example`; deterministic, and picklable if there are workers.
        batch_size: groups per step and rank.
        seed: seed of the order; each epoch is shuffled differently.
        workers: processes that prepare ahead, one thread each; 0: this process prepares on demand. A fork server starts
            them, so that they inherit neither CUDA nor threads. They send results through pipes, so that /dev/shm
            cannot fill up, and end with this process. A script that uses them needs `if __name__ == "__main__"`.
            A thread of this process reads the next step from the pipes while one is used.
        rank, world_size: select this process's part of the stream.
        start: first slot: 0, or the `position` of a former run.
        shuffle: False keeps the records in the order given.
        pin_for: a GPU; the prompts' pixels are in page-locked memory, from which copies to it do not wait.

    Attributes:
        position: first slot, over all ranks, that no step returned so far has used; may be set before iterating.
        faults: why each record was skipped, by `Example.source`.

    Raises:
        ValueError: while iterating: not one record can be prepared.
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
        pin_for: torch.device | None = None,
    ):
        self.batch_size, self.workers, self.rank, self.world_size = batch_size, workers, rank, world_size
        self.pin_for = pin_for
        self.position = self._read = start
        self.faults: dict[str, str] = {}
        self._slots = _Slots(examples, prepare, seed, shuffle)

    def __iter__(self) -> Iterator[list[Group]]:
        """Yield steps from `position` on: groups with a prompt, the slot's number (`serial`) and the `record`."""
        self._read = self.position
        numbers = itertools.count(self._first(), self.world_size)
        if self.workers:
            steps = take_ahead(self._steps(self._in_workers(numbers)))
        else:  # without a thread, which would compete with the training for the interpreter
            steps = self._steps(map(self._slots.prepare, numbers))
        for prepared in steps:
            step = []
            for group, faults in prepared:
                for source, reason in faults:
                    if source not in self.faults:
                        self.faults[source] = reason
                        logger.warning("skipped %s: %s", source, reason)
                if group is None:
                    ((reason, times),) = Counter(reason for _, reason in faults).most_common(1)
                    raise ValueError(f"none of the {len(faults)} records can be prepared. {times} of them: {reason}")
                step.append(group)
            self.position += self.batch_size * self.world_size
            yield step

    def ready(self) -> bool:
        """Whether the step after the one returned last is there; without workers it is prepared on demand."""
        return not self.workers or self._read > self.position

    def peek_step(self) -> list[Group]:
        """The groups of the step at `position`, prepared in this process; the stream still begins with that step."""
        numbers = range(self._first(), self.position + self.batch_size * self.world_size, self.world_size)
        return [group for group, _ in map(self._slots.prepare, numbers) if group is not None]

    def _first(self) -> int:
        """This rank's first slot from `position` on."""
        return self.position + (self.rank - self.position) % self.world_size

    def _steps(self, prepared: Iterator["_Prepared"]) -> Iterator[list["_Prepared"]]:
        while True:
            step = list(itertools.islice(prepared, self.batch_size))
            if self.pin_for is not None:
                step = [(group and group.pin(self.pin_for), faults) for group, faults in step]
            self._read += self.batch_size * self.world_size
            yield step

    def _in_workers(self, numbers: Iterator[int]) -> Iterator["_Prepared"]:
        context = multiprocessing.get_context("forkserver")
        # The server imports torch and the module of `prepare` once, in place of every worker.
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
        with _working_folder_off_path(), _ctrl_c_delayed(), _sigterm_blocked():
            return map(pickle.loads, iter(loader))


def check_preparable(examples: Sequence[Example], prepare: Callable[[Example], object], remedy: str) -> None:
    """Prepare the examples in order until one can be; raise ValueError with the remedy if none can."""
    reason = None
    for index in range(len(examples)):
        try:
            prepare(examples[index])
            return
        except (ValueError, OSError) as error:
            reason = reason or error
    raise ValueError(f"none of the {len(examples)} records can be prepared. The first: {reason} {remedy}")


# A slot's group, None where no record can be prepared, and (source, reason) of each record that was skipped.
_Prepared = tuple[Group | None, list[tuple[str, str]]]


class _Slots(Dataset):
    """The prepared record of each slot; every process can compute it without the others."""

    def __init__(self, examples: Sequence[Example], prepare: Callable[[Example], object], seed: int, shuffle: bool):
        self.examples, self.prepare_example, self.seed, self.shuffle = examples, prepare, seed, shuffle

    def __getitem__(self, slot: int) -> bytes:
        # pickle copies tensors into the bytes; torch's own pickler would pass them through shared memory.
        return pickle.dumps(self.prepare(slot), protocol=pickle.HIGHEST_PROTOCOL)

    def prepare(self, slot: int) -> _Prepared:
        n = len(self.examples)
        epoch, place = divmod(slot, n)
        order = _order(n, self.seed, epoch) if self.shuffle else range(n)
        faults = []
        for step in range(n):
            source = None
            try:
                example = self.examples[int(order[(place + step) % n])]
                source = example.source
                return Group(self.prepare_example(example), serial=slot, record=example), faults
            except (ValueError, OSError) as error:  # reading the record gives a Refused with its source
                faults.append((source or getattr(error, "source", "a record"), str(error)))
        return None, faults


def take_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items; a thread takes the next one while one is used. An exception of the thread is raised here, in turn."""

    def take(future: concurrent.futures.Future) -> None:
        try:
            future.set_result(next(items))
        except BaseException as error:
            error.add_note(traceback.format_exc())
            # A traceback holds the loader's workers, and the interpreter would wait for them when the error ends it.
            future.set_exception(error.with_traceback(None))

    def begin() -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        threading.Thread(target=take, args=(future,), daemon=True).start()  # a daemon: Ctrl-C must not wait for it
        return future

    ahead = begin()
    try:
        while True:
            item = ahead.result()
            ahead = begin()
            yield item
    except GeneratorExit:
        concurrent.futures.wait([ahead])  # what `items` holds can be closed when nothing takes from it
        raise


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
def _working_folder_off_path():
    """The fork server, started in the block as `python -c`, has no working folder on its path, nor have its workers.

    It would be the first: a folder `kernels` in it, as in this repository, would stand in the dependency's place.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


@contextlib.contextmanager
def _sigterm_blocked():
    """Processes started in the block ignore SIGTERM, which a launcher sends to all processes of a run.

    The run still finishes its step and saves, for which it needs its workers; it ends them itself.
    """
    resource_tracker.ensure_running()  # starting it inside the block would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_worker: int) -> None:
    """End a worker when the run is killed.

    DataLoader only checks that the worker's parent is alive, which is the fork server, and the server runs as long as
    its workers do: without this both would keep running after a kill.
    """
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)

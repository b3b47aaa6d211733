"""`--profile_steps 10:13`: a profile of some steps of a run, a file for each rank in output_dir/profile.

Under nsys, which records by itself, the steps are only marked: `nsys profile -c cudaProfilerApi --capture-range-end
stop`. Elsewhere torch.profiler writes a Chrome trace (ui.perfetto.dev opens it), and beside it are its ranges as JSON
and as a table.

`--memory_snapshot true` adds snapshots of the GPU's memory for pytorch.org/memory_viz. They are pickles that torch
writes; nothing here reads them.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from boxgrpo.trainer.options import profile_is_too_late, profile_window
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.spans import UNDER_NSYS

from .chrome_trace import read_chrome_trace
from .timeline import rows, table

log = logging.getLogger(__name__)

FOLDER = "profile"
MAX_SNAPSHOTS = 3  # of the first times that memory runs out
MAX_EVENTS = 100_000  # the latest allocations and frees in a snapshot


def profiled(steps: range, o, r: Ranks) -> Iterator[int]:
    """Yield the loop's steps, and profile those that `o.profile_steps` names.

    The profile is written when its last step ends, or when the run ends. Its name contains the steps, so a resumed run
    does not replace an earlier profile.

    Raises:
        ValueError: the run ends before the first step to profile.
    """
    window, folder = profile_window(o.profile_steps), Path(o.output_dir) / FOLDER
    if window and window.start >= steps.stop:
        raise ValueError(profile_is_too_late(o.profile_steps, steps.stop - 1))
    if window and window.stop <= steps.start:
        log.warning("profile_steps is %s; the run continues from step %d.", o.profile_steps, steps.start)
    with contextlib.ExitStack() as memory, contextlib.ExitStack() as profile:
        if o.memory_snapshot:
            memory.enter_context(_memory_history(folder, r))
        for step in steps:
            if step in window and (step == window.start or step == steps.start):
                covered = range(step, min(window.stop, steps.stop))
                profile.enter_context(_profile(folder, f"steps{covered.start}-{covered.stop - 1}-rank{r.rank}", o, r))
            yield step
            if step == window.stop - 1:
                profile.close()


@contextlib.contextmanager
def _profile(folder: Path, name: str, o, r: Ranks):
    """Profile the block, by nsys where it records this process and there is a GPU, else by torch."""
    by_nsys = r.device.type == "cuda" and UNDER_NSYS in os.environ
    recorder = torch.cuda.profiler if by_nsys else torch.profiler.profile()
    synchronize = torch.cuda.synchronize if r.device.type == "cuda" else lambda: None
    folder.mkdir(parents=True, exist_ok=True)
    synchronize()  # work that was launched before is not part of the profile
    recorder.start()
    try:
        yield
    finally:
        synchronize()
        recorder.stop()
        if not by_nsys:
            _write(recorder, folder / f"{name}.trace.json.gz")
    if o.memory_snapshot:
        _dump(folder / f"{name}-memory.pickle")


def _write(recorded: torch.profiler.profile, trace: Path) -> None:
    """Write the trace, its rows as JSON, and their table."""
    recorded.export_chrome_trace(str(trace))
    found = rows(read_chrome_trace(trace))
    kept_rows(trace).write_text(json.dumps([asdict(row) for row in found], indent=1))
    kept_rows(trace).with_suffix(".md").write_text(table(found) + "\n")
    log.info("profile written to %s", trace)


def kept_rows(trace: Path) -> Path:
    """The file beside a run's trace that holds its rows, so that a large trace is parsed once."""
    return trace.with_name(trace.name.removesuffix(".trace.json.gz") + ".json")


@contextlib.contextmanager
def _memory_history(folder: Path, r: Ranks):
    """Record allocations, and write a snapshot where memory runs out, even if the step is then repeated."""
    numbers = iter(range(1, MAX_SNAPSHOTS + 1))

    def dump_snapshot(*_) -> None:
        if number := next(numbers, None):
            folder.mkdir(parents=True, exist_ok=True)
            _dump(folder / f"out-of-memory{number}-rank{r.rank}.pickle")

    torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    torch._C._cuda_attach_out_of_memory_observer(dump_snapshot)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
        list(numbers)  # the observer cannot be removed; with no number left it does nothing


def _dump(path: Path) -> None:
    torch.cuda.memory._dump_snapshot(str(path))
    log.info("memory written to %s", path)

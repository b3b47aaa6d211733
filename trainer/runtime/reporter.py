"""A run's output folder, its metrics in metrics.jsonl and TensorBoard, and its terminal output."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .files import open_lines, replace_file
from .health import Health

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
OPTIONS = "options.yaml"
BEST = "best"  # folder of the checkpoint with the best evaluation
SCORES = "scores.json"  # in that folder
# An earlier run's files, which are removed when a run starts anew.
STALE = ("tensorboard", "profile", "adapter", "checkpoint-[0-9]*", ".checkpoint-*", BEST, f".{BEST}.*")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # with these a sampled text could control the terminal


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The `checkpoint-<step>` folders in it by step, in order."""
    found = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*") if p.is_dir()}
    return dict(sorted((int(name[1]), path) for path, name in found.items() if name))


def check_output_dir(options, ranks, checkpoint: Path | None = None) -> Path:
    """Check the run's folder and return it; every rank calls it.

    Args:
        checkpoint: the checkpoint from which the run is resumed.

    Raises:
        ValueError: on every rank, when the folder holds another run, or later checkpoints of this one, and
            --overwrite_output_dir was not given.
    """
    folder = Path(options.output_dir)
    patterns = ["[!.]*.safetensors*", "adapter"]
    if options.resume != "auto":  # with auto, a run that was killed before its first checkpoint starts anew
        patterns += ["checkpoint-*", "tensorboard", METRICS, BEST]
    elif not (folder / BEST / SCORES).exists():
        patterns.append(BEST)
    held = (path for pattern in patterns for path in folder.glob(pattern))
    taken = any(path.is_dir() or (path.is_file() and path.stat().st_size) for path in held)
    taken, later = ranks.gather((taken, _later_checkpoints(folder, checkpoint, options.resume)))[0]
    if options.overwrite_output_dir:
        return folder
    if taken and not _resumes_in(folder, checkpoint):
        raise ValueError(
            f"output_dir {folder} already holds a run. "
            "Name another with --output_dir, or give --overwrite_output_dir true."
        )
    if later:
        raise ValueError(
            f"resume is {checkpoint}, but {folder} also holds {', '.join(path.name for path in later)}. "
            "Give --overwrite_output_dir true to remove the later ones, or name another --output_dir."
        )
    return folder


def claim_output_dir(options, ranks, checkpoint: Path | None = None, metrics_bytes: int = 0) -> Path:
    """`check_output_dir`, then remove an earlier run's metrics and checkpoints, and write the options.

    A resumed run keeps the first `metrics_bytes` of its metrics file, those from before its checkpoint.
    """
    folder = check_output_dir(options, ranks, checkpoint)
    if not ranks.is_main:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if resumed := _resumes_in(folder, checkpoint):
        stale = _later_checkpoints(folder, checkpoint, options.resume)
        if (folder / METRICS).exists():
            truncate(folder / METRICS, metrics_bytes)
    else:
        (folder / METRICS).unlink(missing_ok=True)
        stale = [path for pattern in STALE for path in folder.glob(pattern)]
    for path in stale:
        shutil.rmtree(path, ignore_errors=not resumed)
    replace_file(folder / OPTIONS, yaml.safe_dump(dataclasses.asdict(options), sort_keys=False))
    return folder


def _resumes_in(folder: Path, checkpoint: Path | None) -> bool:
    """Whether `folder` holds the earlier part of this run."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def _later_checkpoints(folder: Path, checkpoint: Path | None, resume: str) -> list[Path]:
    """The checkpoints in `folder` after the one that `resume` names: a later --resume auto would continue from them.

    (With --resume auto there are none: later checkpoints than the one it finds are incomplete.)
    """
    if resume == "auto" or not _resumes_in(folder, checkpoint):
        return []
    steps = checkpoint_folders(folder)
    here = next((step for step, path in steps.items() if path.name == checkpoint.name), max(steps, default=0))
    return [path for step, path in steps.items() if step > here]


def truncate(path: Path, size: int) -> None:
    """Keep the file's first `size` bytes, those from before a checkpoint.

    Raises:
        ValueError: it has fewer bytes.
    """
    if path.stat().st_size < size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and had {size} at the checkpoint; it was cut or replaced. "
            "Restore it, or move it away."
        )
    os.truncate(path, size)


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics; without those that are no JSON, as a kill or a loss of power leaves them."""
    lines, path = [], folder / METRICS
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


class Reporter:
    """Writes on rank 0; on other ranks no method does anything. `start`: number of earlier steps.

    It warns once of each thing that `Health` finds; not again of what it finds in the metrics of a resumed run's
    earlier steps.
    """

    def __init__(self, folder: Path, ranks, total_steps: int, title: str, start: int = 0):
        self.active, self.total_steps = ranks.is_main, total_steps
        if self.active:
            self.file, self.health = open_lines(folder / METRICS), Health()
            for line in read_metrics(folder):
                self.health.read(line)
            self.board = _tensorboard(folder / "tensorboard", start)
            self.bar = tqdm(total=total_steps, initial=start, desc=title, dynamic_ncols=True, mininterval=1.0)

    def advance(self, **shown: float) -> None:
        if self.active:
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
            self.bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.active:
            return
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        line = {"step": step, "total_steps": self.total_steps, **known}
        self.file.write(json.dumps(line) + "\n")
        for finding in self.health.read(line):
            with self.bar.external_write_mode():
                log.warning("step %d: %s", step, finding.message)
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table above the progress bar; no text is interpreted as markup or as an emoji's name."""
        if not self.active:
            return
        table = Table(title=title, show_lines=True)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", cell)) for cell in row))
        with self.bar.external_write_mode():
            Console(force_terminal=False, width=shutil.get_terminal_size((140, 40)).columns).print(table)

    def close(self) -> None:
        for part in (self.file, self.board, self.bar) if self.active else ():
            if part is not None:
                part.close()


def _tensorboard(folder: Path, start: int):
    """TensorBoard's writer; None, with a warning, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        log.warning("no TensorBoard files: %s. Install it with pip install tensorboard.", error)
        return None
    return SummaryWriter(folder, purge_step=start + 1 if start else None)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory so far, in 1e9 bytes: of the GPU's allocator, or of this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

"""What a run tells: metrics.jsonl, TensorBoard, a progress bar, tables of sampled completions."""

import dataclasses
import io
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

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
OPTIONS = "options.yaml"
BEST = "best"  # folder of the best checkpoint of a run that evaluates, and in it
SCORES = "scores.json"
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # a sampled escape byte would steer the terminal


def check_output_dir(options, ranks, found: Path | None = None) -> Path:
    """The run's folder; on every rank an error when it holds another run, or a checkpoint.

    Args:
        found: the checkpoint that the run goes on from.

    Raises:
        ValueError: it does, and --overwrite_output_dir was not given.
    """
    folder = Path(options.output_dir)
    held = [*folder.glob("[!.]*.safetensors*"), folder / "adapter"]
    if options.resume != "auto":  # killed before its first checkpoint, a run leaves lines, and begins anew
        held += [*folder.glob("checkpoint-*"), folder / "tensorboard", folder / METRICS]
    if options.resume != "auto" or not (folder / BEST / SCORES).exists():  # else that run's own
        held.append(folder / BEST)
    taken = ranks.gather(any(path.is_dir() or (path.is_file() and path.stat().st_size) for path in held))[0]
    if taken and not options.overwrite_output_dir and not goes_on_in(folder, found):
        raise ValueError(
            f"output_dir {folder} already holds a run. "
            "Name another with --output_dir, or give --overwrite_output_dir true."
        )
    later = ranks.gather(later_checkpoints(folder, found, options.resume))[0]
    if later and not options.overwrite_output_dir:
        raise ValueError(
            f"resume is {found}, but {folder} also holds {', '.join(path.name for path in later)}. "
            "Give --overwrite_output_dir true to remove what is later, or name another --output_dir."
        )
    return folder


def goes_on_in(folder: Path, found: Path | None) -> bool:
    """Whether the run's own earlier part lies in `folder`."""
    return found is not None and found.resolve().parent == folder.resolve()


def later_checkpoints(folder: Path, found: Path | None, resume: str) -> list[Path]:
    """Those of the run's own folder that a named `found` goes back before; --resume auto would take them for its own.

    (What lies later than the one that auto has found is not whole.)
    """
    if resume == "auto" or not goes_on_in(folder, found):
        return []
    steps = {path.name: int(n[1]) for path in folder.iterdir() if (n := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    here = steps.get(found.name, max(steps.values(), default=0))  # one under another name says nothing of its step
    return [folder / name for name in sorted(steps, key=steps.get) if steps[name] > here]


def claim_output_dir(options, ranks, found: Path | None = None, metrics_bytes: int = 0) -> Path:
    """`check_output_dir`, then the options are written, and an earlier run's metrics and checkpoints make room.

    A run that goes on keeps its first `metrics_bytes`, those from before its checkpoint.
    """
    folder = check_output_dir(options, ranks, found)
    ranks.barrier()  # every rank has looked before anything is written
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        if goes_on_in(folder, found):
            for later in later_checkpoints(folder, found, options.resume):
                shutil.rmtree(later)
            if (folder / METRICS).exists():
                cut(folder / METRICS, metrics_bytes)
        else:
            (folder / METRICS).unlink(missing_ok=True)
            for pattern in (
                "tensorboard",
                "profile",
                "adapter",
                "checkpoint-[0-9]*",
                ".checkpoint-*.part",
                BEST,
                f".{BEST}.*",
            ):
                for stale in sorted(folder.glob(pattern)):
                    shutil.rmtree(stale, ignore_errors=True)
        (folder / OPTIONS).write_text(yaml.safe_dump(dataclasses.asdict(options), sort_keys=False))
    return folder


def cut(path: Path, size: int) -> None:
    """Keep the file's first `size` bytes, those from before a checkpoint.

    Raises:
        ValueError: it has fewer.
    """
    if path.stat().st_size < size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, and had {size} at the checkpoint; it was cut or replaced. "
            "Restore it, or move it away."
        )
    os.truncate(path, size)


class Reporter:
    """Writes on rank 0; elsewhere every call is nothing. `start`: steps that were taken before."""

    def __init__(self, folder: Path, ranks, total_steps: int, title: str, start: int = 0):
        self.active = ranks.is_main
        if self.active:
            self.file = (folder / METRICS).open("ab")
            self.board = _board(folder / "tensorboard", start)
            self.bar = tqdm(total=total_steps, initial=start, desc=title, dynamic_ncols=True, mininterval=1.0)

    @property
    def bytes_written(self) -> int:
        """Length of the metrics file."""
        return self.file.tell() if self.active else 0

    def advance(self, **shown: float) -> None:
        if self.active:
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
            self.bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.active:
            return
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step, **known}).encode() + b"\n")
        self.file.flush()
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table above the progress bar; the model's text is shown as it is, never as markup or emoji names."""
        if not self.active:
            return
        table = Table(title=title, show_lines=True)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", cell)) for cell in row))
        text = io.StringIO()
        Console(file=text, width=shutil.get_terminal_size((140, 40)).columns).print(table)
        self.bar.write(text.getvalue())

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.board:
                self.board.close()
            self.bar.close()


def _board(folder: Path, start: int):
    """TensorBoard's writer; None, and a line in the log, on a machine that runs a checkout without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        log.warning("no TensorBoard files: %s. Install it with pip install tensorboard.", error)
        return None
    return SummaryWriter(folder, purge_step=start + 1 if start else None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 1e9 bytes: the GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
